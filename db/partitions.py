"""Moving an adapter to another partition: one of its own, or back to its bucket."""

import asyncpg

from core.errors import NotFound, Unavailable
from core.partitions import partition_of
from db.database import Database

#: How long a move waits for submissions under way.
LOCK_SECONDS = 5


async def move_adapter(
    database: Database, tenant: str, name: str, partition: int | None, partitions: int
) -> int:
    """Give an adapter a partition, with every line of it that waits; returns which.

    Submissions stand still for the length of the transaction, a few milliseconds: one that found
    the old partition would otherwise put its line back there, unheard by those that serve the new
    one.

    Args:
        tenant: whose adapter.
        partition: the number; None for the bucket that its id falls into.
        partitions: `LORRY_PARTITIONS`.

    Raises:
        NotFound: the tenant has no such adapter.
        Unavailable: a submission has held the waiting list for too long.
    """
    async with database.transaction() as connection:
        adapter_id = await connection.fetchval(
            "SELECT a.id FROM adapters a JOIN tenants t ON t.id = a.tenant_id"
            " WHERE t.name = $1 AND a.name = $2",
            tenant,
            name,
        )
        if adapter_id is None:
            raise NotFound(f"tenant {tenant!r} has no adapter {name!r}")
        if partition is None:
            partition = partition_of(str(adapter_id), partitions)
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
        try:
            # conflicts with all but plain reads, and comes after what is under way
            await connection.execute("LOCK TABLE waiting_adapters IN EXCLUSIVE MODE")
        except asyncpg.LockNotAvailableError:
            raise Unavailable(
                f"a submission has held the waiting list for {LOCK_SECONDS} s; try again"
            ) from None
        await connection.execute(
            "UPDATE adapters SET partition = $2 WHERE id = $1", adapter_id, partition
        )
        await connection.execute(
            """
            UPDATE waiting_adapters SET partition = $2 WHERE adapter_version_id IN (
                SELECT id FROM adapter_versions WHERE adapter_id = $1)
            """,
            adapter_id,
            partition,
        )
    return partition
