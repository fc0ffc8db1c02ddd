"""A worker frozen in a transaction: a stopped process, a paused machine, a cut network.

It may hold rows of a transaction that it will not end. Nobody else may wait for it for ever.
"""

import os
import signal
from pathlib import Path

import psutil
import pytest

from core.settings import Settings
from db.database import Database
from tests.support.cores import drain_core
from tests.support.jobs import BASE, make_bench, submit
from tests.support.killable_worker import Blow, Victim, start_victim
from tests.support.settled import answers, settled
from tests.support.stewards import running_steward
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

LEASE_SECONDS = 5.0
EXIT_LEASE_LOST = 4
HEIR = Settings(lease_seconds=30, poll_seconds=0.1)
STEWARD = Settings(lease_seconds=LEASE_SECONDS, sweep_seconds=0.2)
#: Where it holds its line's row on the waiting list: between two statements, and inside one.
END_TURN = "claims.end_turn > waiting.drop_if_empty"
BETWEEN = Blow(f"{END_TURN}: SELECT true FROM waiting_adapters", after=True, number=signal.SIGSTOP)
INSIDE = Blow(
    f"{END_TURN}: DELETE FROM waiting_adapters WHERE",
    after=False,
    inside=True,
    number=signal.SIGSTOP,
)


@pytest.mark.parametrize("blow", [BETWEEN, INSIDE], ids=str)
async def test_a_worker_frozen_in_a_transaction_holds_nobody_up(
    database: Database, tmp_path: Path, database_url: str, broker_url: str, blow: Blow
) -> None:
    bench = await make_bench(database, tmp_path, 1)
    settings = {
        "LORRY_DATABASE_URL": database_url,
        "LORRY_BROKER_URL": broker_url,
        "LORRY_STORE_URL": str(tmp_path / "store"),
        "LORRY_CACHE_DIR": str(tmp_path / "cache"),
        "LORRY_LEASE_SECONDS": str(LEASE_SECONDS),
        "LORRY_POLL_SECONDS": "0.1",
    }
    await submit(database, "a0", 5, max_tokens=8)
    flags = ("--sim-step-ms", "300")
    victim = Victim(BASE, flags, settings, tmp_path / "victim.log", blow)
    process = start_victim(victim)
    try:
        assert process.pid is not None
        worker = psutil.Process(process.pid)

        async def frozen() -> bool:
            return bool(worker.status() == psutil.STATUS_STOPPED)

        # by its state: a look at the row takes the row's lock, and a worker skips a locked row
        await eventually(frozen, "a worker frozen", 60)
        assert await _is_held(database)
        async with running_steward(database, broker_url, STEWARD):
            await submit(database, "a0", 5)  # or a statement of it runs out of time
            async with drain_core(bench, tmp_path / "cache", broker_url, settings=HEIR):
                await settled(database, 10, succeeded=10)
        written = await answers(database)
        os.kill(process.pid, signal.SIGCONT)

        async def ended() -> bool:
            return not process.is_alive()

        await eventually(ended, "the worker to find that its lease is lost", 15)
        assert process.exitcode == EXIT_LEASE_LOST, victim.log.read_text()
        assert await answers(database) == written
    finally:
        process.kill()
        process.join()


async def _is_held(database: Database) -> bool:
    async with database.connection() as connection:
        free = await connection.fetch("SELECT FROM waiting_adapters FOR UPDATE SKIP LOCKED")
        rows = await connection.fetch("SELECT FROM waiting_adapters")
    return len(free) < len(rows)
