"""A receiver of webhooks on loopback: a real HTTP server that keeps what it got."""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self

from standardwebhooks import Webhook

from tests.support.waiting import eventually


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.time)

    @property
    def message_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    def verify(self, secret: str) -> Any:
        """Verify by the reference library; raises where the signature does not hold."""
        return Webhook(secret).verify(self.body, self.headers)


@dataclass
class Answer:
    """What a receiver answers.

    Args:
        raw: sent as it is in place of an answer.
        drop: close the connection without any answer.
    """

    status: int = 200
    body: bytes = b"ok"
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    raw: bytes | None = None
    drop: bool = False


class Receiver:
    """Answers as `answer` says, or as `decide` says of each request."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.decide: Callable[[Received], Answer] | None = None
        self.received: list[Received] = []
        self.connections = 0
        self.port = 0
        self.scheme = "http"
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self, path: str = "/hook", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    @classmethod
    @asynccontextmanager
    async def listening(
        cls, context: ssl.SSLContext | None = None, port: int = 0
    ) -> AsyncIterator[Self]:
        receiver = cls()
        server = await asyncio.start_server(receiver._serve, "127.0.0.1", port, ssl=context)
        receiver.port = server.sockets[0].getsockname()[1]
        receiver.scheme = "http" if context is None else "https"
        try:
            yield receiver
        finally:
            server.close()
            for task in receiver._tasks:
                task.cancel()
            await asyncio.gather(*receiver._tasks, return_exceptions=True)

    async def got(self, count: int, seconds: float = 30) -> list[Received]:
        """What was received, once it is so many."""

        async def enough() -> bool:
            return len(self.received) >= count

        await eventually(enough, f"{count} deliveries, not {len(self.received)}", seconds)
        return self.received

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        request = Received(head[0].split()[1], headers, body)
        self.received.append(request)
        answer = self.answer if self.decide is None else self.decide(request)
        await asyncio.sleep(answer.seconds)
        if answer.drop:
            return False
        if answer.raw is not None:
            writer.write(answer.raw)
            await writer.drain()
            await reader.read()  # until the sender has had enough
            return False
        lines = {"content-length": str(len(answer.body)), **answer.headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"HTTP/1.1 {answer.status} x\r\n{text}\r\n".encode() + answer.body)
        await writer.drain()
        return True
