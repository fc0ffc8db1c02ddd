"""Which addresses webhooks may reach: the public internet, and networks that the operator opened.

A list of what is forbidden, each with its reason, and behind it a rule for what nobody thought of:
IPv6 addresses outside 2000::/3, and whatever Python does not call global, are refused too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final, Self

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_FORBIDDEN: Final[tuple[tuple[Network, str], ...]] = tuple(
    (ip_network(network), reason)
    for network, reason in (
        ("0.0.0.0/8", "this network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared by carriers"),
        ("127.0.0.0/8", "loopback"),
        ("168.63.129.16/32", "a cloud's metadata"),
        ("169.254.0.0/16", "link-local, with clouds' metadata"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "protocol assignments"),
        ("192.0.2.0/24", "documentation"),
        ("192.31.196.0/24", "AS112"),
        ("192.52.193.0/24", "AMT"),
        ("192.88.99.0/24", "6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "AS112"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::ffff:0:0/96", "IPv4 mapped"),
        ("::ffff:0:0:0/96", "IPv4 translated"),
        ("::/96", "IPv4 compatible"),
        ("64:ff9b::/96", "NAT64"),
        ("64:ff9b:1::/48", "NAT64"),
        ("100::/64", "discard"),
        ("2001::/23", "protocol assignments, Teredo"),
        ("2001:db8::/32", "documentation"),
        ("2002::/16", "6to4"),
        ("2620:4f:8000::/48", "AS112"),
        ("3fff::/20", "documentation"),
        ("5f00::/16", "segment routing"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")


@dataclass(frozen=True, slots=True)
class Allowed:
    """The networks that `LORRY_WEBHOOK_ALLOW` opens."""

    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Networks in CIDR notation, separated by commas.

        Raises:
            ValueError: one of them is none, or has bits beside its prefix.
        """
        parts = [part.strip() for part in text.split(",")]
        return cls(tuple(ip_network(part) for part in parts if part))

    def has(self, address: Address) -> bool:
        """Whether the operator opened this address. A mapped IPv4 address is not its IPv4."""
        return any(address in network for network in self.networks)

    def refusal(self, addresses: Iterable[str], *, encrypted: bool) -> str | None:
        """Why a host with these addresses may not be reached; None where it may.

        One forbidden address is enough: a name that has both kinds is an attack or a mistake.

        Args:
            addresses: all that its name stands for, as text.
            encrypted: whether by https; http is for opened networks alone.
        """
        seen = False
        for text in addresses:
            seen = True
            try:
                address = read_address(text)
            except ValueError:
                return f"{text!r} is not an address"
            if self.has(address):
                continue
            if (reason := forbidden(address)) is not None:
                return f"{address} is forbidden ({reason})"
            if not encrypted:
                return f"{address} is public, and may be reached by https only"
        return None if seen else "no address"


def read_address(text: str) -> Address:
    """An address without brackets and scope. Raises ValueError."""
    return ip_address(text.strip("[]").partition("%")[0])


def forbidden(address: Address) -> str | None:
    """Why an address may not be reached unless its network was opened; None where it may."""
    for network, reason in _FORBIDDEN:
        if address in network:
            return reason
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return "no global unicast"
    return None if address.is_global else "not global"
