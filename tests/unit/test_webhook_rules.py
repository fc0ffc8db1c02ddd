"""The rules of webhooks without I/O: URLs, addresses, retries, shares, the envelope."""

import random
from collections import Counter
from datetime import UTC, datetime
from ipaddress import IPv4Address
from uuid import UUID, uuid4

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UsageError
from core.ids import new_id
from core.settings import load_settings
from core.webhook_addresses import Allowed, forbidden
from core.webhook_events import LARGEST_BODY_BYTES, EventType, envelope, sequence
from core.webhook_retry import DELAYS, read_retry_after, retry_delay
from core.webhook_url import UrlRefused, check_url, parse_url
from db.sending import WaitingLine
from workers.steward.webhook_plan import Limits, grants

NOBODY = Allowed()
OPENED = Allowed.parse("10.0.0.0/8, 127.0.0.0/8,fd00::/8")

#: Literal hosts and tricks in a URL: refused where they are given.
REFUSED_URLS = [
    "http://example.com/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://127.0.0.1/",
    "//example.com/",
    "example.com",
    "https://",
    "https:///path",
    "https://user@example.com/",
    "https://user:secret@example.com/",
    "https://example.com@127.0.0.1/",
    "https://127.0.0.1:80@example.com/",
    "https://example.com#@127.0.0.1/",
    "https://example.com\\@127.0.0.1/",
    "https://example.com\\.evil/",
    "https://exa mple.com/",
    "https://example.com/\r\nHost: 127.0.0.1",
    "https://example.com/\tx",
    "https://example.com\0/",
    " https://example.com/",
    "https://example.com/ü",
    "https://exämple.com/",
    "https://①②⑦.⓪.⓪.①/",
    "https://127。0。0。1/",
    "https://%31%32%37.0.0.1/",
    "https://example.com:0/",
    "https://example.com:65536/",
    "https://example.com:x/",
    "https://a..b/",
    "https://.example.com/",
    "https://-example.com/",
    "https://" + "a" * 64 + ".com/",
    "https://example.com/" + "x" * 2048,
    "https://localhost/",
    "https://LOCALHOST/",
    "https://foo.localhost/",
    "https://localhost.localdomain/",
    # every way to write 127.0.0.1 and its like
    "https://127.0.0.1/",
    "https://127.1/",
    "https://127.0.1/",
    "https://2130706433/",
    "https://017700000001/",
    "https://0177.0.0.1/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0x7f.1/",
    "https://127.000.000.001/",
    "https://0/",
    "https://0.0.0.0/",
    "https://1.2.3.4.5/",
    "https://256.256.256.256/",
    "https://10.0.0.1/",
    "https://100.64.0.1/",
    "https://100.100.100.200/latest/meta-data/",
    "https://127.255.255.254/",
    "https://168.63.129.16/",
    "https://169.254.169.254/latest/meta-data/",
    "https://169.254.170.2/",
    "https://172.16.0.1/",
    "https://172.31.255.255/",
    "https://192.0.0.192/",
    "https://192.0.2.1/",
    "https://192.88.99.1/",
    "https://192.168.1.1/",
    "https://198.18.0.1/",
    "https://198.51.100.1/",
    "https://203.0.113.1/",
    "https://224.0.0.1/",
    "https://239.255.255.250/",
    "https://240.0.0.1/",
    "https://255.255.255.255/",
    "https://[::]/",
    "https://[::1]/",
    "https://[0:0:0:0:0:0:0:1]/",
    "https://[::127.0.0.1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[::ffff:8.8.8.8]/",
    "https://[::ffff:0:127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[64:ff9b::169.254.169.254]/",
    "https://[64:ff9b:1::a00:1]/",
    "https://[100::1]/",
    "https://[2001::1]/",
    "https://[2001:db8::1]/",
    "https://[2002:7f00:1::]/",
    "https://[3fff::1]/",
    "https://[5f00::1]/",
    "https://[fc00::1]/",
    "https://[fd00:ec2::254]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[fec0::1]/",
    "https://[ff02::1]/",
    "https://[4000::1]/",
    "https://[::1/",
    "https://[::g]/",
]


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_urls_that_are_refused_where_they_are_given(url: str) -> None:
    with pytest.raises(UrlRefused):
        check_url(url, NOBODY)


