"""Live rates: what each worker currently gets done, for promises of finish times.

Small and rewritten every few seconds; losing it costs nothing but a few seconds of knowledge. No
tenant's data is in it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from db.database import Database


@dataclass(frozen=True, slots=True)
class Rate:
    """What is finished per second: tokens of answers, and jobs."""

    tokens_per_second: float
    jobs_per_second: float


#: A rate older than this is of a worker that cannot reach Postgres: several publications late.
STALE_SECONDS = 30

#: Rates that count: of workers (`w`) with a live lease, and published (`r`) lately.
LIVE_RATES = f"""
    worker_rates r JOIN workers w ON w.id = r.worker_id
        AND w.lost_at IS NULL AND w.stopped_at IS NULL AND w.lease_expires_at > now()
        AND r.updated_at > now() - make_interval(secs => {STALE_SECONDS})
"""


async def publish(
    database: Database, worker_id: int, base_model_id: int, rates: Mapping[int, Rate]
) -> None:
    """Replace a worker's rates, by adapter version id, in one statement."""
    async with database.connection() as connection:
        await connection.execute(
            """
            WITH gone AS (
                DELETE FROM worker_rates
                WHERE worker_id = $1 AND adapter_version_id <> ALL($3::int[])
            )
            INSERT INTO worker_rates (worker_id, adapter_version_id, base_model_id,
                                      tokens_per_second, jobs_per_second, updated_at)
            SELECT $1, r.id, $2, r.tokens, r.jobs, now()
            FROM unnest($3::int[], $4::real[], $5::real[]) AS r(id, tokens, jobs)
            ON CONFLICT (worker_id, adapter_version_id) DO UPDATE SET
                tokens_per_second = excluded.tokens_per_second,
                jobs_per_second = excluded.jobs_per_second,
                updated_at = excluded.updated_at
            """,
            worker_id,
            base_model_id,
            list(rates),
            [rate.tokens_per_second for rate in rates.values()],
            [rate.jobs_per_second for rate in rates.values()],
        )


async def publish_resident(
    database: Database, worker_id: int, adapter_version_ids: Collection[int]
) -> None:
    """Tell which adapter versions lie in a worker's slots. No index is touched."""
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE workers SET resident = $2 WHERE id = $1", worker_id, list(adapter_version_ids)
        )


async def forget_dead(database: Database) -> int:
    """Delete the rates of workers that have stopped or were lost; returns how many."""
    async with database.connection() as connection:
        status = await connection.execute(
            """
            DELETE FROM worker_rates r USING workers w
            WHERE w.id = r.worker_id AND (w.stopped_at IS NOT NULL OR w.lost_at IS NOT NULL)
            """
        )
    return int(status.split()[-1])


async def tokens_per_second(database: Database, base_model_id: int) -> float:
    """What all live workers of a base model get done together."""
    total: float = await database.fetch_value(
        f"""
        SELECT coalesce(sum(r.tokens_per_second), 0)::float8 FROM {LIVE_RATES}
        WHERE r.base_model_id = $1
        """,
        base_model_id,
    )
    return total


async def by_adapter(database: Database, base_model_id: int) -> dict[int, Rate]:
    """What each adapter version (0: the base model) gets, over all live workers."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            f"""
            SELECT r.adapter_version_id, sum(r.tokens_per_second)::float8 AS tokens,
                   sum(r.jobs_per_second)::float8 AS jobs
            FROM {LIVE_RATES}
            WHERE r.base_model_id = $1
            GROUP BY r.adapter_version_id
            """,
            base_model_id,
        )
    return {row["adapter_version_id"]: Rate(row["tokens"], row["jobs"]) for row in rows}
