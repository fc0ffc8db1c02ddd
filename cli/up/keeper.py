"""Keeps programs running: starts them again when they die, and knows when that is hopeless."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from cli.up.child import Child, Program
from cli.up.logs import Logs
from core.errors import LorryError, UsageError

#: A program that ran this long has not failed at once; its earlier failures are forgotten.
STEADY_SECONDS: Final = 60.0
#: Failures in a row after which we give up, before the stack was ever ready and later.
TRIES_AT_FIRST: Final = 2
TRIES_LATER: Final = 5
#: A worker whose engine died. Finding the job that kills it takes some deaths, by halving.
ENGINE_DIED: Final = 3
TRIES_OF_ENGINE: Final = 30
USAGE: Final = 2
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 10.0


class Keeper:
    """The running programs of a stack."""

    def __init__(self, logs: Logs, started: Callable[[Child], None]) -> None:
        """Begin with none.

        Args:
            logs: takes what programs say, and what becomes of them.
            started: called with every child that was started.
        """
        #: Whether the stack was ready once: from then on failures get more patience.
        self.ready = False
        self._logs = logs
        self._started = started
        self._children: dict[str, Child] = {}

    async def run_once(self, program: Program, stdin: bytes = b"") -> None:
        """Run a program to its end. Raises LorryError unless it exits with 0."""
        child = self._start(program, stdin)
        code = await child.wait()
        if code == 0:
            return
        self._raise(child, code, f"{program.name} failed (exit code {code})")

    async def keep(self, program: Program) -> None:
        """Run a program, again and again, until cancelled; the last child then still runs.

        Raises:
            UsageError: it exited with 2: it cannot run as asked for.
            LorryError: it keeps failing.
        """
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            began = clock()
            child = self._start(program)
            code = await child.wait()
            failures = failures + 1 if clock() - began < STEADY_SECONDS else 1
            if code == USAGE or failures >= self._tries(code):
                times = f" {failures} times in a row" if failures > 1 else ""
                self._raise(child, code, f"{program.name} failed{times} (exit code {code})")
            pause = self._pause(code, failures)
            self._logs.say(
                f"{program.name} ended (exit code {code}); starting it again in {pause:g} s"
            )
            await asyncio.sleep(pause)

    async def stop(self, order: Sequence[str], hurry: asyncio.Event) -> None:
        """Stop every program, those not named in `order` first.

        Args:
            order: names in the order of stopping.
            hurry: when set, nobody gets much time any more.
        """
        ranks = {name: rank for rank, name in enumerate(order)}
        children = sorted(self._children.values(), key=lambda c: ranks.get(c.program.name, -1))
        for child in children:
            if not child.ended:
                self._logs.say(f"stopping {child.program.name}")
            await child.stop(hurry)
            child.last_words()  # all that it said is in the logs now

    def _start(self, program: Program, stdin: bytes = b"") -> Child:
        child = Child(program, self._logs, stdin)
        self._children[program.name] = child
        self._started(child)
        return child

    def _tries(self, code: int) -> int:
        if code == ENGINE_DIED and self.ready:
            return TRIES_OF_ENGINE
        return TRIES_LATER if self.ready else TRIES_AT_FIRST

    def _pause(self, code: int, failures: int) -> float:
        if code == ENGINE_DIED:
            return FIRST_PAUSE_SECONDS
        return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (failures - 1))

    def _raise(self, child: Child, code: int, what: str) -> None:
        said = child.last_words()
        ours = [line.removeprefix("lorry: ") for line in said if line.startswith("lorry: ")]
        if code == USAGE and ours:
            raise UsageError(ours[-1])
        why = (ours or said or ["it said nothing"])[-1]
        log = self._logs.path(child.program.name)
        raise LorryError(f"{what}: {why} (all of its messages: {log})")
