"""Measurements: each script prints its figures as JSON lines and its ratio or median last."""
