"""Postgres, the doorbell and the adapter store: everything durable, and the only place with SQL."""
