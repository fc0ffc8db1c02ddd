"""The worker process: one engine, one drain, one consumer of doorbells.

`lorry worker` starts it through `workers/launcher.py`, in a session of its own. The specification
comes as one JSON argument, so that no setting of ours is read twice.
"""

import asyncio
import logging
import os
import socket
import sys
from contextlib import AsyncExitStack
from typing import Final

import uvloop

from core.errors import LorryError, Unavailable, UsageError
from core.logs import configure_logging
from core.partitions import queue_name
from core.settings import Settings, load_settings
from db import registry, workers
from db.database import Database
from db.doorbell import Doorbell
from db.store import Store
from db.workers import WorkerFacts
from workers.adapter_files import AdapterFiles
from workers.celery_app import DoorbellConsumer
from workers.drain.core import DrainCore
from workers.drain.lease import EngineStalled, LeaseLost
from workers.engine.protocol import Engine, EngineDead
from workers.engine.selection import EngineName, build_engine
from workers.launcher import WorkerSpec, watch_parent
from workers.metrics import DrainMetrics
from workers.metrics_server import served
from workers.rates import publish_rates
from workers.stop_signals import StopSignals

log = logging.getLogger("workers.main")  # __name__ is __main__ here

EXIT_USAGE: Final = 2
EXIT_ENGINE_DEAD: Final = 3
EXIT_LEASE_LOST: Final = 4
#: Connections a worker holds at most: claims, records, heartbeat, aborts, rates.
POOL_SIZE: Final = 6


def main() -> int:
    """Run a worker to its end; returns the exit status."""
    spec = WorkerSpec.from_json(sys.argv[1])
    if spec.parent_fd is not None:
        watch_parent(spec.parent_fd)
    try:
        settings = load_settings(os.environ)
        configure_logging(settings.log_level)
        engine = build_engine(EngineName(spec.engine), spec.model, spec.flags)
        return uvloop.run(run_worker(settings, engine, spec))
    except UsageError as error:
        print(f"lorry: {error.message}", file=sys.stderr)
        return EXIT_USAGE
    except LorryError as error:
        print(f"lorry: {error.message}", file=sys.stderr)
        return 1


async def run_worker(settings: Settings, engine: Engine, spec: WorkerSpec) -> int:
    """Start the engine, register, drain until SIGTERM; returns the exit status."""
    stop = StopSignals()
    metrics = DrainMetrics()
    # before the engine's minutes: a taken port is said at once
    async with served(metrics, settings.metrics_port, settings.metrics_host):
        if not await stop.unless_stopped(_start_engine(engine)):
            return 0
        try:
            return await _serve(settings, engine, stop, spec, metrics)
        except (EngineDead, EngineStalled) as error:
            log.error("Engine lost: %s", error, extra={"action": "engine_lost"})
            return EXIT_ENGINE_DEAD
        except LeaseLost as error:
            log.error("Lease lost: %s", error, extra={"action": "lease_lost"})
            return EXIT_LEASE_LOST
        finally:
            await engine.close()


async def _start_engine(engine: Engine) -> bool:
    try:
        await engine.start()
    except BaseException:
        await engine.close()
        raise
    return True


async def _serve(
    settings: Settings, engine: Engine, stop: StopSignals, spec: WorkerSpec, metrics: DrainMetrics
) -> int:
    async with AsyncExitStack() as stack:
        database = await stop.unless_stopped(_open_database(settings))
        if database is None:
            return 0
        stack.push_async_callback(database.close)
        doorbell = Doorbell(_required(settings.broker_url, "LORRY_BROKER_URL"))
        stack.callback(doorbell.close)

        info = engine.info
        base_model_id = await registry.declare_base(
            database, info.base_model, info.limits.max_model_len, info.base_revision
        )
        worker_id = await workers.register(
            database, _facts(engine, base_model_id), settings.lease_seconds
        )
        core = DrainCore(
            database=database,
            engine=engine,
            files=_adapter_files(settings, database),
            doorbell=doorbell,
            settings=settings,
            worker_id=worker_id,
            base_model_id=base_model_id,
            partitions=spec.partitions,
            adapters=spec.adapters,
            metrics=metrics,
        )
        consumer = DoorbellConsumer(
            _required(settings.broker_url, "LORRY_BROKER_URL"),
            _queues(spec, info.base_model, settings.partitions),
            asyncio.get_running_loop(),
            core.feeder.ring,
        )
        if consumer.queues:
            consumer.start()
            # it stops after the core: a core that stops lets a held doorbell go
            stack.push_async_callback(consumer.stop)
        publishing = asyncio.create_task(
            publish_rates(database, worker_id, base_model_id, metrics.rates), name="rates"
        )
        stack.callback(publishing.cancel)
        stop.call(core.stop)
        log.info(
            "Worker %d ready: %s on %s",
            worker_id,
            info.base_model,
            info.name,
            extra={"action": "worker_ready", "worker": worker_id},
        )
        await core.run()
    return 0


async def _open_database(settings: Settings) -> Database:
    """Open the pool, waiting for Postgres as long as it takes."""
    url = _required(settings.database_url, "LORRY_DATABASE_URL")
    while True:
        try:
            return await Database.open(url, max_size=POOL_SIZE)
        except Unavailable as error:
            log.warning("Waiting for Postgres: %s", error, extra={"action": "postgres_waits"})
            await asyncio.sleep(1)


def _facts(engine: Engine, base_model_id: int) -> WorkerFacts:
    info, limits = engine.info, engine.info.limits
    return WorkerFacts(
        base_model_id=base_model_id,
        hostname=socket.gethostname(),
        pid=os.getpid(),
        engine=info.name,
        engine_version=info.version,
        limits={
            "max_model_len": limits.max_model_len,
            "max_num_seqs": limits.max_num_seqs,
            "max_loras": limits.max_loras,
            "max_lora_rank": limits.max_lora_rank,
        },
    )


def _queues(spec: WorkerSpec, base_model: str, partitions: int) -> list[str]:
    """The queues of the partitions that this worker serves wholly.

    Of one that it serves in part it would swallow doorbells that were meant for others: a worker
    of a few adapters consumes none, and polls.
    """
    if spec.adapters is not None:
        return []
    served = range(partitions) if spec.partitions is None else spec.partitions
    return [queue_name(base_model, partition) for partition in served]


def _adapter_files(settings: Settings, database: Database) -> AdapterFiles:
    store = Store.open(_required(settings.store_url, "LORRY_STORE_URL"))
    return AdapterFiles(database, store, settings.cache_folder() / "adapters")


def _required(value: str | None, name: str) -> str:
    if value is None:
        raise UsageError(f"{name} is not set: a worker needs it (see docs/reference/settings.md)")
    return value


if __name__ == "__main__":
    sys.exit(main())
