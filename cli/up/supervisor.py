"""`lorry up`: starts the parts in order, keeps them running, and stops them in order."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cli.up import serving as served
from cli.up.child import Child, Program
from cli.up.keeper import Keeper
from cli.up.logs import Logs
from cli.up.options import UpOptions, base_url, claim_port, refuse_open_door
from cli.up.readiness import ready_line, wait_ready
from cli.up.servers import EmbeddedPostgres, EmbeddedValkey, SocketFolder
from cli.up.stack import Stack, hold
from core.errors import LorryError, Unavailable
from core.settings import Settings

if TYPE_CHECKING:
    from db.database import Database

#: The order of stopping; whatever is not named here (a set-up program) goes first.
STOP_ORDER: Final = ("api", "worker", "steward", "valkey", "postgres")
#: Longest recovery of a database after a crash.
_DATABASE_SECONDS: Final = 120.0
#: What a worker may need beyond its grace period: releasing jobs, closing the engine.
_CLOSING_SECONDS: Final = 15.0
INTERRUPTED: Final = 130


def up(options: UpOptions, settings: Settings) -> int:
    """Run a stack until it is stopped. Blocking.

    Returns:
        0 after SIGTERM or SIGHUP, 130 after Ctrl-C.

    Raises:
        UsageError: the stack cannot run as asked for; nothing is left running.
        LorryError: a part failed for good; nothing is left running.
    """
    refuse_open_door(options.host, options.require_keys)
    serving = served.choose(options)
    with hold(options.data_dir):
        port = claim_port(options.host, options.port)
        logs = Logs(options.data_dir / "logs")
        try:
            return asyncio.run(Supervisor(options, settings, serving, port, logs).run())
        finally:
            logs.close()


class Supervisor:
    """One run of a stack."""

    def __init__(
        self, options: UpOptions, settings: Settings, serving: served.Serving, port: int, logs: Logs
    ) -> None:
        self._options = options
        self._settings = settings
        self._serving = serving
        self._port = port
        self._logs = logs
        self._keeper = Keeper(logs, self._note)
        self._hurry = asyncio.Event()
        self._asked = asyncio.Event()
        self._exit_code = 0
        self._sockets: SocketFolder | None = None
        self._stack = Stack(
            url=base_url(options.host, port),
            database_url=settings.database_url or "",
            broker_url=settings.broker_url or "",
            store_url=settings.store_url or str(options.data_dir / "store"),
        )
        self._stack.note("lorry", os.getpid())

    async def run(self) -> int:
        """Serve until asked to stop or unable to go on; then stop everything."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._serve())
        asked = asyncio.create_task(self._asked.wait())
        try:
            await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel()
            asked.cancel()
            (failure,) = await asyncio.gather(serving, return_exceptions=True)
            await self._keeper.stop(STOP_ORDER, self._hurry)
            if self._sockets is not None:
                self._sockets.remove()
        if isinstance(failure, BaseException) and not self._asked.is_set():
            raise _first(failure)
        self._logs.say("stopped")
        return self._exit_code

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            await self._start_database(group)
            self._start_broker(group)
            await self._start_model()
            await self._start_services(group)
            await wait_ready(self._stack.url)
            self._keeper.ready = True
            print(ready_line(self._stack.url, self._options, self._serving), flush=True)
            if self._options.require_keys:
                self._tell_about_keys()

    async def _start_database(self, group: asyncio.TaskGroup) -> None:
        from db.migrate import upgrade

        if not self._stack.database_url:
            self._logs.say("starting PostgreSQL")
            postgres = EmbeddedPostgres(self._options.data_dir, self._private_folder())
            self._stack.database_url = postgres.url
            steps = await asyncio.to_thread(postgres.prepare)
            for program, stdin in steps:
                await self._keeper.run_once(program, stdin)
            if steps:
                postgres.finish()
            group.create_task(self._keeper.keep(postgres.program()))
        async with self._database():
            pass
        await asyncio.to_thread(upgrade, self._stack.database_url)

    def _start_broker(self, group: asyncio.TaskGroup) -> None:
        if not self._stack.broker_url:
            valkey = EmbeddedValkey(self._private_folder())
            self._stack.broker_url = valkey.url
            group.create_task(self._keeper.keep(valkey.program()))

    async def _start_model(self) -> None:
        if self._serving.makes_base:
            argv = (sys.executable, "-m", "cli.up.serving", str(self._options.cache_dir))
            await self._keeper.run_once(Program("demo", argv))
        async with self._database() as database:
            await served.register(
                database, self._stack.store_url, self._settings.partitions, self._serving
            )

    async def _start_services(self, group: asyncio.TaskGroup) -> None:
        options, serving = self._options, self._serving
        listen = ("--host", options.host, "--port", str(self._port))
        fold = "auto" if options.fold else "off"
        own = ("--engine", options.engine, "--fold", fold)
        worker = ("worker", serving.model, *own, *serving.flags)
        patience = self._settings.grace_seconds + _CLOSING_SECONDS
        for program in (
            self._program("api", "api", *listen, "--ready-model", serving.name),
            self._program("steward", "steward"),
            self._program("worker", *worker, stop_seconds=patience),
        ):
            self._logs.say(f"starting {program.name}")
            group.create_task(self._keeper.keep(program))

    def _program(self, name: str, *arguments: str, stop_seconds: float = 10.0) -> Program:
        argv = (sys.executable, "-m", "cli.main", *arguments)
        return Program(name, argv, self._environ(), stop_seconds=stop_seconds)

    def _environ(self) -> Mapping[str, str]:
        return {
            "LORRY_DATABASE_URL": self._stack.database_url,
            "LORRY_BROKER_URL": self._stack.broker_url,
            "LORRY_STORE_URL": self._stack.store_url,
            "LORRY_CACHE_DIR": str(self._options.cache_dir),
            "LORRY_REQUIRE_KEYS": "true" if self._options.require_keys else "false",
        }

    @asynccontextmanager
    async def _database(self) -> "AsyncIterator[Database]":
        """A connection to the database, once it takes any."""
        from db.database import Database

        deadline = asyncio.get_running_loop().time() + _DATABASE_SECONDS
        external = self._settings.database_url is not None
        while True:
            try:
                database = await Database.open(self._stack.database_url, max_size=1)
                break
            except Unavailable as error:
                if external or asyncio.get_running_loop().time() > deadline:
                    raise LorryError(f"LORRY_DATABASE_URL: {error.message}") from None
                await asyncio.sleep(0.03)
        try:
            yield database
        finally:
            await database.close()

    def _private_folder(self) -> SocketFolder:
        if self._sockets is None:
            self._sockets = SocketFolder.make()
            self._stack.sockets = str(self._sockets.path)
            self._stack.save(self._options.data_dir)
        return self._sockets

    def _note(self, child: Child) -> None:
        self._stack.note(child.program.name, child.pid)
        self._stack.save(self._options.data_dir)

    def _tell_about_keys(self) -> None:
        where = "" if self._settings.database_url else f" --data-dir {self._options.data_dir}"
        self._logs.say(
            f"requests need a key; make one with: lorry keys create --tenant "
            f"{served.DEFAULT_TENANT}{where}"
        )

    def _on_signal(self, number: int) -> None:
        if self._asked.is_set():
            self._logs.say("stopping at once")
            self._hurry.set()
            return
        self._logs.say("stopping; once more to stop at once")
        self._exit_code = INTERRUPTED if number == signal.SIGINT else 0
        self._asked.set()


def _first(failure: BaseException) -> BaseException:
    """The error of a task group that says most: the first that is ours, else the first."""
    while isinstance(failure, BaseExceptionGroup):
        ours = (error for error in failure.exceptions if isinstance(error, LorryError))
        failure = next(ours, failure.exceptions[0])
    return failure


def default_data_dir() -> Path:
    """Where a stack keeps its data unless told otherwise.

    As root not below /root: PostgreSQL runs as another user there, and that folder is closed.
    """
    import platformdirs

    if os.geteuid() == 0:
        return Path("/var/lib/lorry")
    return platformdirs.user_data_path("lorry")
