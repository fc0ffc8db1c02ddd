"""Where webhooks may not go: checked on the address that is connected to, whatever a name says.

Names are answered by a resolver of ours, in place of the system's; all else is real: the client,
its connections, receivers on loopback, and the log that the tenant reads.
"""

import asyncio
import datetime
import itertools
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from core.ids import new_id
from core.settings import Settings
from core.webhook_addresses import Allowed
from core.webhook_url import parse_url
from db.database import Database
from tests.support.api import Api, running_api
from tests.support.receivers import Answer, Receiver
from tests.support.waiting import eventually
from workers.steward import webhook_client
from workers.steward.webhook_client import Resolver, SendFailed, WebhookClient
from workers.steward.webhook_sender import Sender

#: What names resolve to, each refused at the connection. `8.8.8.8` stands for any public address.
REFUSED_ANSWERS: list[list[str]] = [
    [],
    ["127.0.0.1"],
    ["127.0.0.53"],
    ["127.255.255.255"],
    ["0.0.0.0"],
    ["0.1.2.3"],
    ["10.0.0.1"],
    ["10.255.255.255"],
    ["100.64.0.1"],
    ["100.100.100.200"],
    ["168.63.129.16"],
    ["169.254.0.1"],
    ["169.254.169.254"],
    ["169.254.170.2"],
    ["172.16.0.1"],
    ["172.31.255.254"],
    ["192.0.0.1"],
    ["192.0.0.192"],
    ["192.0.2.9"],
    ["192.31.196.1"],
    ["192.52.193.1"],
    ["192.88.99.1"],
    ["192.168.0.1"],
    ["192.175.48.1"],
    ["198.18.0.1"],
    ["198.19.255.255"],
    ["198.51.100.7"],
    ["203.0.113.7"],
    ["224.0.0.1"],
    ["239.255.255.250"],
    ["240.0.0.1"],
    ["255.255.255.255"],
    ["::"],
    ["::1"],
    ["::127.0.0.1"],
    ["::ffff:127.0.0.1"],
    ["::ffff:10.0.0.1"],
    ["::ffff:169.254.169.254"],
    ["::ffff:8.8.8.8"],
    ["::ffff:0:127.0.0.1"],
    ["64:ff9b::7f00:1"],
    ["64:ff9b::a9fe:a9fe"],
    ["64:ff9b:1::1"],
    ["100::1"],
    ["2001::1"],
    ["2001:0:7f00:1::1"],
    ["2001:2::1"],
    ["2001:10::1"],
    ["2001:20::1"],
    ["2001:db8::1"],
    ["2002:7f00:1::1"],
    ["2002:a9fe:a9fe::1"],
    ["2620:4f:8000::1"],
    ["3fff::1"],
    ["4000::1"],
    ["5f00::1"],
    ["fc00::1"],
    ["fd00:ec2::254"],
    ["fdff::1"],
    ["fe80::1"],
    ["fe80::1%eth0"],
    ["febf::1"],
    ["fec0::1"],
    ["ff02::1"],
    ["ff05::2"],
    # both kinds: one forbidden address is enough, wherever it stands
    ["8.8.8.8", "127.0.0.1"],
    ["127.0.0.1", "8.8.8.8"],
    ["2606:4700::1111", "::1"],
    ["8.8.8.8", "8.8.4.4", "10.0.0.1"],
    ["8.8.8.8", "::ffff:127.0.0.1"],
    ["8.8.8.8", "2606:4700::1111", "1.1.1.1", "9.9.9.9", "169.254.169.254"],
]
#: Literal hosts that no endpoint can be made with, should one be in the database all the same.
REFUSED_URLS = [
    "https://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/",
    "https://[::1]:{port}/",
    "https://2130706433:{port}/",
    "https://0177.0.0.1:{port}/",
    "https://0x7f.1:{port}/",
    "https://127.1:{port}/",
    "https://localhost:{port}/",
    "https://x@127.0.0.1:{port}/",
    "http://8.8.8.8:{port}/",
    "ftp://127.0.0.1:{port}/",
]

LookUp = Callable[..., list[Any]]


def rows(addresses: list[str], port: int) -> list[Any]:
    """As `socket.getaddrinfo` answers."""
    if not addresses:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [
        (socket.AF_INET6 if ":" in a else socket.AF_INET, 1, 6, "", (a, port)) for a in addresses
    ]


