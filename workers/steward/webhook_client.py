"""The HTTP client of webhooks: it connects to checked addresses only, and does nothing by itself.

httpcore2 used directly (docs/decisions/0020-webhooks-over-httpcore.md): it knows no redirects, no
proxies, no environment, no cookies and no decompression, and lets us open its connections. Ours
resolves a name once, checks every address that it stands for, and connects to one of these; nothing
looks the name up a second time.
"""

import asyncio
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import httpcore2
from httpcore2 import AsyncNetworkBackend, AsyncNetworkStream

from core.webhook_addresses import Allowed, read_address
from core.webhook_retry import read_retry_after
from core.webhook_url import WebhookUrl

#: What of a response's body is kept, and what is read of it so that its connection can be used
#: again; a longer one is cut off.
KEPT_BYTES: Final = 2048
READ_BYTES: Final = 65_536
CONNECT_SECONDS: Final = 10.0
#: A body that takes longer than this after its status is left alone: the status is the answer.
BODY_SECONDS: Final = 5.0
#: Receivers close idle connections after a few seconds; a request on a closing one would fail.
IDLE_SECONDS: Final = 2.0
MOST_IDLE: Final = 64
#: Names looked up at once; a lookup that hangs holds a thread for up to half a minute.
MOST_LOOKUPS: Final = 256
#: Addresses of one name that are tried.
MOST_ADDRESSES: Final = 4

Resolve = Callable[[str, int], Awaitable[list[str]]]


class SendFailed(Exception):
    """There is no answer.

    Args:
        code: what the tenant may know.
        reason: what the log says beside it; it may name addresses.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class _Refused(httpcore2.ConnectError):
    """The host may not be reached, or has no address: its owner must not learn which."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. `body` is its beginning as text."""

    status: int
    body: str
    retry_after: float | None


class WebhookClient:
    """Posts to receivers. Opened and closed by the process that owns it."""

    def __init__(
        self,
        allowed: Allowed,
        answer_seconds: float,
        *,
        ssl_context: ssl.SSLContext | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        """Make a client; nothing connects yet.

        Args:
            allowed: networks that the operator opened.
            answer_seconds: longest wait for an answer.
            ssl_context: what certificates are checked with; by default the system's.
            resolve: the addresses of a name; by default the system's resolver.
        """
        self._answer_seconds = answer_seconds
        resolver = resolve or Resolver().addresses
        context = ssl_context or ssl.create_default_context()
        # http and https apart, since a connection is opened without knowing for which
        self._pools = {
            scheme: httpcore2.AsyncConnectionPool(
                ssl_context=context,
                max_connections=None,
                max_keepalive_connections=MOST_IDLE,
                keepalive_expiry=IDLE_SECONDS,
                retries=0,
                network_backend=_GuardedBackend(allowed, resolver, encrypted=scheme == "https"),
            )
            for scheme in ("http", "https")
        }

    async def post(self, url: WebhookUrl, headers: Mapping[str, str], body: bytes) -> Reply:
        """POST a body and return the answer, whatever its status.

        Raises:
            SendFailed: there was none, or the host may not be reached.
        """
        try:
            async with asyncio.timeout(CONNECT_SECONDS + self._answer_seconds):
                return await self._post(url, headers, body)
        except _Refused as error:
            raise SendFailed("address", str(error)) from None
        except (TimeoutError, httpcore2.TimeoutException) as error:
            raise SendFailed("timeout", repr(error)) from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            code = "tls" if _is_tls(error) else "connection"
            raise SendFailed(code, repr(error)) from None

    async def _post(self, url: WebhookUrl, headers: Mapping[str, str], body: bytes) -> Reply:
        sent = {
            "Host": url.host_header,
            "Content-Length": str(len(body)),
            "Accept": "*/*",
            **headers,
        }
        timeouts = {
            "connect": CONNECT_SECONDS,
            "read": self._answer_seconds,
            "write": self._answer_seconds,
            "pool": None,
        }
        request = self._pools[url.scheme].stream(
            "POST",
            httpcore2.URL(
                scheme=url.scheme.encode(),
                host=url.host.encode(),
                port=url.port,
                target=url.target.encode(),
            ),
            headers=[(name.encode(), value.encode()) for name, value in sent.items()],
            content=body,
            extensions={"timeout": timeouts},
        )
        async with request as response:
            kept = await _beginning(response.aiter_stream())
        given = {name.lower(): value for name, value in response.headers}
        retry_after = given.get(b"retry-after", b"").decode("latin-1") or None
        return Reply(
            status=response.status,
            body=kept.decode("utf-8", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}"),
            retry_after=read_retry_after(retry_after, datetime.now(UTC)),
        )

    async def close(self) -> None:
        """Close every connection."""
        for pool in self._pools.values():
            await pool.aclose()


async def _beginning(stream: Any) -> bytes:
    """The first bytes of a body. It may never end, or break off: the status has come."""
    kept, size = b"", 0
    with suppress(TimeoutError, httpcore2.TimeoutException, httpcore2.NetworkError,
                  httpcore2.ProtocolError):  # fmt: skip
        async with asyncio.timeout(BODY_SECONDS), aclosing(stream) as pieces:
            async for piece in pieces:
                kept += piece[: KEPT_BYTES - len(kept)]
                size += len(piece)
                if size > READ_BYTES:
                    break
    return kept


def _is_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


class Resolver:
    """The system's resolver, on threads of its own: names that hang delay nobody else.

    The event loop's own threads are few (uvloop has four), and a lookup can take half a minute.
    """

    def __init__(self, look_up: Callable[..., list[Any]] | None = None) -> None:
        self._look_up = look_up
        self._pending: dict[tuple[str, int], asyncio.Future[list[str]]] = {}

    async def addresses(self, host: str, port: int) -> list[str]:
        """Every address of a name, in the system's order; one lookup for all who ask at once.

        Raises:
            OSError: there is none, or too many names are being looked up.
        """
        key = (host, port)
        future = self._pending.get(key)
        if future is None:
            if len(self._pending) >= MOST_LOOKUPS:
                raise OSError("too many names are being looked up")
            future = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda _: self._pending.pop(key, None))
            self._pending[key] = future
            threading.Thread(target=self._run, args=(host, port, future), daemon=True).start()
        # shielded, since others may wait for the same lookup
        return await asyncio.shield(future)

    def _run(self, host: str, port: int, future: "asyncio.Future[list[str]]") -> None:
        found: list[str] = []
        failure: OSError | None = None
        try:
            look_up = self._look_up or socket.getaddrinfo
            rows = look_up(host, port, 0, socket.SOCK_STREAM)
            found = list(dict.fromkeys(str(row[4][0]) for row in rows))
        except (OSError, UnicodeError) as error:
            failure = error if isinstance(error, OSError) else OSError(str(error))

        def settle() -> None:
            if future.done():
                return
            if failure is None:
                future.set_result(found)
            else:
                future.set_exception(failure)
                future.exception()  # those who asked may have gone

        with suppress(RuntimeError):  # the loop was closed meanwhile
            future.get_loop().call_soon_threadsafe(settle)


