"""A PostgreSQL and a Valkey for a benchmark: those that `lorry up` embeds, with its settings."""

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import redis

from cli.up.child import Program
from cli.up.servers import EmbeddedPostgres, EmbeddedValkey, SocketFolder

START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Servers:
    """Where the running servers are found."""

    postgres_url: str
    broker_url: str
    valkey_socket: Path

    def url(self, database: str) -> str:
        """The address of another database on the same server."""
        return self.postgres_url.replace("/lorry?", f"/{database}?")

    def valkey(self) -> "redis.Redis":
        """A client of Valkey."""
        return redis.Redis(unix_socket_path=str(self.valkey_socket))

    def execute(self, *statements: str, database: str = "lorry") -> None:
        """Run statements, each by itself, from synchronous code."""

        async def run() -> None:
            connection = await asyncpg.connect(self.url(database))
            try:
                for statement in statements:
                    await connection.execute(statement, timeout=3600)
            finally:
                await connection.close()

        asyncio.run(run())


@contextmanager
def running_servers(postgres_flags: Sequence[str] = ()) -> Iterator[Servers]:
    """Start both on fresh data; they end, and their data goes, with the block.

    Args:
        postgres_flags: further arguments of `postgres`, such as `-c shared_buffers=1GB`.
    """
    # short: a Unix socket's path has at most 107 bytes
    with tempfile.TemporaryDirectory(prefix="lorry-b-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        sockets = SocketFolder(folder / "s")
        sockets.path.mkdir()
        (sockets.path / "pg").mkdir(mode=0o700)
        postgres, valkey = EmbeddedPostgres(folder, sockets), EmbeddedValkey(sockets)
        for program, stdin in postgres.prepare():
            subprocess.run(
                program.argv,
                input=stdin,
                user=program.user,
                group=program.user,
                check=True,
                capture_output=True,
            )
        postgres.finish()
        servers = Servers(postgres.url, valkey.url, valkey.socket)
        with (
            _running(postgres.program(), lambda: servers.execute("SELECT 1"), postgres_flags),
            _running(valkey.program(), lambda: servers.valkey().ping()),
        ):
            yield servers


@contextmanager
def _running(
    program: Program, probe: Callable[[], object], flags: Sequence[str] = ()
) -> Iterator[None]:
    process = subprocess.Popen(
        [*program.argv, *flags],
        user=program.user,
        group=program.user,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_ready(probe, program.name)
        yield
    finally:
        process.send_signal(program.stop)
        process.wait()


def _wait_ready(probe: Callable[[], object], name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            probe()
            return
        except (OSError, asyncpg.PostgresError, redis.RedisError) as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} was not ready within {START_SECONDS:.0f} s") from error
            time.sleep(0.02)
