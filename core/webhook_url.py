"""The URLs that webhooks go to: taken apart once, by one strict parser, for checking and sending.

What another parser could read differently (backslashes, control characters, numbers for
addresses, credentials) is refused, so that what was checked is what is connected to.
"""

import re
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from core.webhook_addresses import Allowed, read_address

LONGEST_URL: Final = 2048
_URL: Final = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?)"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>(?:/[!$%&'()*+,\-./:;=@\w~]*)?(?:\?[!$%&'()*+,\-./:;=?@\w~]*)?)",
    re.ASCII | re.IGNORECASE,
)
#: Names for this machine, whatever its resolver says.
_LOCAL_NAME: Final = re.compile(r"(?:.*\.)?(?:localhost|localdomain)", re.IGNORECASE)
#: inet_aton takes 127.1, 0177.0.0.1, 0x7f000001 and 2130706433 for addresses.
_NUMERIC: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.IGNORECASE)


class UrlRefused(ValueError):
    """Why a URL cannot be used, to be read after the field's name."""


@dataclass(frozen=True, slots=True)
class WebhookUrl:
    """A URL taken apart.

    Args:
        host: in lower case, an IPv6 address without brackets.
        target: path and query, as they are sent.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def encrypted(self) -> bool:
        """Whether it is https."""
        return self.scheme == "https"

    @property
    def host_header(self) -> str:
        """The value of `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = 443 if self.encrypted else 80
        return host if self.port == usual else f"{host}:{self.port}"


def parse_url(text: str) -> WebhookUrl:
    """Take a URL apart. Raises UrlRefused."""
    if len(text) > LONGEST_URL:
        raise UrlRefused(f"has {len(text)} characters; shorten it to {LONGEST_URL}")
    if "@" in text.partition("://")[2].partition("/")[0].partition("?")[0]:
        raise UrlRefused("has credentials in it; remove them, deliveries are signed")
    if "#" in text:
        raise UrlRefused("has a fragment, which is never sent; remove it")
    found = _URL.fullmatch(text)
    if found is None:
        raise UrlRefused(
            "is not a URL that can be used; give https://HOST/PATH in ASCII, a name in other "
            "scripts as xn--…, other characters percent-encoded"
        )
    scheme, host = found["scheme"].lower(), found["host"].lower()
    port = int(found["port"] or (443 if scheme == "https" else 80))
    if not 1 <= port <= 65_535:
        raise UrlRefused(f"has the port {port}; give one from 1 to 65535")
    if host.startswith("["):
        host = _ipv6(host)
    elif _NUMERIC.fullmatch(host):
        host = _ipv4(host)
    elif ".." in host or len(host) > 253 or any(len(part) > 63 for part in host.split(".")):
        raise UrlRefused("has a host that cannot be a name")
    target = found["target"]
    return WebhookUrl(scheme, host, port, target if target.startswith("/") else f"/{target}")


def check_url(text: str, allowed: Allowed) -> WebhookUrl:
    """What can be known of a URL without asking anybody; the rest is checked when connecting.

    Raises:
        UrlRefused: it cannot be taken apart, names a forbidden address, or is plain http to
            somewhere else than an opened network.
    """
    url = parse_url(text)
    literal = literal_address(url)
    if literal is not None:
        if (reason := allowed.refusal([str(literal)], encrypted=url.encrypted)) is not None:
            raise UrlRefused(_refused(reason))
    elif _LOCAL_NAME.fullmatch(url.host):
        if not (allowed.has(IPv4Address("127.0.0.1")) or allowed.has(IPv6Address("::1"))):
            raise UrlRefused(_refused(f"{url.host} is this machine itself"))
    elif not url.encrypted and not allowed.networks:
        raise UrlRefused(
            "is not encrypted; give https://… (http is for networks in LORRY_WEBHOOK_ALLOW)"
        )
    return url


def literal_address(url: WebhookUrl) -> IPv4Address | IPv6Address | None:
    """The address that the host is, or None for a name."""
    try:
        return read_address(url.host)
    except ValueError:
        return None


def _refused(reason: str) -> str:
    return (
        f"may not be used: {reason}; give a public https address, or let the operator open its "
        "network with LORRY_WEBHOOK_ALLOW"
    )


def _ipv6(host: str) -> str:
    try:
        return str(IPv6Address(host.strip("[]")))
    except ValueError:
        raise UrlRefused(f"has a host {host} that is no IPv6 address") from None


def _ipv4(host: str) -> str:
    try:
        return str(IPv4Address(host))
    except ValueError:
        pass
    try:
        meant = f" (here {IPv4Address(socket.inet_aton(host))})"
    except OSError:
        meant = ""
    raise UrlRefused(f"has the host {host[:80]}; write an address as four decimal numbers{meant}")
