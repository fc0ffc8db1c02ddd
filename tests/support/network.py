"""A network that tests can cut: a proxy between a client and a server's socket file."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class Proxy:
    """Passes bytes on; while it is cut, connections break and new ones are refused or hang."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._streams: set[asyncio.StreamWriter] = set()
        self._path = ""
        self.hanging = False

    async def start(self, path: str) -> None:
        self._path = path
        self._server = await asyncio.start_unix_server(self._serve, path)

    async def cut(self) -> None:
        """Refuse everybody, and break what is open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        Path(self._path).unlink(missing_ok=True)  # noqa: ASYNC240 - a local file
        for stream in self._streams.copy():
            stream.transport.abort()

    async def mend(self) -> None:
        await self.start(self._path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._target)
        self._streams |= {writer, back}
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        self._streams -= {writer, back}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                while self.hanging:
                    await asyncio.sleep(0.01)
                writer.write(data)
                await writer.drain()
        except OSError:
            return
        finally:
            writer.close()


@asynccontextmanager
async def proxied(url: str, folder: Path) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy before a Postgres on a socket file, and the address by which it is reached.

    Args:
        folder: short, for a socket's path has at most 107 bytes.
    """
    host = parse_qs(urlsplit(url).query)["host"][0]
    proxy = Proxy(f"{host}/.s.PGSQL.5432")
    await proxy.start(str(folder / ".s.PGSQL.5432"))
    try:
        yield proxy, url.replace(host, str(folder))
    finally:
        proxy.hanging = False
        await proxy.cut()
