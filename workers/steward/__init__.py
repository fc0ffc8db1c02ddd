"""The steward: sweeps, rescues, expires and tidies up.

Any number may run, and the broker may be down.
"""