@pytest.mark.parametrize(
    ("url", "host", "port", "target", "header"),
    [
        ("https://example.com", "example.com", 443, "/", "example.com"),
        ("HTTPS://Example.COM/A?b=c%20d", "example.com", 443, "/A?b=c%20d", "example.com"),
        ("https://example.com?x=1", "example.com", 443, "/?x=1", "example.com"),
        ("https://a.b:8443/x", "a.b", 8443, "/x", "a.b:8443"),
        ("https://8.8.8.8/x", "8.8.8.8", 443, "/x", "8.8.8.8"),
        ("https://[2606:4700::1111]:1/", "2606:4700::1111", 1, "/", "[2606:4700::1111]:1"),
        ("https://xn--exmple-cua.com/", "xn--exmple-cua.com", 443, "/", "xn--exmple-cua.com"),
        ("https://my_host.internal/", "my_host.internal", 443, "/", "my_host.internal"),
        ("https://1password.com/", "1password.com", 443, "/", "1password.com"),
    ],
)
def test_urls_that_are_taken(url: str, host: str, port: int, target: str, header: str) -> None:
    found = check_url(url, NOBODY)
    assert (found.host, found.port, found.target) == (host, port, target)
    assert found.host_header == header


@pytest.mark.parametrize(
    "url",
    [
        "http://10.1.2.3:8080/x",
        "https://10.1.2.3/x",
        "http://localhost:9000/",
        "http://[fd00::1]/",
        "http://receiver.example/",
    ],
)
def test_opened_networks_are_reached_also_by_http(url: str) -> None:
    check_url(url, OPENED)


@pytest.mark.parametrize(
    "url", ["http://8.8.8.8/", "https://192.168.0.1/", "http://[::1]/", "http://[::ffff:10.0.0.1]/"]
)
def test_other_networks_stay_shut(url: str) -> None:
    with pytest.raises(UrlRefused):
        check_url(url, OPENED)


@given(st.text(max_size=60))
def test_whatever_is_given_is_taken_or_refused(text: str) -> None:
    for given_url in (text, f"https://{text}", f"https://example.com{text}"):
        try:
            found = parse_url(given_url)
        except UrlRefused:
            continue
        assert found.host.isascii() and found.target.isascii()
        assert not set(found.host) & set(" @#\\/?[]") and found.target.startswith("/")
        assert all(character.isprintable() and character != " " for character in found.target)
        assert given_url.lower().startswith(f"{found.scheme}://")


@given(st.integers(0, 2**32 - 1))
def test_ipv4_addresses_that_may_be_reached_are_global(number: int) -> None:
    address = IPv4Address(number)
    if forbidden(address) is None:
        assert address.is_global and not address.is_multicast and not address.is_reserved


def test_one_forbidden_address_of_a_name_is_enough() -> None:
    assert NOBODY.refusal(["8.8.8.8", "2606:4700::1111"], encrypted=True) is None
    for mixed in (["8.8.8.8", "127.0.0.1"], ["10.0.0.1", "8.8.8.8"], ["8.8.8.8", "::1"]):
        assert "forbidden" in str(NOBODY.refusal(mixed, encrypted=True))
    assert "public" in str(OPENED.refusal(["10.0.0.1", "8.8.8.8"], encrypted=False))
    assert OPENED.refusal(["10.0.0.1", "8.8.8.8"], encrypted=True) is None
    assert NOBODY.refusal([], encrypted=True) == "no address"
    assert "not an address" in str(NOBODY.refusal(["x"], encrypted=True))


def test_a_setting_that_is_no_network_is_refused() -> None:
    for bad in ("10.0.0.0/33", "x", "10.0.0.1/8"):
        with pytest.raises(UsageError, match="LORRY_WEBHOOK_ALLOW"):
            load_settings({}, webhook_allow=bad)
    assert load_settings({}, webhook_allow=" 10.0.0.0/8 ,").webhook_networks().networks


def test_the_schedule_is_the_standards() -> None:
    assert [DELAYS[n] for n in range(10)] == [
        0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400,
    ]  # fmt: skip
    waits = [retry_delay(n, 0, chance=lambda: 0.5) for n in range(1, 11)]
    assert waits == [5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400, None]
    spread = [retry_delay(1, 0, chance=random.random) or 0 for _ in range(1000)]
    assert 4 <= min(spread) < 4.2 and 5.8 < max(spread) <= 6
    assert retry_delay(1, 5 * 86_400) is None
    assert retry_delay(1, 0, 60.0) == 60
    assert retry_delay(1, 0, 1e9) == 3600
    assert retry_delay(3, 0, 1.0, lambda: 0.5) == 1800


