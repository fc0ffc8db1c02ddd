"""A real PostgreSQL and a real Valkey for tests, from the packages that `lorry up` embeds."""

import asyncio
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import asyncpg
import redis

from cli.up.child import Program
from cli.up.servers import EmbeddedPostgres, EmbeddedValkey, SocketFolder

START_SECONDS = 60.0

#: Plans depend on it, so it is the same on every machine.
MEMORY_BYTES = 8 * 2**30


class _Server:
    """A foreground program that tests start, kill and start again."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def program(self) -> Program:
        raise AssertionError("each server names its program")

    def is_ready(self) -> bool:
        raise AssertionError("each server knows when it is ready")

    def start(self) -> None:
        program = self.program()
        self.process = subprocess.Popen(
            program.argv,
            user=program.user,
            group=program.user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self.is_ready, START_SECONDS, program.name)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None


class PostgresServer(_Server):
    """PostgreSQL on a data folder of its own; durable enough for kill -9, fast enough for tests."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir()
        (folder / "s").mkdir()
        (folder / "s" / "pg").mkdir(mode=0o700)
        self._embedded = EmbeddedPostgres(folder, SocketFolder(folder / "s"))

    def program(self) -> Program:
        return self._embedded.program(MEMORY_BYTES)

    def __enter__(self) -> Self:
        for program, stdin in self._embedded.prepare():
            subprocess.run(
                program.argv,
                input=stdin,
                user=program.user,
                group=program.user,
                check=True,
                capture_output=True,
            )
        self._embedded.finish()
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(signal.SIGINT)

    def is_ready(self) -> bool:
        try:
            self.execute("SELECT 1", "postgres")
        except (OSError, asyncpg.PostgresError):
            return False
        return True

    def url(self, name: str) -> str:
        return self._embedded.url.replace("/lorry?", f"/{name}?")

    def execute(self, statement: str, database: str = "postgres") -> None:
        async def run() -> None:
            connection = await asyncpg.connect(self.url(database))
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        in_thread(run)

    def create_database(self, name: str, template: str = "template0") -> None:
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')

    def drop_database(self, name: str) -> None:
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


class ValkeyServer(_Server):
    """Valkey on a Unix socket."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir()
        self._embedded = EmbeddedValkey(SocketFolder(folder))
        self.url = self._embedded.url

    def program(self) -> Program:
        return self._embedded.program()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _client(self) -> "redis.Redis":
        return redis.Redis(unix_socket_path=str(self._embedded.socket))

    def is_ready(self) -> bool:
        try:
            return bool(self._client().ping())
        except redis.RedisError:
            return False

    def flush(self) -> None:
        self._client().flushall()


def in_thread(make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine to its end from synchronous code, whatever loop this thread has."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(make())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until a condition of another process holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.02)
