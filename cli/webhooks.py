"""`lorry webhooks`: endpoints, secrets, what was sent to whom, and sending it once more."""

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from cli.output import AsJson, show_json, show_rows
from cli.paths import segment
from core.errors import LorryError, UsageError
from core.webhook_events import EventType

app = typer.Typer(help="Be told when something is done: endpoints, secrets, deliveries, replays.")

Id = Annotated[str, typer.Argument(help="The webhook's id.")]
Url = Annotated[str, typer.Argument(help="Where to be told: https://…")]
Events = Annotated[
    str, typer.Option(help="Which events, separated by commas: job.succeeded,job.failed. Or all.")
]
State = Annotated[str | None, typer.Option(help="pending, delivered or failed.")]
Limit = Annotated[int, typer.Option(min=1, max=100, help="How many at most.")]
_AGO = re.compile(r"(\d+)([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.command()
def create(
    url: Url,
    events: Events = "all",
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a webhook and print its id and, for the only time, its secret."""
    from cli.client import Client

    body = {"url": url, "events": event_names(events), "description": description}
    with Client.from_environment() as client:
        made = client.post("/v1/webhooks", body)
    if as_json:
        show_json(made)
    else:
        print(f"{made['id']}\n{made['secret']}")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List your webhooks, newest first."""
    from cli.client import Client

    rows: list[dict[str, Any]] = []
    after = None
    with Client.from_environment() as client:
        while True:
            page = client.get("/v1/webhooks", limit=100, after=after)
            rows += page["data"]
            after = page["last_id"]
            if not page["has_more"]:
                break
    columns = ("id", "url", "disabled_reason", "created_at")
    show_rows(rows, columns, as_json=as_json, none="no webhooks: `lorry webhooks create` makes one")


@app.command()
def update(
    webhook: Id,
    url: Annotated[str | None, typer.Option(help="The new URL.")] = None,
    events: Annotated[str | None, typer.Option(help="The new events, or all.")] = None,
    disable: Annotated[bool, typer.Option("--disable", help="Send nothing more.")] = False,
    enable: Annotated[bool, typer.Option("--enable", help="Send again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Change, disable or enable a webhook."""
    from cli.client import Client

    if disable and enable:
        raise UsageError("--disable and --enable: give one of them")
    given = {
        "url": url,
        "events": None if events is None else event_names(events),
        "disabled": disable if disable or enable else None,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise UsageError("give what is to be changed: --url, --events, --disable or --enable")
    with Client.from_environment() as client:
        changed = client.patch(f"/v1/webhooks/{segment(webhook)}", changes)
    if as_json:
        show_json(changed)
    else:
        reason = changed["disabled_reason"]
        state = f"disabled ({reason})" if reason else "enabled"
        print(f"{changed['id']} {changed['url']} is {state}")


@app.command()
def delete(webhook: Id, as_json: AsJson = False) -> None:
    """Delete a webhook. What it was still owed fails."""
    from cli.client import Client

    with Client.from_environment() as client:
        client.delete(f"/v1/webhooks/{segment(webhook)}")
    if as_json:
        show_json({"deleted": webhook})
    else:
        print(f"deleted {webhook}")


@app.command()
def rotate(webhook: Id, as_json: AsJson = False) -> None:
    """Make a new secret for a webhook and print it. The former signs for a day more."""
    from cli.client import Client

    with Client.from_environment() as client:
        found = client.post(f"/v1/webhooks/{segment(webhook)}/rotate", {})
    if as_json:
        show_json(found)
    else:
        print(found["secret"])


@app.command()
def secret(
    rotate_: Annotated[
        bool, typer.Option("--rotate", help="Make a new one; the former signs for a day more.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the secret that deliveries to a webhook_url are signed with, for the only time."""
    from cli.client import Client

    with Client.from_environment() as client:
        found = client.post("/v1/webhooks/secret", {"rotate": rotate_})
    if as_json:
        show_json(found)
    elif found["secret"] is None:
        shown = datetime.fromtimestamp(found["shown_at"], UTC)
        raise LorryError(
            f"the secret was shown on {shown:%Y-%m-%d %H:%M:%S} UTC, and is shown once; "
            "`lorry webhooks secret --rotate` makes a new one"
        )
    else:
        print(found["secret"])


@app.command()
def test(webhook: Id, as_json: AsJson = False) -> None:
    """Send a test event to a webhook, and print its delivery."""
    from cli.client import Client

    with Client.from_environment() as client:
        delivery = client.post(f"/v1/webhooks/{segment(webhook)}/test", {})
        for _ in range(50):
            if delivery["attempts"] or delivery["state"] != "pending":
                break
            time.sleep(0.2)
            delivery = client.get(f"/v1/deliveries/{delivery['id']}")
    _show_delivery(delivery, as_json=as_json)


@app.command()
def deliveries(
    webhook: Annotated[str | None, typer.Argument(help="Of this webhook; without it, all.")] = None,
    state: State = None,
    subject: Annotated[str | None, typer.Option(help="Of this job, batch, …")] = None,
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(help="Begin behind this delivery.")] = None,
    as_json: AsJson = False,
) -> None:
    """List deliveries, newest first."""
    from cli.client import Client

    path = "/v1/deliveries" if webhook is None else f"/v1/webhooks/{segment(webhook)}/deliveries"
    with Client.from_environment() as client:
        page = client.get(path, state=state, subject=subject, limit=limit, after=after)
    rows = [{**each, **_latest(each)} for each in page["data"]]
    columns = ("id", "type", "subject", "state", "tries", "last", "created_at", "next_attempt_at")
    shown = page["data"] if as_json else rows
    show_rows(shown, columns, as_json=as_json, none="no deliveries")


@app.command()
def delivery(
    delivery_id: Annotated[str, typer.Argument(help="The delivery's id.")],
    as_json: AsJson = False,
) -> None:
    """Show a delivery with its attempts."""
    from cli.client import Client

    with Client.from_environment() as client:
        found = client.get(f"/v1/deliveries/{segment(delivery_id)}")
    _show_delivery(found, as_json=as_json)


@app.command()
def replay(
    delivery_id: Annotated[
        str | None, typer.Argument(help="One delivery; without it, --since is needed.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="All that failed since: 30m, 6h, 2d ago, unix seconds or a date."),
    ] = None,
    webhook: Annotated[str | None, typer.Option(help="With --since: of this webhook.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send a delivery once more, or all that failed since a time, under their old event ids."""
    from cli.client import Client

    if (delivery_id is None) == (since is None):
        raise UsageError("give the id of one delivery, or --since for all that failed")
    if delivery_id is not None:
        with Client.from_environment() as client:
            found = client.post(f"/v1/deliveries/{segment(delivery_id)}/replay", {})
        _show_delivery(found, as_json=as_json)
        return
    assert since is not None
    path = "/v1/deliveries/replay" if webhook is None else f"/v1/webhooks/{segment(webhook)}/replay"
    with Client.from_environment() as client:
        answer = client.post(path, {"since": moment(since)})
    if as_json:
        show_json(answer)
    else:
        print(f"{answer['replayed']} are sent once more")


def event_names(text: str) -> list[str]:
    """Events as an option names them; `all` is every one."""
    if text == "all":
        return [event.value for event in EventType]
    return [name.strip() for name in text.split(",") if name.strip()]


def moment(text: str, now: float | None = None) -> float:
    """Unix seconds of `6h` (ago), of seconds, or of a date in ISO 8601 (UTC without a zone)."""
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return max(0.0, (time.time() if now is None else now) - int(ago[1]) * _UNITS[ago[2]])
    try:
        return float(text)
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"--since {text!r}: give 30m, 6h or 2d, unix seconds, or a date such as 2026-05-01"
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _latest(delivery: dict[str, Any]) -> dict[str, Any]:
    attempts = delivery["attempts"]
    last = attempts[-1] if attempts else None
    said = None if last is None else last["status"] or last["error"]["code"]
    return {"tries": len(attempts), "last": said}


def _show_delivery(delivery: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(delivery)
        return
    target = delivery["url"] or delivery["webhook"]
    print(f"{delivery['id']} {delivery['type']} {delivery['subject']} to {target}")
    for attempt in delivery["attempts"]:
        at = datetime.fromtimestamp(attempt["started_at"], UTC)
        said = attempt["status"] or attempt["error"]["message"]
        print(f"  {attempt['attempt']}. {at:%Y-%m-%d %H:%M:%S} {attempt['seconds']:.2f} s: {said}")
        if attempt["response"]:
            print(f"     {' '.join(attempt['response'].split())[:200]}")
    print(delivery["state"])
