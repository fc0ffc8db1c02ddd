"""Alembic's migrations of Lorry's schema; run by `lorry migrate`."""
