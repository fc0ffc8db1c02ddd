"""The worker process: one engine, one drain, one consumer of doorbells.

`lorry worker` starts it through `workers/launcher.py`, in a session of its own. The specification
comes as one JSON argument, so that no setting of ours is read twice.
"""

import asyncio
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Final, NamedTuple, TypeVar

import uvloop

from core.errors import LorryError, Unavailable, UsageError
from core.logs import configure_logging
from core.settings import Settings, load_settings
from db import registry, workers
from db.database import Database
from db.doorbell import Doorbell
from db.store import Store
from db.workers import WorkerFacts
from workers import options
from workers.adapter_files import AdapterFiles
from workers.celery_app import DoorbellConsumer
from workers.drain.core import DrainCore
from workers.drain.lease import EngineStalled, LeaseLost
from workers.drain.neighbours import Neighbours, keep_in_touch
from workers.engine.base_facts import base_facts
from workers.engine.protocol import Engine, EngineDead
from workers.engine.selection import EngineName, build_engine
from workers.launcher import WorkerSpec, watch_parent
from workers.metrics import DrainMetrics
from workers.metrics_server import served
from workers.rates import publish_rates
from workers.stop_signals import StopSignals

log = logging.getLogger("workers.main")  # __name__ is __main__ here
T = TypeVar("T")

EXIT_USAGE: Final = 2
EXIT_ENGINE_DEAD: Final = 3
EXIT_LEASE_LOST: Final = 4
#: How long an engine may take to close, and what hangs then to end: a worker that gave up must go.
CLOSE_SECONDS: Final = 30.0
LEAVE_SECONDS: Final = 10.0
#: Connections a worker holds at most: claims, records, heartbeat, aborts, rates.
POOL_SIZE: Final = 6
#: New objects before each generation of the garbage collector is looked through.
COLLECT_AT: Final = (50_000, 20, 20)


def main() -> int:
    """Run a worker to its end; returns the exit status."""
    spec = WorkerSpec.from_json(sys.argv[1])
    if spec.parent_fd is not None:
        watch_parent(spec.parent_fd)
    try:
        settings = load_settings(os.environ)
        configure_logging(settings.log_level)
        engine = build_engine(
            EngineName(spec.engine),
            spec.model,
            spec.flags,
            fold=spec.fold,
            fold_copy=settings.fold_copy,
        )
        return uvloop.run(_run(settings, engine, spec))
    except UsageError as error:
        print(f"lorry: {error.message}", file=sys.stderr)
        return EXIT_USAGE
    except LorryError as error:
        print(f"lorry: {error.message}", file=sys.stderr)
        return 1


async def _run(settings: Settings, engine: Engine, spec: WorkerSpec) -> int:
    """`run_worker`, and a certain end: a thread may hang in a store or an engine for ever, and
    Python would wait for it."""
    status = 1
    try:
        status = await run_worker(settings, engine, spec)
        return status
    finally:
        end = threading.Timer(LEAVE_SECONDS, os._exit, (status,))
        end.daemon = True
        end.start()


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
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await engine.close()
            except TimeoutError:  # the launcher kills what is left of it
                log.error("The engine does not close", extra={"action": "close_failed"})


async def _start_engine(engine: Engine) -> bool:
    try:
        await engine.start()
    except BaseException:
        await engine.close()
        raise
    calm_collector()
    return True


def calm_collector() -> None:
    """Keep Python's garbage collector off what lives as long as the engine.

    It would walk through all of it again and again while jobs come and go by the thousand, which
    leave no cycles behind. Measured: a tenth to a fifth of the drain's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AT)


class _Place(NamedTuple):
    """What a worker is told when it enters: its base, its adapters' versions, its own id."""

    base_model_id: int
    pinned: list[int]
    preload: list[int]
    worker_id: int


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
        facts = await asyncio.to_thread(
            base_facts, spec.model, info.base_model, info.limits.max_lora_rank or None
        )

        async def enter() -> _Place:
            base_model_id = await registry.declare_base(
                database, info.base_model, info.limits.max_model_len, info.base_revision, facts
            )
            pinned = await options.pinned(database, base_model_id, spec, info.limits.max_loras)
            preload = await options.named(database, base_model_id, "--preload", spec.preload)
            row = _facts(engine, base_model_id)
            worker_id = await workers.register(database, row, settings.lease_seconds)
            return _Place(base_model_id, pinned, preload, worker_id)

        place = await stop.unless_stopped(_patiently(enter))
        if place is None:
            return 0
        base_model_id, pinned, preload, worker_id = place
        neighbours = Neighbours()
        core = DrainCore(
            database=database,
            engine=engine,
            files=_adapter_files(settings, database, engine),
            doorbell=doorbell,
            settings=settings,
            worker_id=worker_id,
            base_model_id=base_model_id,
            partitions=spec.partitions,
            adapters=spec.adapters,
            pinned=pinned,
            preload=preload,
            neighbours=neighbours,
            metrics=metrics,
            fold=spec.fold,
        )
        consumer = DoorbellConsumer(
            _required(settings.broker_url, "LORRY_BROKER_URL"),
            options.queues(spec, info.base_model, settings.partitions),
            asyncio.get_running_loop(),
            core.feeder.ring,
        )
        if consumer.queues:
            consumer.start()
            # it stops after the core: a core that stops lets a held doorbell go
            stack.push_async_callback(consumer.stop)
        publishing = asyncio.create_task(
            publish_rates(
                database,
                worker_id,
                base_model_id,
                metrics.rates,
                resident=lambda: core.slots.resident,
            ),
            name="rates",
        )
        stack.callback(publishing.cancel)
        telling = asyncio.create_task(
            keep_in_touch(
                database,
                worker_id,
                base_model_id,
                neighbours,
                resident=lambda: core.slots.resident,
                partitions=spec.partitions,
                dedicated_from=settings.partitions,
            ),
            name="neighbours",
        )
        stack.callback(telling.cancel)
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
    url = _required(settings.database_url, "LORRY_DATABASE_URL")
    return await _patiently(lambda: Database.open(url, max_size=POOL_SIZE))


async def _patiently(step: Callable[[], Awaitable[T]]) -> T:
    """Take a step of the start, waiting for Postgres as long as it takes.

    The engine has taken minutes to start: an outage must not cost them again.
    """
    while True:
        try:
            return await step()
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


def _adapter_files(settings: Settings, database: Database, engine: Engine) -> AdapterFiles:
    store = Store.open(_required(settings.store_url, "LORRY_STORE_URL"))
    limits = engine.info.limits
    return AdapterFiles(
        database,
        store,
        settings.cache_folder() / "adapters",
        cache_bytes=settings.adapter_cache_bytes,
        # twice: the engine's order of least recent use may differ a little from ours
        held=2 * (limits.max_cpu_loras + limits.max_loras),
    )


def _required(value: str | None, name: str) -> str:
    if value is None:
        raise UsageError(f"{name} is not set: a worker needs it (see docs/reference/settings.md)")
    return value


if __name__ == "__main__":
    sys.exit(main())
