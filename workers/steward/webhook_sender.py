"""Sending webhooks: look, claim, send many at once, record in small batches.

Nothing here holds a transaction while it sends, and nothing waits for one receiver but its own
line. Any number of stewards may send.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from core.errors import Unavailable
from core.ids import IdPrefix, format_id
from core.settings import Settings
from core.webhook_events import envelope
from core.webhook_retry import retry_delay
from core.webhook_signing import signed_headers
from core.webhook_url import UrlRefused, parse_url
from db import sending
from db.database import Database
from db.sending import ClaimedDelivery, Outcome
from workers.steward.webhook_client import CONNECT_SECONDS, Reply, SendFailed, WebhookClient
from workers.steward.webhook_plan import Limits, grants

log = logging.getLogger(__name__)

#: Pause between two looks while nothing waits.
LOOK_SECONDS: Final = 0.2
#: Shortest pause between two looks while much waits.
_BREATH_SECONDS: Final = 0.02
#: Outcomes are recorded together: those of so long, at most so many.
_FLUSH_SECONDS: Final = 0.02
_FLUSH_MOST: Final = 256
#: What recording may take beyond the longest attempt, before another sender takes over.
_SPARE_SECONDS: Final = 20.0
#: How long a stopping steward waits for answers.
STOP_SECONDS: Final = 5.0
#: Lines whose speed is remembered.
_REMEMBERED: Final = 10_000
_GONE: Final = 410
#: Receivers that ask for a pause get it for the whole line.
_BUSY: Final = frozenset({429, 503})
_LONGEST_PAUSE: Final = 300.0
_HEADERS: Final = {"Content-Type": "application/json", "User-Agent": "Lorry-Webhooks/1"}


class Sender:
    """A steward's sender. `act` is called on a timer; `close` ends it."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        client: WebhookClient | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._database = database
        self._client = client
        self._limits = limits or Limits()
        self._settings = settings
        self._public_url = settings.public_url or ""
        self._lease = settings.webhook_seconds + CONNECT_SECONDS + _SPARE_SECONDS
        self._tasks: dict[asyncio.Task[None], ClaimedDelivery] = {}
        self._by_line: Counter[int] = Counter()
        self._by_tenant: Counter[int] = Counter()
        self._seconds: dict[int, float] = {}
        self._failing: set[int] = set()
        self._outcomes: list[Outcome] = []
        self._flushing: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def act(self) -> None:
        """Send what is due; returns once a look finds nothing more that may be sent now."""
        while await self._round():
            self._changed.clear()
            # not wait_for: of Python 3.11 that one loses a cancellation that comes with the event
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._changed.wait()
            await asyncio.sleep(_BREATH_SECONDS)

    async def close(self) -> None:
        """Wait a moment for answers, record them, and let others send the rest."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=STOP_SECONDS)
        unfinished = list(self._tasks.items())
        for task, _ in unfinished:
            task.cancel()
        await asyncio.gather(*(task for task, _ in unfinished), return_exceptions=True)
        if self._flushing is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await self._flushing
        if unfinished:
            with suppress(Unavailable):
                await sending.release(self._database, [delivery for _, delivery in unfinished])
        if self._client is not None:
            await self._client.close()

    async def _round(self) -> bool:
        """One look and claim; whether there may be more to send as soon as a request ends."""
        lines = await sending.look(self._database)
        if not lines:
            return False
        self._failing.update(line.line for line in lines if line.failures)
        wanted = grants(
            lines,
            self._limits,
            by_line=self._by_line,
            by_tenant=self._by_tenant,
            seconds=lambda line: self._seconds.get(line, 0.0),
        )
        if not wanted:
            return bool(self._tasks)
        claimed = await sending.claim(self._database, wanted, self._lease)
        for delivery in claimed:
            self._start(delivery)
        return bool(claimed)

    def _start(self, delivery: ClaimedDelivery) -> None:
        task = asyncio.create_task(self._deliver(delivery))
        self._tasks[task] = delivery
        self._by_line[delivery.line] += 1
        self._by_tenant[delivery.tenant_id] += 1
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        delivery = self._tasks.pop(task)
        for counts, key in ((self._by_line, delivery.line), (self._by_tenant, delivery.tenant_id)):
            counts[key] -= 1
            if not counts[key]:
                del counts[key]
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("A delivery was not sent", exc_info=error, extra=_extra(delivery))

    async def _deliver(self, delivery: ClaimedDelivery) -> None:
        started_at, started = datetime.now(UTC), time.monotonic()
        reply: Reply | None = None
        error: str | None = None
        if delivery.url is None:
            error = "endpoint_disabled"
        else:
            try:
                reply = await self._send(delivery, delivery.url)
            except SendFailed as failed:
                error = failed.code
                log.warning("Webhook not sent: %s", failed.reason, extra=_extra(delivery))
        seconds = time.monotonic() - started
        if delivery.url is not None:
            self._remember(delivery.line, seconds)
        self._note(_outcome(delivery, started_at, seconds, reply, error))

    async def _send(self, delivery: ClaimedDelivery, url: str) -> Reply:
        try:
            target = parse_url(url)
        except UrlRefused as error:  # rules have become stricter since it was taken
            raise SendFailed("address", f"{url} {error}") from None
        counts = None if delivery.counts is None else orjson.loads(delivery.counts)
        body = envelope(
            event_id=delivery.event_id,
            event=delivery.type,
            created_at=delivery.created_at,
            subject=delivery.subject,
            told=delivery.told,
            counts=counts,
            link=delivery.link,
            public_url=self._public_url,
        )
        message_id = format_id(IdPrefix.EVENT, delivery.event_id)
        signed = signed_headers(delivery.secrets, message_id, datetime.now(UTC), body)
        return await self._open_client().post(target, {**_HEADERS, **signed}, body)

    def _open_client(self) -> WebhookClient:
        if self._client is None:
            settings = self._settings
            self._client = WebhookClient(settings.webhook_networks(), settings.webhook_seconds)
        return self._client

    def _remember(self, line: int, seconds: float) -> None:
        if len(self._seconds) >= _REMEMBERED:
            self._seconds.clear()
        before = self._seconds.get(line, seconds)
        self._seconds[line] = before + (seconds - before) / 8

    def _note(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        """Record outcomes until there are none; while Postgres is away they are kept."""
        try:
            await asyncio.sleep(_FLUSH_SECONDS)
            while self._outcomes:
                batch = self._outcomes[:_FLUSH_MOST]
                try:
                    disabled = await sending.record(self._database, batch, self._failing)
                except Unavailable as error:
                    log.warning("Outcomes wait: %s", error, extra={"action": "webhooks_wait"})
                    await asyncio.sleep(0.5)
                    continue
                except Exception:  # their leases run out, and they are sent again
                    log.exception("Outcomes lost", extra={"action": "webhooks_lost"})
                    disabled = []
                del self._outcomes[: len(batch)]
                self._learn(batch)
                for endpoint_id in disabled:
                    shown = format_id(IdPrefix.WEBHOOK, endpoint_id)
                    log.warning(
                        "Webhook disabled: its receiver is gone, or did nothing but fail for days",
                        extra={"action": "webhook_disabled", "webhook": shown},
                    )
        finally:
            self._flushing = None

    def _learn(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.state == "delivered":
                self._failing.discard(outcome.line)
            elif outcome.counts_against_line:
                self._failing.add(outcome.line)


def _outcome(
    delivery: ClaimedDelivery,
    started_at: datetime,
    seconds: float,
    reply: Reply | None,
    error: str | None,
) -> Outcome:
    """What an answer, or the lack of one, means for the delivery and its line."""
    common: dict[str, Any] = {
        "id": delivery.id,
        "attempt": delivery.attempt,
        "line": delivery.line,
        "endpoint_id": delivery.endpoint_id,
        "started_at": started_at,
        "seconds": round(seconds, 3),
        "error": error,
    }
    if reply is None and error == "endpoint_disabled":
        return Outcome(state="failed", delay_seconds=None, **common)
    if reply is not None:
        common |= {"status": reply.status, "response": reply.body}
        if 200 <= reply.status <= 299:
            return Outcome(state="delivered", delay_seconds=None, **common)
        if reply.status == _GONE:
            return Outcome(state="failed", delay_seconds=None, gone=True, **common)
    retry_after = None if reply is None else reply.retry_after
    delay = retry_delay(delivery.failures + 1, delivery.age_seconds + seconds, retry_after)
    pause = None
    if reply is not None and reply.status in _BUSY and retry_after is not None:
        pause = min(retry_after, _LONGEST_PAUSE)
    return Outcome(
        state="failed" if delay is None else "pending",
        delay_seconds=delay,
        pause_seconds=pause,
        **common,
    )


def _extra(delivery: ClaimedDelivery) -> dict[str, object]:
    """What a log line about a delivery carries."""
    return {
        "action": "webhook_failed",
        "delivery": format_id(IdPrefix.DELIVERY, delivery.id),
        "event": format_id(IdPrefix.EVENT, delivery.event_id),
        "attempt": delivery.attempt,
        "tenant": delivery.tenant_id,
    }
