"""`lorry api`: uvicorn on a socket that is bound before anything else starts."""

import errno
import ipaddress
import logging
import signal
import socket
from typing import Final

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from core.errors import UsageError
from core.logs import configure_logging
from core.settings import Settings

log = logging.getLogger(__name__)

BACKLOG: Final = 2048


def serve(settings: Settings, *, host: str, port: int, ready_model: str | None = None) -> None:
    """Serve until SIGTERM or SIGINT; then requests under way are finished first. Blocking.

    SIGTERM ends it with a return, SIGINT with KeyboardInterrupt.

    Args:
        port: 0 takes a free one, which the log names.
        ready_model: see `create_app`.

    Raises:
        UsageError: no database is set, the address cannot be bound, or requests without keys
            would be taken from other machines. Nothing was started.
    """
    if settings.database_url is None:
        raise UsageError("LORRY_DATABASE_URL is not set: give the address of a Postgres")
    listener = bind(host, port)
    try:
        _refuse_open_door(settings, listener)
        configure_logging(settings.log_level)
        app = create_app(settings, ready_model)
        config = uvicorn.Config(
            app,
            loop="uvloop",
            log_config=None,
            access_log=False,
            backlog=BACKLOG,
            # longer than clients pause and proxies keep a connection (60 s as a rule): the server
            # must not be who closes it, or a request sent at that moment is lost
            timeout_keep_alive=settings.keep_alive_seconds,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
        )
        server = _Server(config, app)
        log.info("API on http://%s:%d", *listener.getsockname()[:2], extra={"action": "api_up"})
        # uvicorn repeats the signal once it has stopped; a stop that was asked for is no failure
        previous = signal.signal(signal.SIGTERM, server.handle_exit)
        try:
            server.run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, previous)
    finally:
        listener.close()
    log.info("API stopped", extra={"action": "api_down"})


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # before uvicorn waits for requests: a long poll would hold it for half a minute
        self._app.state.services.waiters.release()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, or UsageError saying why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r} is not an address of this machine: {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # at once: two sockets can be bound to a port, but only one can listen
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(_bind_problem(host, port, error)) from None
    return listener


def _bind_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken: stop what listens there, or give another --port"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges: give a --port from 1024 up"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host!r} is not an address of this machine"
    return f"cannot listen on {host} port {port}: {error.strerror}"


def _refuse_open_door(settings: Settings, listener: socket.socket) -> None:
    address = str(listener.getsockname()[0])
    if settings.require_keys or ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return
    raise UsageError(
        f"without keys, anyone who can reach {address} could use it: bind to 127.0.0.1, or "
        "require keys (--require-keys, LORRY_REQUIRE_KEYS=true)"
    )
