"""Cron rules in a time zone: which moments they name, also on the nights when clocks change.

The `cronsim` library reads a rule and lists its wall-clock times; what a wall-clock time means in a
zone is decided here, since no library lets one choose: see
docs/decisions/0018-cron-rules-and-clock-changes.md.
"""

import heapq
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from core.errors import InvalidRequest

LONGEST_RULE: Final = 200
#: Names that stand for rules, as in Vixie cron.
NICKNAMES: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_FIELDS: Final = (
    ("minute", "0 to 59"),
    ("hour", "0 to 23"),
    ("day of month", "1 to 31, L for the last day, LW for the last weekday"),
    ("month", "1 to 12 or JAN to DEC"),
    ("day of week", "0 to 7 or SUN to SAT, 5L for the last Friday, MON#1 for the first Monday"),
)
_ANY_TIME: Final = datetime(2000, 1, 1)  # noqa: DTZ001  wall-clock times have no zone


class DstGap(StrEnum):
    """What becomes of a wall-clock time that the clocks skip."""

    #: the moment at which the skipped hour ends
    AFTER = "after"
    SKIP = "skip"


class DstFold(StrEnum):
    """Which of two moments a wall-clock time means that the clocks show twice."""

    FIRST = "first"
    SECOND = "second"
    BOTH = "both"


def check_cron(text: str) -> str:
    """The rule with its nickname replaced and its spaces single.

    Raises:
        InvalidRequest: it is no rule of five fields, or it names no day that there is.
    """
    if len(text) > LONGEST_RULE:
        raise _refused(text, f"is longer than {LONGEST_RULE} characters; shorten it")
    if text.strip().startswith("@"):
        rule = NICKNAMES.get(text.strip().lower())
        if rule is None:
            raise _refused(text, f"is no nickname; give one of {', '.join(NICKNAMES)}")
        return rule
    parts = text.split()
    if len(parts) != len(_FIELDS):
        raise _refused(
            text,
            f"has {len(parts)} fields; give five: minute, hour, day of month, month, day of week",
        )
    for position, part in enumerate(parts):
        alone = ["*"] * len(_FIELDS)
        alone[position] = part
        if not _is_rule(alone):
            name, allowed = _FIELDS[position]
            raise _refused(text, f"has the {name} {part!r}, which is none; give {allowed}")
    rule = " ".join(parts)
    if not _is_rule(parts) or next(_wall_times(rule, _ANY_TIME), None) is None:
        raise _refused(
            text,
            f"never fires: no date has the day of month {parts[2]!r}, the month {parts[3]!r} and "
            f"the day of week {parts[4]!r}; correct them",
        )
    return rule


def check_zone(name: str) -> ZoneInfo:
    """The IANA time zone of this name. Raises InvalidRequest."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidRequest(
            f"timezone {name[:80]!r} is not known; give an IANA name such as 'Europe/Berlin' or "
            "'UTC'",
            field="timezone",
        ) from None


def follows_elapsed_time(rule: str) -> bool:
    """Whether a rule is one of "every so often": its minute or hour field begins with a star.

    Such a rule runs on through a change of the clocks as if there were none.
    """
    minute, hour = rule.split()[:2]
    return minute.startswith("*") or hour.startswith("*")


def firings(
    rule: str, zone: ZoneInfo, after: datetime, gap: DstGap, fold: DstFold
) -> Iterator[datetime]:
    """The moments of a rule behind `after`, in UTC, each once, in order.

    Args:
        rule: as `check_cron` gave it.
        after: aware.
        gap, fold: of no meaning where the rule follows elapsed time: it skips and has both.
    """
    if follows_elapsed_time(rule):
        gap, fold = DstGap.SKIP, DstFold.BOTH
    local = after.astimezone(zone).replace(tzinfo=None, microsecond=0)
    # in the second pass of a fold, times before this one come again; in the first, they will
    shift = max(_moment(local, zone, 1) - _moment(local, zone, 0), timedelta())
    passes = {DstFold.FIRST: (0,), DstFold.SECOND: (1,), DstFold.BOTH: (0, 1)}[fold]
    merged = heapq.merge(
        *(_moments(rule, local - shift - timedelta(seconds=1), zone, gap, each) for each in passes)
    )
    last = after
    for moment in merged:
        if moment > last:
            yield moment
            last = moment


def _moments(
    rule: str, local: datetime, zone: ZoneInfo, gap: DstGap, fold: int
) -> Iterator[datetime]:
    """The moments of the wall-clock times behind `local`, rising (but a moment may come twice)."""
    for wall in _wall_times(rule, local):
        try:
            moment = _moment(wall, zone, fold)
        except OverflowError:
            return
        if moment.astimezone(zone).replace(tzinfo=None) == wall:
            yield moment
        elif gap is DstGap.AFTER:
            yield _end_of_gap(wall, zone)


def _wall_times(rule: str, after: datetime) -> Iterator[datetime]:
    try:
        yield from CronSim(rule, after)
    except (CronSimError, OverflowError, ValueError):
        return


def _moment(wall: datetime, zone: ZoneInfo, fold: int) -> datetime:
    return wall.replace(tzinfo=zone, fold=fold).astimezone(UTC)


def _end_of_gap(wall: datetime, zone: ZoneInfo) -> datetime:
    """The moment at which the gap that `wall` lies in ends: when the zone's offset changes."""
    early, late = _moment(wall, zone, 1), _moment(wall, zone, 0)
    before = early.astimezone(zone).utcoffset()
    while late - early > timedelta(seconds=1):
        middle = early + (late - early) // 2
        middle = middle.replace(microsecond=0)
        if middle.astimezone(zone).utcoffset() == before:
            early = middle
        else:
            late = middle
    return late


def _is_rule(parts: list[str]) -> bool:
    try:
        CronSim(" ".join(parts), _ANY_TIME)
    except (CronSimError, ValueError, AssertionError, IndexError, TypeError):
        return False
    return True


def _refused(text: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"cron {text[:LONGEST_RULE]!r} {why}", field="cron")
