"""`lorry worker` as a thin parent: the worker runs in a session of its own, and neither outlives
the other.

vLLM's engine process handles SIGINT by itself and does not watch its parent. So signals go to the
worker's pid only, and whatever is left of its session is killed once the worker is gone. Nothing
here imports an engine, Celery or the database.
"""

import ctypes
import json
import os
import pwd
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Final, Self

import psutil

from workers.engine.selection import EngineName

#: How the worker process itself is started; the launcher appends the specification.
WORKER_COMMAND: Final = (sys.executable, "-m", "workers.main")
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
#: Longest search for processes of a session that is being killed: killed ones may be slow to go.
_KILL_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What one worker process is to be; it travels to it as JSON.

    Args:
        model: a local folder or a model name, as `vllm serve` takes it.
        engine: which engine holds it.
        flags: the engine's own flags, verbatim and in order.
        name: how the worker is listed; empty for one made from host and pid.
        partitions: the only partitions to serve; None for all.
        adapters: the only adapters to serve, by name; None for all.
        parent_fd: read end of the launcher's pipe, for `watch_parent`; None without a launcher.
    """

    model: str
    engine: EngineName = EngineName.VLLM
    flags: tuple[str, ...] = ()
    name: str = ""
    partitions: tuple[int, ...] | None = None
    adapters: tuple[str, ...] | None = None
    parent_fd: int | None = None

    def to_json(self, parent_fd: int | None = None) -> str:
        """The specification as the worker process takes it on its command line."""
        return json.dumps({**asdict(self), "parent_fd": parent_fd})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError or TypeError for anything else."""
        fields: dict[str, Any] = json.loads(text)
        for name in ("flags", "partitions", "adapters"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        return cls(**{**fields, "engine": EngineName(fields["engine"])})


def launch(spec: WorkerSpec, command: Sequence[str] = WORKER_COMMAND) -> int:
    """Run a worker process until it ends, forwarding SIGTERM, and SIGINT as SIGTERM, to it.

    Must run in the main thread. Blocking.

    Args:
        spec: what the worker is to be.
        command: the worker's program, to which the specification is appended as JSON.

    Returns:
        The worker's exit code; 128 + n where signal n ended it, but 0 for the SIGTERM that was
        forwarded (before the worker could handle it, it had nothing to finish).
    """
    read_end, write_end = os.pipe()
    try:
        code = run_session(
            [*command, spec.to_json(read_end)],
            forward={signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGTERM},
            pass_fds=(read_end,),
        )
    finally:
        os.close(read_end)
        os.close(write_end)
    return code


def run_session(
    argv: Sequence[str],
    *,
    forward: dict[signal.Signals, signal.Signals],
    pass_fds: Sequence[int] = (),
    user: str | None = None,
    started: Callable[[int], None] | None = None,
) -> int:
    """Run a child in a session of its own and leave nothing of what it started behind.

    Args:
        argv: the child's command line.
        forward: which signal to send to the child's pid for a signal received, each time.
        pass_fds: descriptors that the child inherits.
        user: the system user to run the child as (only root may); None for our own.
        started: called with the child's pid.

    Returns:
        The exit code as `launch` describes it.
    """
    target = 0
    early: list[signal.Signals] = []
    sent: set[signal.Signals] = set()

    def pass_on(number: int, _frame: FrameType | None) -> None:
        meant = forward[signal.Signals(number)]
        if target:
            sent.add(meant)
            os.kill(target, meant)
        else:
            early.append(meant)

    for number in forward:
        signal.signal(number, pass_on)
    _adopt_orphans()
    identity = pwd.getpwnam(user) if user else None
    child = subprocess.Popen(
        argv,
        start_new_session=True,
        pass_fds=pass_fds,
        user=identity.pw_uid if identity else None,
        group=identity.pw_gid if identity else None,
        extra_groups=[] if identity else None,
        preexec_fn=_death_with_parent(),  # safe: no thread runs here yet
    )
    target = child.pid
    for meant in early:
        sent.add(meant)
        os.kill(target, meant)
    if started is not None:
        started(child.pid)
    # Not reaped yet, the dead child keeps its pid: nobody else can have a session of that number.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    kill_all(child.pid)
    target = 0
    code = child.wait()
    _reap_orphans()
    if code >= 0:
        return code
    return 0 if -code == signal.SIGTERM and signal.SIGTERM in sent else 128 - code


def kill_all(session: int) -> None:
    """SIGKILL our descendants, and every process of a session, until none is alive.

    On Linux the descendants are all there is; elsewhere orphans are known by their session only.
    Blocking, at most a few seconds.
    """
    deadline = time.monotonic() + _KILL_SECONDS
    while members := _living(session):
        for member in members:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)  # a killed process may have forked just before


def _living(session: int) -> list[psutil.Process]:
    ours = set(psutil.Process().children(recursive=True))
    living = []
    for process in psutil.process_iter():
        try:
            member = process in ours or os.getsid(process.pid) == session
            # A zombie has nothing left to kill, and may wait for its parent for ever.
            if member and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return living


def _adopt_orphans() -> None:
    """Become the parent of descendants whose parent dies, instead of process 1; Linux only."""
    if prctl := _prctl():
        prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _reap_orphans() -> None:
    """Leave no zombie either: process 1 of a container may never reap."""
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(0.01)


def watch_parent(fd: int | None) -> None:
    """Kill our own process group when the launcher dies, however it dies.

    Starts a daemon thread and returns. The process must lead its own group.

    Args:
        fd: read end of a pipe whose only write end the launcher holds and never writes to; None
            where there is no launcher, and nothing is done.
    """
    if fd is None:
        return

    def wait() -> None:
        while os.read(fd, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="watch-parent", daemon=True).start()


def _death_with_parent() -> Callable[[], None] | None:
    """What the child does before it becomes its program, so that it dies with its parent.

    A second line: it covers the time until the child watches its pipe, on Linux only.
    """
    prctl = _prctl()
    if prctl is None:
        return None

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return die_with_parent


def _prctl() -> Callable[[int, int], int] | None:
    """Linux's `prctl`; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl: Callable[[int, int], int] = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return prctl


def main() -> int:
    """Run the worker that the first argument describes as JSON."""
    return launch(WorkerSpec.from_json(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