class _GuardedBackend(AsyncNetworkBackend):
    """Opens connections for the pool: resolves, checks, connects to what was checked."""

    def __init__(self, allowed: Allowed, resolve: Resolve, *, encrypted: bool) -> None:
        self._allowed = allowed
        self._resolve = resolve
        self._encrypted = encrypted
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._checked(host, port)
                return await self._connect(addresses, port, timeout)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(f"{host} port {port}") from error

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> AsyncNetworkStream:
        raise _Refused("sockets of this machine are not for webhooks")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _checked(self, host: str, port: int) -> list[str]:
        try:
            addresses = [str(read_address(host))]
        except ValueError:
            try:
                addresses = await self._resolve(host, port)
            except OSError as error:
                raise _Refused(f"{host} has no address: {error}") from error
        reason = self._allowed.refusal(addresses, encrypted=self._encrypted)
        if reason is not None:
            raise _Refused(f"{host}: {reason}")
        return addresses[:MOST_ADDRESSES]

    async def _connect(
        self, addresses: list[str], port: int, timeout: float | None
    ) -> AsyncNetworkStream:
        share = None if timeout is None else timeout / len(addresses)
        for number, address in enumerate(addresses, start=1):
            try:
                stream = await self._inner.connect_tcp(address, port, timeout=share)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if number == len(addresses):
                    raise
                continue
            try:
                self._check_peer(stream)
            except BaseException:
                await stream.aclose()
                raise
            return stream
        raise _Refused("no address")

    def _check_peer(self, stream: AsyncNetworkStream) -> None:
        """What counts is whom we are connected to, whatever the system made of the address."""
        peer = stream.get_extra_info("server_addr")
        found = str(peer[0]) if peer else ""
        reason = self._allowed.refusal([found], encrypted=self._encrypted)
        if reason is not None:
            raise _Refused(f"connected to {found!r}: {reason}")
