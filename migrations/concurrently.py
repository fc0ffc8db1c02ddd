"""Indexes that are built while the table is in use.

Outside a transaction, and with no limit to the waiting: the build waits for old snapshots, and
nobody's work waits for it.
"""

from alembic import op

from migrations.limits import LIMITS, set_limits


def create_index(name: str, table: str, columns: str, condition: str) -> None:
    """Build a partial index CONCURRENTLY; one that an interrupted build left behind is replaced."""
    with op.get_context().autocommit_block():
        for setting in LIMITS:
            op.execute(f"SET {setting} = 0")
        # what an interrupted build leaves behind is invalid, and never used
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
        op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {table} ({columns}) WHERE {condition}")
        for statement in set_limits():
            op.execute(statement)
