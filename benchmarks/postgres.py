"""An embedded PostgreSQL for a benchmark, as `lorry up` starts it."""

import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg

from cli.up.servers import EmbeddedPostgres, SocketFolder
from db.migrate import upgrade


@contextmanager
def postgres_server(folder: str) -> Iterator[str]:
    """A migrated PostgreSQL on fresh data under `folder`; yields its address."""
    Path(folder).chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="lorry-s-") as sockets:
        Path(sockets).chmod(0o755)
        (Path(sockets) / "pg").mkdir(mode=0o700)
        server = EmbeddedPostgres(Path(folder), SocketFolder(Path(sockets)))
        for program, stdin in server.prepare():
            subprocess.run(program.argv, input=stdin, user=program.user, group=program.user,
                           check=True, capture_output=True)  # fmt: skip
        server.finish()
        program = server.program()
        process = subprocess.Popen(program.argv, user=program.user, group=program.user,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            in_thread(wait_for, server.url)
            in_thread(upgrade, server.url)
            yield server.url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def wait_for(url: str) -> None:
    """Return once the server takes connections; blocking, at most a minute."""
    import asyncio

    async def connect() -> None:
        await (await asyncpg.connect(url)).close()

    deadline = time.monotonic() + 60
    while True:
        try:
            asyncio.run(connect())
        except (OSError, asyncpg.PostgresError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def in_thread(function, url: str) -> None:  # type: ignore[no-untyped-def]
    """Run something that has an event loop of its own, from a thread that has another."""
    thread = threading.Thread(target=function, args=(url,))
    thread.start()
    thread.join()
