"""What `lorry up` was asked for, and what can be refused before anything starts."""

import errno
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from core.errors import UsageError


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The command line of `lorry up`.

    Args:
        model: a local folder or a model name; None for the demo's base and adapters.
        host, port: where the API listens; port 0 takes any free one.
        data_dir: everything the stack keeps.
        cache_dir: what can be made again: the demo's base, local adapter copies.
        engine: `vllm` or `simulated`.
        fold: whether the worker folds adapters where it pays.
        require_keys: whether the API asks for keys.
        adapters: names and folders of adapters to register.
        flags: the engine's own flags.
        as_json: whether the ready line is JSON.
    """

    model: str | None
    host: str
    port: int
    data_dir: Path
    cache_dir: Path
    engine: str
    require_keys: bool
    adapters: tuple[tuple[str, Path], ...]
    flags: tuple[str, ...]
    as_json: bool = False
    fold: bool = True


def parse_adapters(texts: list[str]) -> tuple[tuple[str, Path], ...]:
    """Read `NAME=FOLDER` options. Raises UsageError where one is not that."""
    adapters = []
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UsageError(f"--adapter {text!r}: give NAME=FOLDER")
        if "://" in folder:
            raise UsageError(
                f"--adapter {text!r}: remote addresses are not taken yet; download it first, then "
                "give the folder here"
            )
        path = Path(folder).expanduser().absolute()
        if not path.is_dir():
            raise UsageError(f"--adapter {text!r}: there is no folder {path}")
        adapters.append((name, path))
    return tuple(adapters)


def refuse_open_door(host: str, require_keys: bool) -> None:
    """Raise UsageError for an API that anyone could reach and that asks nobody for a key."""
    if not require_keys and not is_loopback(host):
        raise UsageError(
            f"--host {host} is reachable from other machines and no key is asked for: "
            "add --require-keys, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine only. Names other than localhost are not trusted to be."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def claim_port(host: str, port: int) -> int:
    """The port to listen on, known to be free now; 0 becomes one that the system picks.

    Raises:
        UsageError: the address is in use, not ours, or not to be used by this user.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            found: int = probe.getsockname()[1]
            return found
    except socket.gaierror:
        raise UsageError(f"--host {host}: no such address") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} on {host} is taken: stop what listens there, or give another --port"
            ) from None
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}") from None


def base_url(host: str, port: int) -> str:
    """The API's address for a client on this machine."""
    if host in ("0.0.0.0", "::"):  # noqa: S104  asked whether, not bound
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
