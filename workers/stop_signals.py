"""SIGTERM and SIGINT for an asyncio process, handled from before its first slow step."""

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


class StopSignals:
    """Remembers that a stop was asked for, and passes every signal on to one handler.

    Make it on the running event loop of the main thread.
    """

    def __init__(self) -> None:
        self._stopped = asyncio.Event()
        self._handler: Callable[[], None] | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def call(self, handler: Callable[[], None]) -> None:
        """Call `handler` at every signal from now on, and at once if one came before."""
        self._handler = handler
        if self._stopped.is_set():
            handler()

    async def unless_stopped(self, step: Coroutine[Any, Any, T]) -> T | None:
        """Run a step of the start; cancel it, and return None, if a signal comes first."""
        task = asyncio.create_task(step)
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return None
        finally:
            stopped.cancel()

    async def wait(self) -> None:
        """Return once a signal has come."""
        await self._stopped.wait()

    def _on_signal(self) -> None:
        log.info("Stopping", extra={"action": "stop"})
        self._stopped.set()
        if self._handler is not None:
            self._handler()
