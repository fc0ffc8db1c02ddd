"""One Lorry worker whose engine answers at once: a driver for benchmarks/queue.py.

    python -m benchmarks.noop_worker DATABASE_URL BROKER_URL FOLDER

The drain core of `lorry worker` with the simulated engine in its no-op mode, without the consumer
of doorbells: the backlog is there before it starts.
"""

import asyncio
import os
import socket
import sys
from pathlib import Path

import uvloop

from benchmarks.backlog import BASE, CONTEXT
from benchmarks.drivers import Driver
from core.settings import Settings
from db import registry, workers
from db.database import Database
from db.doorbell import Doorbell
from db.store import Store
from db.workers import WorkerFacts
from workers.adapter_files import AdapterFiles
from workers.drain.core import DrainCore
from workers.engine.simulated import SimulatedEngine
from workers.main import POOL_SIZE, calm_collector

#: What the engine takes at once: so large that the queue is what limits.
RUNNING = 4096
SLOTS = 8


def main() -> None:
    database_url, broker_url, folder = sys.argv[1:4]
    uvloop.run(drain(database_url, broker_url, Path(folder)))


async def drain(database_url: str, broker_url: str, folder: Path) -> None:
    """Wait for the word, drain, report, and stop in order."""
    settings = Settings(poll_seconds=0.5)
    limits = {"max-num-seqs": RUNNING, "max-loras": SLOTS, "max-model-len": CONTEXT}
    flags = [f"--{name}={value}" for name, value in limits.items()]
    engine = SimulatedEngine.from_flags(
        BASE,
        ["--sim-noop", "--served-model-name", BASE, *flags],
    )
    await engine.start()
    calm_collector()
    doorbell = Doorbell(broker_url)
    async with Database.connect(database_url, max_size=POOL_SIZE) as database:
        base_model_id = await registry.declare_base(database, BASE, CONTEXT, "bench")
        facts = WorkerFacts(
            base_model_id, socket.gethostname(), os.getpid(), "simulated", "1", {"max_loras": SLOTS}
        )
        core = DrainCore(
            database=database,
            engine=engine,
            files=AdapterFiles(database, Store.open(str(folder / "store")), folder / "cache"),
            doorbell=doorbell,
            settings=settings,
            worker_id=await workers.register(database, facts, settings.lease_seconds),
            base_model_id=base_model_id,
        )
        driver = Driver(lambda: core.recorder.recorded)
        await driver.wait_for_word()
        draining = asyncio.create_task(core.run())
        await asyncio.wait(
            {draining, asyncio.create_task(driver.report())}, return_when=asyncio.FIRST_COMPLETED
        )
        core.stop()
        await draining
    doorbell.close()
    await engine.close()


if __name__ == "__main__":
    main()