def answering(answers: dict[str, Iterator[list[str]]], asked: list[str]) -> LookUp:
    def look_up(host: str, port: int, *_: object) -> list[Any]:
        asked.append(host)
        return rows(next(answers[host]), port)

    return look_up


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver.listening() as listening:
        yield listening


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    async with running_api(database_url) as running:
        yield running


async def owe_to(database: Database, url: str) -> None:
    """A delivery to a URL that was never checked."""
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO deliveries (tenant_id, url, line, event_id, type, subject, told)"
            " VALUES (1, $1, hashtextextended($1, 0), $2, 'job.succeeded', 'job_1', 'succeeded')",
            url,
            new_id(),
        )


@pytest.mark.timeout(300)
async def test_no_forbidden_address_is_connected_to(
    api: Api, database: Database, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    names = {f"n{number}.example": given for number, given in enumerate(REFUSED_ANSWERS)}

    def look_up(host: str, port: int, *rest: int) -> list[Any]:
        # what localhost is, the system says
        return rows(names[host], port) if host in names else socket.getaddrinfo(host, port, *rest)

    client = WebhookClient(Allowed(), 5, resolve=Resolver(look_up).addresses)
    for name in names:
        await owe_to(database, f"https://{name}:{receiver.port}/")
    for url in REFUSED_URLS:
        await owe_to(database, url.format(port=receiver.port))
    total = len(names) + len(REFUSED_URLS)
    assert total >= 60
    with caplog.at_level(logging.WARNING):
        sender = Sender(database, Settings(), client)
        await sender.act()
        await sender.close()
    assert receiver.connections == 0
    log = await deliveries(api, total)
    told = set()
    for delivery in log:
        assert delivery["state"] == "pending", delivery
        (attempt,) = delivery["attempts"]
        assert attempt["status"] is None and attempt["response"] is None
        told.add((attempt["error"]["code"], attempt["error"]["message"]))
    # one and the same for all: no address, no name that has none, no reason
    assert told == {("address", "the host has no address that webhooks may reach")}
    written = [r.getMessage() for r in caplog.records if "Webhook not sent" in r.getMessage()]
    assert len(written) == total
    for name, given in names.items():
        (line,) = [text for text in written if name in text.replace(":", " ").split()]
        if given:
            assert "forbidden" in line
            assert any(str(ip_address(a.partition("%")[0])) in line for a in given), line


async def deliveries(api: Api, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after: dict[str, Any] = {}
    while len(found) < count:
        page = (await api.client.get("/v1/deliveries", params={"limit": 100, **after})).json()
        found += page["data"]
        after = {"after": page["last_id"]}
        assert page["data"], "fewer than there should be"
    return found


async def test_a_name_that_changes_after_the_check_changes_nothing() -> None:
    """Rebinding: the check and the connection are of one answer; the next one is checked anew."""
    async with Receiver.listening() as inside:
        asked: list[str] = []
        server = await asyncio.start_server(inside._serve, "127.0.0.2", inside.port)
        answers = itertools.chain([["127.0.0.2"]], itertools.repeat(["127.0.0.1"]))
        resolver = Resolver(answering({"r.example": answers}, asked))
        client = WebhookClient(Allowed.parse("127.0.0.2/32"), 5, resolve=resolver.addresses)
        inside.answer = Answer(headers={"connection": "close"})
        try:
            url = parse_url(f"http://r.example:{inside.port}/")
            assert (await client.post(url, {}, b"{}")).status == 200
            assert asked == ["r.example"], "looked up once: there is no second answer to be misled"
            with pytest.raises(SendFailed) as refused:
                await client.post(url, {}, b"{}")
            assert refused.value.code == "address"
            assert "127.0.0.1" in refused.value.reason
            assert len(inside.received) == 1
        finally:
            await client.close()
            server.close()


async def test_the_peer_is_checked_once_more_when_connected() -> None:
    """Should the system connect to another address than it was told, nothing is sent to it."""
    async with Receiver.listening() as inside:
        client = WebhookClient(Allowed.parse("127.0.0.2/32"), 5)
        backend: Any = client._pools["http"]._network_backend
        connect = backend._inner.connect_tcp

        async def misled(address: str, port: int, **options: Any) -> Any:
            return await connect("127.0.0.1", port, **options)

        backend._inner.connect_tcp = misled
        try:
            with pytest.raises(SendFailed) as refused:
                await client.post(parse_url(f"http://127.0.0.2:{inside.port}/"), {}, b"{}")
            assert refused.value.code == "address" and "connected to" in refused.value.reason
            assert inside.received == []
        finally:
            await client.close()


async def test_a_redirect_inside_is_not_followed() -> None:
    async with Receiver.listening() as inside:
        client = WebhookClient(Allowed.parse("127.0.0.2/32"), 5)
        server = await asyncio.start_server(inside._serve, "127.0.0.2", inside.port)
        inside.answer = Answer(302, headers={"location": f"http://127.0.0.1:{inside.port}/x"})
        try:
            reply = await client.post(parse_url(f"http://127.0.0.2:{inside.port}/"), {}, b"{}")
            assert reply.status == 302
            assert len(inside.received) == 1
        finally:
            await client.close()
            server.close()


async def test_http_is_for_opened_networks_alone() -> None:
    resolver = Resolver(answering({"public.example": itertools.repeat(["8.8.8.8"])}, []))
    client = WebhookClient(Allowed.parse("127.0.0.0/8"), 5, resolve=resolver.addresses)
    with pytest.raises(SendFailed) as refused:
        await client.post(parse_url("http://public.example/"), {}, b"{}")
    assert refused.value.code == "address" and "https only" in refused.value.reason
    await client.close()


async def test_the_second_address_is_tried_where_the_first_is_dead(receiver: Receiver) -> None:
    resolver = Resolver(
        answering({"two.example": itertools.repeat(["127.0.0.9", "127.0.0.1"])}, [])
    )
    client = WebhookClient(Allowed.parse("127.0.0.0/8"), 5, resolve=resolver.addresses)
    reply = await client.post(parse_url(f"http://two.example:{receiver.port}/"), {}, b"{}")
    assert reply.status == 200
    assert receiver.received[0].headers["host"] == f"two.example:{receiver.port}"
    await client.close()


async def test_names_that_hang_delay_no_other(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()
    hanging = 0

    def look_up(host: str, port: int, *_: object) -> list[Any]:
        nonlocal hanging
        if host.startswith("hangs"):
            hanging += 1
            asyncio.run(asyncio.wait_for(_polled(release), 60))
            raise socket.gaierror
        return rows(["127.0.0.1"], port)

    monkeypatch.setattr(webhook_client, "CONNECT_SECONDS", 0.5)
    client = WebhookClient(Allowed.parse("127.0.0.0/8"), 5, resolve=Resolver(look_up).addresses)
    waiting = [
        asyncio.create_task(client.post(parse_url(f"https://hangs{n % 20}.example/"), {}, b""))
        for n in range(60)
    ]

    async def all_hang() -> bool:
        return hanging == 20

    try:
        await eventually(all_hang, "one lookup for each name")
        reply = await client.post(parse_url(f"http://ok.example:{receiver.port}/"), {}, b"{}")
        assert reply.status == 200
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {r.code for r in results if isinstance(r, SendFailed)} == {"timeout"}
        assert hanging == 20
    finally:
        release.set()
        await client.close()


async def _polled(event: asyncio.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.01)


async def test_certificates_are_checked(tmp_path: Path) -> None:
    server, trusted = certificates(tmp_path)
    resolver = Resolver(lambda host, port, *_: rows(["127.0.0.1"], port))
    allowed = Allowed.parse("127.0.0.0/8")
    client = WebhookClient(allowed, 5, ssl_context=trusted, resolve=resolver.addresses)
    stranger = WebhookClient(allowed, 5, resolve=resolver.addresses)
    try:
        async with Receiver.listening(server) as receiver:
            good = parse_url(receiver.url(host="receiver.example"))
            assert (await client.post(good, {}, b"{}")).status == 200
            wrong = parse_url(receiver.url(host="other.example"))
            for who, url in ((client, wrong), (stranger, good)):
                with pytest.raises(SendFailed) as refused:
                    await who.post(url, {}, b"{}")
                assert refused.value.code == "tls", refused.value.reason
            assert len(receiver.received) == 1
    finally:
        await client.close()
        await stranger.close()


def certificates(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context for receiver.example, and one that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "receiver.example")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("receiver.example")]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain = folder / "chain.pem"
    chain.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(chain)
    return server, ssl.create_default_context(cafile=str(chain))
