"""Other queues doing nothing with each job: drivers for benchmarks/queue.py.

    python -m benchmarks.peers pgqueuer DATABASE_URL MANAGERS BATCH
    python -m benchmarks.peers procrastinate DATABASE_URL CONCURRENCY

Each counts a job once its end is committed. `fill_…` queue the jobs, with bodies as Lorry's.
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import asyncpg
import procrastinate
import uvloop
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.qm import QueueManager
from pgqueuer.queries import Queries

from benchmarks.backlog import body
from benchmarks.drivers import Driver

#: The name of the task that does nothing.
NOOP = "noop"
_FILL_CHUNK = 5_000


def main() -> None:
    name, url, *numbers = sys.argv[1:]
    run = run_pgqueuer if name == "pgqueuer" else run_procrastinate
    uvloop.run(run(url, *map(int, numbers)))


async def install_pgqueuer(url: str) -> None:
    """Make pgqueuer's tables, with the autovacuum settings that it recommends."""
    connection = await asyncpg.connect(url)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    await queries.optimize_autovacuum()
    await connection.close()


async def fill_pgqueuer(url: str, jobs: int) -> None:
    """Queue jobs afresh."""
    connection = await asyncpg.connect(url)
    queries = Queries(AsyncpgDriver(connection))
    await queries.clear_queue()
    await queries.clear_queue_log()
    for first in range(0, jobs, _FILL_CHUNK):
        numbers = range(first, min(jobs, first + _FILL_CHUNK))
        await queries.enqueue(
            [NOOP] * len(numbers), [body(n).encode() for n in numbers], [0] * len(numbers)
        )
    await connection.close()


async def run_pgqueuer(url: str, managers: int = 1, batch: int = 250) -> None:
    """Drain with several managers on this process's loop, as pgqueuer's own benchmark does."""
    done = 0

    def count_what_it_logs(queries: Any) -> Any:
        log_jobs = queries.log_jobs

        async def counting(ended: Sequence[Any]) -> None:
            nonlocal done
            await log_jobs(ended)
            done += len(ended)

        queries.log_jobs = counting
        return queries

    async def noop(_job: Job) -> None:
        return

    queues = []
    for _ in range(managers):
        queries = Queries(AsyncpgDriver(await asyncpg.connect(url)))
        manager = QueueManager(count_what_it_logs(queries))
        manager.entrypoint(NOOP, accepts_context=False)(noop)
        queues.append(manager)
    driver = Driver(lambda: done)
    await driver.wait_for_word()
    draining = [asyncio.create_task(manager.run(batch_size=batch)) for manager in queues]
    await driver.report()
    for manager in queues:
        manager.shutdown.set()
    await asyncio.gather(*draining)


def _procrastinate(url: str, pool: int) -> procrastinate.App:
    connector = procrastinate.PsycopgConnector(conninfo=url, min_size=pool, max_size=pool)
    app = procrastinate.App(connector=connector)

    async def noop(**_body: Any) -> None:
        return

    app.task(name=NOOP)(noop)
    return app


async def install_procrastinate(url: str) -> None:
    """Make procrastinate's tables."""
    async with _procrastinate(url, 1).open_async() as app:
        await app.schema_manager.apply_schema_async()


async def fill_procrastinate(url: str, jobs: int) -> None:
    """Queue jobs afresh."""
    connection = await asyncpg.connect(url)
    await connection.execute("TRUNCATE procrastinate_jobs CASCADE")
    await connection.close()
    async with _procrastinate(url, 1).open_async() as app:
        for first in range(0, jobs, _FILL_CHUNK):
            numbers = range(first, min(jobs, first + _FILL_CHUNK))
            arguments: list[Any] = [{"body": body(n)} for n in numbers]
            await app.tasks[NOOP].batch_defer_async(*arguments)


async def run_procrastinate(url: str, concurrency: int = 16) -> None:
    """Drain with one worker of this concurrency; it keeps finished jobs, as Lorry does."""
    done = 0
    async with _procrastinate(url, min(concurrency, 8) + 2).open_async() as app:
        finish = app.job_manager.finish_job

        async def counting(*arguments: Any, **named: Any) -> None:
            nonlocal done
            await finish(*arguments, **named)
            done += 1

        app.job_manager.finish_job = counting
        driver = Driver(lambda: done)
        await driver.wait_for_word()
        draining = asyncio.create_task(
            app.run_worker_async(concurrency=concurrency, install_signal_handlers=False)
        )
        await driver.report()
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)


if __name__ == "__main__":
    main()
