"""One tethered child process, as the supervisor's event loop sees it."""

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from cli.up import tether
from cli.up.logs import Logs

#: After a request to hurry, the time before a child is killed.
HURRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Program:
    """What to run.

    Args:
        name: who it is in the logs.
        argv: its command line.
        environ: added to our own environment.
        stop: the signal that asks it to stop in order.
        kill: the signal that ends it at once.
        stop_seconds: how long an orderly stop may take.
        user: the system user to run it as; None for our own.
    """

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    stop: signal.Signals = signal.SIGTERM
    kill: signal.Signals = signal.SIGKILL
    stop_seconds: float = 10.0
    user: str | None = None


class Child:
    """A running program. Starting one is synchronous, so that none is lost to a cancellation."""

    def __init__(self, program: Program, logs: Logs, stdin: bytes = b"") -> None:
        """Start the program.

        Args:
            program: what to run.
            logs: takes what it says.
            stdin: all that it can read.
        """
        self.program = program
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        read_end, self._pipe = os.pipe()
        try:
            self._process = subprocess.Popen(
                tether.command(
                    program.argv,
                    read_end,
                    stop=program.stop,
                    kill=program.kill,
                    user=program.user,
                ),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **program.environ},
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(read_end,),
            )
        finally:
            os.close(read_end)
        if self._process.stdin is not None:
            with self._process.stdin as pipe:
                pipe.write(stdin)
        assert self._process.stdout is not None
        self._follower = logs.follow(program.name, self._process.stdout)
        threading.Thread(target=self._wait, args=(loop,), daemon=True).start()

    @property
    def pid(self) -> int:
        """The tether's pid: it ends after the program and all that belongs to it."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the program has ended."""
        return self._ended.done()

    async def wait(self) -> int:
        """The program's exit code, once it has ended."""
        return await asyncio.shield(self._ended)

    def last_words(self) -> list[str]:
        """What an ended program said last."""
        return self._follower.last_words()

    async def stop(self, hurry: asyncio.Event) -> None:
        """Stop the program and wait until it has ended; kill it when its time is over.

        Args:
            hurry: when set, the program is asked again and gets `HURRY_SECONDS` from then.
        """
        try:
            if await self._ask(self.program.stop_seconds, hurry):
                return
            if hurry.is_set() and await self._ask(HURRY_SECONDS, None):
                return
        finally:
            self.kill()
        await self.wait()

    def kill(self) -> None:
        """End the program at once. Idempotent."""
        if not self.ended:
            self._process.send_signal(signal.SIGQUIT)

    async def _ask(self, seconds: float, hurry: asyncio.Event | None) -> bool:
        """Ask the program to stop; whether it did within the time and before the hurry."""
        if self.ended:
            return True
        self._process.send_signal(signal.SIGTERM)
        waits: list[asyncio.Task[object]] = [
            asyncio.create_task(self.wait()),
            asyncio.create_task((hurry or asyncio.Event()).wait()),
        ]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self.ended

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        code = self._process.wait()
        os.close(self._pipe)
        try:
            loop.call_soon_threadsafe(self._ended.set_result, code)
        except RuntimeError:
            pass  # the event loop is closed: nobody waits any more
