"""Batches in progress, written as rows: for tests of what happens to them then."""

from pathlib import Path

from db.database import Database
from tests.support.jobs import make_bench

_MAKE_BATCH = """
INSERT INTO batches (public_id, tenant_id, status, total, endpoint, completion_window, skip_invalid,
                     input_file_id, expires_at, in_progress_at)
SELECT uuidv7(), 1, 'in_progress', $1, '/v1/completions', '24h', false, uuidv7(),
       now() + interval '1 day', now()
RETURNING id
"""
_MAKE_LINES = """
WITH line AS (
    INSERT INTO batch_lines (batch_id, line, job_id, custom_id, base_model_id, adapter_version_id)
    SELECT $1, n, uuidv7(), 'r' || n, $2, 0 FROM generate_series(1, $3::int) n
    RETURNING line, job_id
), input AS (
    INSERT INTO job_inputs (job_id, tenant_id, endpoint, model, body)
    SELECT job_id, 1, 'completion', 'm', '{}' FROM line
)
INSERT INTO jobs (id, tenant_id, base_model_id, place, batch_id, batch_line, deadline)
SELECT job_id, 1, $2, line, $1, line, CASE WHEN line % 10 = 0 THEN now() + interval '1 hour' END
FROM line
"""


async def make_batches(
    database: Database, folder: Path, batches: int = 2, lines: int = 1500
) -> tuple[int, list[int]]:
    """Batches whose jobs stand in the base model's line, mixed; every tenth has a deadline.

    Returns:
        The base model's id, and the batches'.
    """
    bench = await make_bench(database, folder, 0)
    async with database.transaction() as connection:
        ids = [await connection.fetchval(_MAKE_BATCH, lines) for _ in range(batches)]
        for batch_id in ids:
            await connection.execute(_MAKE_LINES, batch_id, bench.base_model_id, lines)
    return bench.base_model_id, ids
