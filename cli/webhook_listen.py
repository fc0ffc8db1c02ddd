"""`lorry webhooks listen`: a receiver for development, that verifies and prints what comes."""

import base64
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Annotated, Any, Final

import typer

from cli.output import AsJson
from core.errors import LorryError, UsageError

#: A body of ours has less than 20 kB.
_MOST_BYTES: Final = 1_000_000


def listen(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Where to listen; 0 is any.")] = 9000,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    secret: Annotated[
        list[str] | None,
        typer.Option(help="Verify by this whsec_…; may be repeated. Nothing is registered then."),
    ] = None,
    events: Annotated[str, typer.Option(help="Which events, separated by commas, or all.")] = "all",
    status: Annotated[int, typer.Option(min=200, max=599, help="What to answer.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Receive webhooks on this machine, verify and print each; Ctrl-C ends it.

    Without --secret it makes a webhook for itself at the API, and deletes it at the end. The API
    and the steward must allow it: LORRY_WEBHOOK_ALLOW=127.0.0.0/8.
    """
    for each in secret or []:
        _check_secret(each)
    try:
        server = ThreadingHTTPServer((host, port), _Handler)
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    with server, _registered(server, secret, events) as secrets:
        server.receiver = _Receiver(secrets, status, as_json)  # type: ignore[attr-defined]
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
        print(f"listening on http://{host}:{server.server_port}", file=sys.stderr, flush=True)
        server.serve_forever()


def _check_secret(secret: str) -> None:
    head, _, rest = secret.partition("_")
    try:
        good = head == "whsec" and len(base64.b64decode(rest, validate=True)) > 0
    except ValueError:
        good = False
    if not good:
        raise UsageError("--secret is not one: give the whsec_… that Lorry showed")


@contextmanager
def _registered(
    server: ThreadingHTTPServer, given: list[str] | None, events: str
) -> Iterator[list[str]]:
    """The secrets to verify by: those given, or that of a webhook made for this while."""
    if given:
        yield given
        return
    from cli.client import Client
    from cli.webhooks import event_names

    url = f"http://127.0.0.1:{server.server_port}/"
    body = {"url": url, "events": event_names(events), "description": "lorry webhooks listen"}
    with Client.from_environment() as client:
        made = client.post("/v1/webhooks", body)
        try:
            yield [made["secret"]]
        finally:
            with suppress(LorryError):
                client.delete(f"/v1/webhooks/{made['id']}")


class _Receiver:
    """What is done with a delivery."""

    def __init__(self, secrets: list[str], status: int, as_json: bool) -> None:
        from standardwebhooks import Webhook

        self._webhooks = [Webhook(secret) for secret in secrets]
        self._status = status
        self._as_json = as_json
        self._printing = Lock()

    def take(self, headers: dict[str, str], body: bytes) -> int:
        """Verify and print; returns the status to answer."""
        problem = self._problem(headers, body)
        try:
            event: Any = json.loads(body)
        except ValueError:
            event = None
        event = event if isinstance(event, dict) else {}
        if self._as_json:
            line = json.dumps({"verified": problem is None, "problem": problem, "event": event})
        else:
            data = event.get("data")
            data = data if isinstance(data, dict) else {}
            said = data.get("state") or data.get("status") or ""
            mark = "verified" if problem is None else f"NOT VERIFIED ({problem})"
            line = f"{event.get('type')} {data.get('id')} {said} {event.get('id')} {mark}"
        # anyone may post to this port: nothing of it may steer the terminal
        self._say("".join(c if c.isprintable() else "?" for c in line))
        return self._status if problem is None else 400

    def _say(self, line: str) -> None:
        # deliveries come on threads of their own, and print() writes its newline by itself
        with self._printing:
            print(line, flush=True)

    def _problem(self, headers: dict[str, str], body: bytes) -> str | None:
        problem = None
        for webhook in self._webhooks:
            try:
                webhook.verify(body, headers, json_parse=False)
            except Exception as error:  # whatever it cannot read is not verified
                problem = str(error) or type(error).__name__
            else:
                return None
        return problem


class _Handler(BaseHTTPRequestHandler):
    timeout = 30

    def do_POST(self) -> None:
        """One delivery."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _MOST_BYTES:
            self.send_error(413)
            return
        body = self.rfile.read(int(length))
        receiver: _Receiver = self.server.receiver  # type: ignore[attr-defined]
        status = receiver.take(dict(self.headers.items()), body)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing beside the events."""
