"""When a schedule fires, and which of the firings that are due become runs."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final
from zoneinfo import ZoneInfo

from core import cron
from core.cron import DstFold, DstGap

#: A firing noticed later than this is missed: no steward ran.
MISSED_AFTER: Final = timedelta(seconds=60)
#: Firings of one schedule that are looked at in one transaction; the rest come in the next.
MOST_DUE: Final = 1000
#: Of the firings that are passed over at once, so many of the latest are recorded.
MOST_RECORDED: Final = 100
_MICROSECOND: Final = timedelta(microseconds=1)


class Missed(StrEnum):
    """What becomes of firings at which no steward was there."""

    SKIP = "skip"
    LATEST = "latest"
    ALL = "all"


class Overlap(StrEnum):
    """What a run does while the batch of an earlier one is not finished."""

    ALLOW = "allow"
    SKIP = "skip"
    QUEUE = "queue"
    CANCEL_PREVIOUS = "cancel_previous"


class RunState(StrEnum):
    """Where a run stands."""

    PENDING = "pending"
    QUEUED = "queued"
    STARTED = "started"
    FINISHED = "finished"
    FAILED = "failed"
    SKIPPED = "skipped"


class SkipReason(StrEnum):
    """Why a run was skipped."""

    MISSED = "missed"
    OVERLAP = "overlap"
    REQUESTED = "requested"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Rule:
    """When a schedule fires: by a cron rule, every so often, or once. Exactly one is given.

    Args:
        anchor_at: where an interval's grid begins: it fires at whole intervals from there.
        start_at, end_at: no firing before or behind these; one at either counts.
    """

    timezone: str
    cron: str | None = None
    every_seconds: int | None = None
    at: datetime | None = None
    anchor_at: datetime | None = None
    start_at: datetime | None = None
    end_at: datetime | None = None
    dst_gap: DstGap = DstGap.AFTER
    dst_fold: DstFold = DstFold.FIRST

    def firings(self, after: datetime) -> Iterator[datetime]:
        """The moments behind `after`, in order, in UTC."""
        if self.start_at is not None:
            after = max(after, self.start_at - _MICROSECOND)
        for moment in self._unbounded(after):
            if self.end_at is not None and moment > self.end_at:
                return
            yield moment

    def next_after(self, after: datetime) -> datetime | None:
        """The first moment behind `after`."""
        return next(self.firings(after), None)

    def _unbounded(self, after: datetime) -> Iterator[datetime]:
        if self.cron is not None:
            zone = ZoneInfo(self.timezone)
            yield from cron.firings(self.cron, zone, after, self.dst_gap, self.dst_fold)
        elif self.every_seconds is not None:
            assert self.anchor_at is not None
            every = timedelta(seconds=self.every_seconds)
            whole = max(0, (after - self.anchor_at) // every + 1)
            try:
                moment = self.anchor_at + whole * every
                while True:
                    yield moment
                    moment += every
            except OverflowError:
                return
        elif self.at is not None and self.at > after:
            yield self.at


@dataclass(frozen=True, slots=True)
class Due:
    """What a look at a schedule found.

    Args:
        run: firings that become runs.
        skipped: the latest of those that are passed over.
        missed: how many are passed over.
        next_fire_at: the first one not looked at, which may be due too; None where there is none.
    """

    run: list[datetime]
    skipped: list[datetime]
    missed: int
    next_fire_at: datetime | None


def take_due(
    rule: Rule,
    first: datetime,
    now: datetime,
    missed: Missed,
    catch_up_seconds: int,
    limit: int = MOST_DUE,
) -> Due:
    """Divide the firings from `first` up to `now`.

    A firing is missed when it is noticed more than `MISSED_AFTER` late, or when the next one is
    due already.

    Args:
        first: the earliest that was not looked at yet; it is due.
        catch_up_seconds: how old a missed firing may be to run under `ALL`.
    """
    firings = itertools.chain([first], rule.firings(first))
    due: list[datetime] = []
    upcoming = None
    for moment in firings:
        if moment > now or len(due) == limit:
            upcoming = moment
            break
        due.append(moment)
    window = max(timedelta(seconds=catch_up_seconds), MISSED_AFTER)
    if missed is Missed.ALL:
        run = [moment for moment in due if now - moment <= window]
    elif upcoming is not None and upcoming <= now:
        run = []  # later ones are due: these are none of the latest
    else:
        run = due[-1:]
        if missed is Missed.SKIP and now - run[0] > MISSED_AFTER:
            run = []
    passed = due[: len(due) - len(run)]
    return Due(run, passed[-MOST_RECORDED:], len(passed), upcoming)


def due_at(schedule_id: bytes, fire_at: datetime, jitter_seconds: int) -> datetime:
    """When a run may start: its firing, and a share of the jitter that is always the same."""
    if not jitter_seconds:
        return fire_at
    seed = schedule_id + fire_at.astimezone(UTC).isoformat().encode()
    share = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest()) / 2**64
    return fire_at + timedelta(seconds=round(share * jitter_seconds, 3))
