"""Driver processes of a race: each waits for the word, drains its share, and says how far it is.

A driver prints `ready`, waits for a line on its standard input, and from then on prints
`<jobs done> <time>` whenever a commit has finished more jobs. The time is CLOCK_MONOTONIC, which
is one clock for every process of a machine. It ends when its standard input ends.
"""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

#: How often a driver looks whether its count has risen.
REPORT_SECONDS = 0.01
#: A race in which nothing is finished for so long has failed.
SILENCE_SECONDS = 60.0


class Driver:
    """What runs inside a driver process: call `start` once ready, and `count` when asked."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._ended = threading.Event()

    async def wait_for_word(self) -> None:
        """Say that we are ready, and return when the race begins."""
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        threading.Thread(target=self._wait_for_end, daemon=True).start()

    def _wait_for_end(self) -> None:
        sys.stdin.read()
        self._ended.set()

    async def report(self) -> None:
        """Report until standard input ends."""
        told = 0
        while not self._ended.is_set():
            done = self._count()
            if done != told:
                told = done
                print(done, time.monotonic(), flush=True)
            await asyncio.sleep(REPORT_SECONDS)


def race(commands: Sequence[Sequence[str]], jobs: int) -> float:
    """Run drivers against one backlog.

    Args:
        commands: a driver each, as arguments of Python.
        jobs: how many there are to be done together.

    Returns:
        Seconds from the word to the last commit.
    """
    processes = [_start(command) for command in commands]
    try:
        for process in processes:
            if _line(process) != "ready":
                raise SystemExit(f"driver {process.args!r} did not become ready")
        progress = _Progress(jobs)
        for process in processes:
            threading.Thread(target=progress.follow, args=(process,), daemon=True).start()
        started = time.monotonic()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return progress.wait() - started
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            process.wait(30)


def _start(command: Sequence[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


class _Progress:
    """The drivers' counts, added up."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._done: dict[int, int] = {}
        self._last = 0.0
        self._changed = threading.Condition()

    def follow(self, process: "subprocess.Popen[str]") -> None:
        while line := _line(process):
            done, at = line.split()
            with self._changed:
                self._done[process.pid] = int(done)
                self._last = max(self._last, float(at))
                self._changed.notify()

    def wait(self) -> float:
        """The time of the commit that completed the work."""
        with self._changed:
            while sum(self._done.values()) < self._jobs:
                if not self._changed.wait(SILENCE_SECONDS):
                    raise SystemExit(f"stuck at {sum(self._done.values())} of {self._jobs} jobs")
            return self._last
