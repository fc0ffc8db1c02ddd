"""Alembic's environment: how `lorry migrate` reaches the database.

A migration waits for a lock for a moment only, so that it never queues in front of a busy table's
traffic; it lets go and tries again (migrations/limits.py). Two migrations at once take turns.
"""

import asyncio
import random
import time

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from db.models import Base
from migrations.limits import LOCKED, LONGEST_PAUSE_SECONDS, PATIENCE_SECONDS, set_limits

#: Any fixed number: names the migration lock among the database's advisory locks.
MIGRATION_LOCK = 5_021_973
LOCK_PAUSE_SECONDS = 0.2


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    _lock(connection)
    try:
        for statement in set_limits():
            connection.execute(text(statement))
        connection.commit()
        _migrate(connection)
    finally:
        connection.rollback()
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
        connection.commit()


def _migrate(connection: Connection) -> None:
    """Run the migrations; one that does not get its locks is rolled back and run again."""
    jitter = random.Random()
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with context.begin_transaction():
                context.run_migrations()
        except DBAPIError as error:
            locked = getattr(error.orig, "sqlstate", None) in LOCKED
            if not locked or time.monotonic() > give_up_at:
                raise
            connection.rollback()
            time.sleep(jitter.uniform(0.1, LONGEST_PAUSE_SECONDS))
        else:
            return


def _lock(connection: Connection) -> None:
    """Wait for the migration lock without a snapshot: one held while waiting would make CREATE
    INDEX CONCURRENTLY in the other migration wait for us."""
    taken = text("SELECT pg_try_advisory_lock(:key)")
    while not connection.execute(taken, {"key": MIGRATION_LOCK}).scalar():
        connection.rollback()
        time.sleep(LOCK_PAUSE_SECONDS)
    connection.commit()


async def run_online() -> None:
    url = context.config.get_main_option("sqlalchemy.url")
    if not url:
        raise RuntimeError("sqlalchemy.url is not set: run `lorry migrate`")
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()


asyncio.run(run_online())
