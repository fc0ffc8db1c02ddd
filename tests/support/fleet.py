"""Workers that are started again whenever they end, as a supervisor would."""

import signal
from collections import Counter
from typing import Final

import psutil

from tests.support.deployment import Deployment, Process
from tests.support.jobs import BASE
from tests.support.processes import Tree

#: What a worker that is gone for good reasons may end with: stopped, engine dead, lease lost.
EXPECTED_EXITS: Final = {0, 3, 4}


class Fleet:
    """So many workers on the simulated engine; `tend` starts those again that have ended."""

    def __init__(self, deployment: Deployment, size: int, *flags: str) -> None:
        self._deployment = deployment
        self._flags = flags
        self._killed: set[int] = set()
        #: how often workers ended by themselves, by exit status
        self.exits: Counter[int] = Counter()
        self.members = [self._start() for _ in range(size)]

    def _start(self) -> Process:
        return self._deployment.start("worker", BASE, "--engine", "simulated", *self._flags)

    def tend(self) -> None:
        """Start again what has ended."""
        for index, member in enumerate(self.members):
            status = member.popen.poll()
            if status is None:
                continue
            if member.popen.pid not in self._killed:
                self.exits[status] += 1
                assert status in EXPECTED_EXITS, member.log()
            self.members[index] = self._start()

    def is_ready(self, index: int) -> bool:
        """Whether a member drains."""
        return "ready:" in self.members[index].log()

    def kill(self, index: int, *, launcher: bool) -> None:
        """SIGKILL a worker's process, or its launcher's; nothing of either may be left."""
        member = self.members[index]
        tree = Tree(member.popen.pid, member.mark)
        self._killed.add(member.popen.pid)
        target = None if launcher else worker_process(member)
        if target is None:
            member.popen.kill()
        else:
            target.send_signal(signal.SIGKILL)
        member.popen.wait(20)
        tree.assert_gone(10)

    @property
    def ends(self) -> int:
        """How often workers ended by themselves."""
        return self.exits.total()


def worker_process(member: Process) -> psutil.Process | None:
    """The worker below its launcher; None while it does not run."""
    try:
        children = psutil.Process(member.popen.pid).children()
    except psutil.NoSuchProcess:
        return None
    return children[0] if children else None