def test_retry_after_is_read_in_both_forms() -> None:
    now = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
    assert read_retry_after("17", now) == 17
    assert read_retry_after(" 17 ", now) == 17
    assert read_retry_after("Fri, 01 May 2026 12:00:30 GMT", now) == 30
    assert read_retry_after("Fri, 01 May 2020 12:00:30 GMT", now) == 0
    for nothing in (None, "", "soon", "-5", "1.5", "९", "9" * 99, "Fri, 99 May 9999 12:00:30 GMT"):
        assert read_retry_after(nothing, now) is None
    assert read_retry_after("9" * 30, now) == 5 * 86_400


def test_the_envelope_is_thin_and_the_same_every_time() -> None:
    event_id = new_id()
    at = datetime(2026, 5, 1, 12, 0, 0, 5, tzinfo=UTC)
    for event in EventType:
        subject = "sql@2" if event.startswith("adapter") else "x" * 200
        body = envelope(
            event_id=event_id, event=event, created_at=at, subject=subject, told="t" * 20
        )
        again = envelope(
            event_id=event_id,
            event=event,
            created_at=at.astimezone(),
            subject=subject,
            told="t" * 20,
        )
        assert body == again
        assert len(body) < LARGEST_BODY_BYTES
        found = orjson.loads(body)
        assert list(found) == [
            "id", "object", "type", "created_at", "timestamp", "sequence", "data",
        ]  # fmt: skip
        assert ("status" in found["data"]) == event.startswith("batch")
    linked = orjson.loads(
        envelope(
            event_id=event_id,
            event=EventType.ADAPTER_READY,
            created_at=at,
            subject="sql@2",
            told="ready",
            public_url="https://lorry.example/",
        )
    )
    assert linked["data"]["link"] == "https://lorry.example/v1/adapters/sql/versions/2"


def test_sequence_numbers_rise_with_time_and_stay_exact_in_json() -> None:
    early, late = UUID(int=1_800_000_000_000 << 80), UUID(int=1_800_000_000_001 << 80)
    assert sequence(early) < sequence(late)
    ids = [new_id() for _ in range(100)]
    assert [sequence(i) for i in ids] == sorted(sequence(i) for i in ids)
    in_2090 = int(datetime(2090, 1, 1, tzinfo=UTC).timestamp() * 1000)
    assert sequence(UUID(int=in_2090 << 80)) < 2**53
    assert sequence(uuid4()) >= 0


def test_every_line_gets_a_share_of_what_is_left() -> None:
    limits = Limits(all=100, tenant=80, line=32, slow_line=4)
    lines = [WaitingLine(n, 1 + n % 2, 0) for n in range(50)]
    found = grants(lines, limits, by_line={}, by_tenant={}, seconds=lambda _: 0.0)
    assert len(found) == 50 and {grant.room for grant in found} == {2}
    found = grants(lines[:2], limits, by_line={}, by_tenant={}, seconds=lambda _: 0.0)
    assert [grant.room for grant in found] == [32, 32]


def test_slow_failing_and_full_lines_get_less() -> None:
    limits = Limits(all=100, tenant=80, line=32, slow_line=4)
    lines = [WaitingLine(1, 1, 0), WaitingLine(2, 1, 0), WaitingLine(3, 1, 3), WaitingLine(4, 1, 9)]
    found = grants(
        lines, limits, by_line={1: 30}, by_tenant={1: 30}, seconds=lambda n: 29.0 * (n == 2)
    )
    assert {grant.line: (grant.room, grant.probe) for grant in found} == {
        1: (2, False), 2: (4, False), 3: (4, False), 4: (1, True),
    }  # fmt: skip
    full = grants(lines, limits, by_line={9: 100}, by_tenant={}, seconds=lambda _: 0.0)
    assert full == []
    probing = grants(lines[3:], limits, by_line={4: 1}, by_tenant={}, seconds=lambda _: 0.0)
    assert probing == []


def test_a_tenant_cannot_take_all() -> None:
    limits = Limits(all=100, tenant=60, line=32, slow_line=4)
    lines = [WaitingLine(n, 1, 0) for n in range(40)] + [WaitingLine(99, 2, 0)]
    by_tenant: Counter[int] = Counter({1: 59})
    found = grants(lines, limits, by_line={0: 59}, by_tenant=by_tenant, seconds=lambda _: 0.0)
    assert sum(grant.room for grant in found if grant.line != 99) == 1
    assert any(grant.line == 99 for grant in found)
