"""The runtime file of a data folder: which stack runs on it, where, and with which processes."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import psutil

from core.errors import LorryError, UsageError

FILE_NAME: Final = "stack.json"
#: Longest wait for the processes of a stack that was killed; their tethers give up before that.
_FORMER_SECONDS: Final = 20.0
#: Resolution of a process's start time, in seconds: with the pid it names a process for good.
_SAME_START: Final = 0.05


@dataclass(slots=True)
class Stack:
    """A running stack.

    Args:
        url: where the API listens.
        database_url, broker_url, store_url: as the services get them.
        sockets: the embedded servers' folder; empty without any.
        processes: pid and start time (seconds since the epoch) by name, `lorry` being `lorry up`.
    """

    url: str
    database_url: str
    broker_url: str
    store_url: str
    sockets: str = ""
    processes: dict[str, tuple[int, float]] = field(default_factory=dict)

    def note(self, name: str, pid: int) -> None:
        """Remember a process that was just started; one that is gone already is left out."""
        try:
            self.processes[name] = (pid, psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            self.processes.pop(name, None)

    def save(self, data_dir: Path) -> None:
        """Write the runtime file, whole or not at all. Only we may read it: it names servers."""
        fresh = data_dir / f".{FILE_NAME}.new"
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(fresh, data_dir / FILE_NAME)


@contextmanager
def hold(data_dir: Path) -> Iterator[None]:
    """Own a data folder: nobody else's stack runs on it, and a killed one's is out of the way.

    Raises:
        UsageError: another `lorry up` holds the folder, or it cannot be written.
        LorryError: processes of a killed stack do not end.
    """
    from fasteners import InterProcessLock

    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = InterProcessLock(data_dir / "lock")
        ours = lock.acquire(blocking=False)
    except OSError as error:
        raise UsageError(f"--data-dir {data_dir}: {error.strerror}") from None
    if not ours:
        raise UsageError(
            f"another `lorry up` runs on {data_dir}: stop it, or give another --data-dir"
        )
    try:
        _clear_former(data_dir)
        yield
    finally:
        (data_dir / FILE_NAME).unlink(missing_ok=True)
        lock.release()


def running(data_dir: Path) -> Stack:
    """The stack that runs on a data folder.

    Raises:
        UsageError: none does.
    """
    stack = _read(data_dir)
    if stack is None:
        raise UsageError(
            f"no database: no `lorry up` runs on {data_dir}. Start one, name its --data-dir, "
            "or set LORRY_DATABASE_URL"
        )
    if "lorry" not in _alive(stack):
        raise UsageError(
            f"no database: the `lorry up` on {data_dir} has died. Start it again (it finds its "
            "data), or set LORRY_DATABASE_URL"
        )
    return stack


def _read(data_dir: Path) -> Stack | None:
    try:
        fields = json.loads((data_dir / FILE_NAME).read_text())
        fields["processes"] = {name: tuple(who) for name, who in fields["processes"].items()}
        return Stack(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _alive(stack: Stack) -> dict[str, int]:
    """Name and pid of the stack's processes that live."""
    alive = {}
    for name, (pid, started) in stack.processes.items():
        try:
            process = psutil.Process(pid)
            same = abs(process.create_time() - started) < _SAME_START
            if same and process.status() != psutil.STATUS_ZOMBIE:
                alive[name] = pid
        except psutil.NoSuchProcess:
            continue
    return alive


def _clear_former(data_dir: Path) -> None:
    """Wait until nothing is left of a stack that was killed. Blocking."""
    former = _read(data_dir)
    if former is None:
        return
    deadline = time.monotonic() + _FORMER_SECONDS
    while alive := _alive(former):
        if time.monotonic() > deadline:
            who = ", ".join(f"{name} (pid {pid})" for name, pid in alive.items())
            raise LorryError(f"processes of the former stack on {data_dir} do not end: {who}")
        time.sleep(0.05)
    if former.sockets:
        shutil.rmtree(former.sockets, ignore_errors=True)
