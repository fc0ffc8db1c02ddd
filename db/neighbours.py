"""What workers tell each other: the adapters they hold, and the partitions they serve by name.

It stands in the worker's own row, beside the engine's limits, and is true while its lease lives.
"""

from collections.abc import Collection
from dataclasses import dataclass

from db.database import Database


@dataclass(frozen=True, slots=True)
class Others:
    """What the other live workers of a base model hold, taken together."""

    resident: frozenset[int]
    partitions: frozenset[int]


async def tell(
    database: Database, worker_id: int, resident: Collection[int], partitions: Collection[int]
) -> None:
    """Say which adapter versions a worker holds, and which partitions it serves by name."""
    async with database.connection() as connection:
        await connection.execute(
            """
            UPDATE workers SET limits = (limits::jsonb || jsonb_build_object(
                'resident', $2::int[], 'partitions', $3::int[]))::json
            WHERE id = $1
            """,
            worker_id,
            list(resident),
            list(partitions),
        )


async def others(database: Database, worker_id: int, base_model_id: int) -> Others:
    """What the others with a live lease hold."""
    async with database.connection() as connection:
        row = await connection.fetchrow(_OTHERS, worker_id, base_model_id)
    assert row is not None
    return Others(frozenset(row["resident"]), frozenset(row["partitions"]))


_OTHERS = """
WITH live AS (
    SELECT limits::jsonb AS held FROM workers
    WHERE id <> $1 AND base_model_id = $2
      AND lost_at IS NULL AND stopped_at IS NULL AND lease_expires_at > now()
)
SELECT ARRAY(SELECT DISTINCT e::int FROM live, jsonb_array_elements_text(held->'resident') e)
           AS resident,
       ARRAY(SELECT DISTINCT e::int FROM live, jsonb_array_elements_text(held->'partitions') e)
           AS partitions
"""
