"""Run a child such that nothing that it started outlives it, and that it does not outlive us.

A session of its own keeps the terminal's signals from it. On Linux its orphans come to us instead
of to process 1, so that whatever it left behind is found, killed and reaped.
"""

import ctypes
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final

import psutil

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
#: Longest search for processes that are being killed: some are slow to go.
_KILL_SECONDS: Final = 5.0


def run_child(
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
        The child's exit code; 128 + n where signal n ended it, but 0 for a SIGTERM of ours: a child
        that could not handle it yet had nothing to finish.
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


def _death_with_parent() -> Callable[[], None] | None:
    """What the child does before it becomes its program, so that it dies with its parent.

    On Linux only. A child that has others to take along watches a pipe instead, and says so by
    `outlive_parent`; this covers the time until then.
    """
    prctl = _prctl()
    if prctl is None:
        return None

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return die_with_parent


def outlive_parent() -> None:
    """Undo the kernel's kill at the parent's death, for a child that watches for it by itself.

    The kernel kills the child alone, and so fast that it could take nothing along.
    """
    if prctl := _prctl():
        prctl(_PR_SET_PDEATHSIG, 0)


def _prctl() -> Callable[[int, int], int] | None:
    """Linux's `prctl`; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl: Callable[[int, int], int] = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return prctl
