"""The body of POST and PATCH /v1/schedules: when, what, and what to do when things go wrong."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import orjson
from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from core import priority
from core.batch_request import BatchRequest, ExpiresAfter, Window, window_seconds
from core.cron import DstFold, DstGap, check_cron, check_zone
from core.errors import InvalidRequest
from core.ids import IdPrefix, parse_id
from core.invalid import FieldError, field_errors, invalid_request
from core.json_values import Uncarriable, check_value
from core.request_body import MetadataKey, MetadataValue, ModelName, Strict, WebhookUrl
from core.schedule_rules import Missed, Overlap, Rule

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DAY: Final = 86_400
LONGEST_INTERVAL: Final = 366 * _DAY
DEFAULT_ENDPOINT: Final = "/v1/chat/completions"
#: Fields of which one replaces the others where a change names it.
RULES: Final = ("cron", "every_seconds", "at")
INPUTS: Final = ("input_file_id", "requests", "template", "endpoint")


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise PydanticCustomError(
            "lorry",
            "must be 1 to 128 letters, digits, '.', '_' and '-', beginning with a letter or digit",
        )
    return text


def _carriable(value: Any) -> Any:
    try:
        return check_value(value)
    except Uncarriable as error:
        raise PydanticCustomError("lorry", "{clause}", {"clause": str(error)}) from None


Moment = Annotated[float, Field(ge=0)]
Requests = Annotated[list[dict[str, Any]], Field(min_length=1)]


class ScheduleBody(Strict):
    """What POST /v1/schedules takes. Times are unix seconds."""

    name: Annotated[str, AfterValidator(_name)] | None = Field(None, description="yours, unique")

    cron: str | None = Field(None, description="five fields, or @daily and the like")
    timezone: str | None = Field(None, description="an IANA zone; UTC by default")
    every_seconds: int | None = Field(None, ge=1, le=LONGEST_INTERVAL)
    at: Moment | None = Field(None, description="once, then")
    start_at: Moment | None = Field(None, description="nothing fires before")
    end_at: Moment | None = Field(None, description="nothing fires behind")
    dst_gap: Literal["after", "skip"] | None = None
    dst_fold: Literal["first", "second", "both"] | None = None

    input_file_id: str | None = Field(None, max_length=100)
    requests: Requests | None = Field(None, description="bodies, or {custom_id, body}")
    template: Annotated[dict[str, Any], AfterValidator(_carriable)] | None = Field(
        None, description="a body whose texts name columns of the file's rows: {text}"
    )
    endpoint: Literal["/v1/chat/completions", "/v1/completions"] | None = None
    model: ModelName | None = Field(None, description="of requests that name none")
    priority: int | None = Field(None, ge=priority.LOWEST, le=priority.HIGHEST)
    completion_window: Window | None = None
    skip_invalid: bool | None = None
    output_expires_after: ExpiresAfter | None = None
    webhook_url: WebhookUrl | None = Field(
        None, description="told of each run's batch, and of runs that fail"
    )
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)

    missed: Literal["skip", "latest", "all"] | None = None
    catch_up_seconds: int | None = Field(None, ge=60, le=366 * _DAY)
    overlap: Literal["allow", "skip", "queue", "cancel_previous"] | None = None
    pause_after_failures: int | None = Field(None, ge=0, le=1000, description="0 is never")
    jitter_seconds: int | None = Field(None, ge=0, le=_DAY)
    enabled: bool | None = None


@dataclass(frozen=True, slots=True)
class ScheduleRequest:
    """A valid schedule, every default filled in.

    Args:
        rule: without the grid of an interval, which begins when the schedule is made.
        input_file: the id as it was given, if it was.
        endpoint: None where the requests themselves tell.
        pause_after_failures: None is never.
    """

    name: str | None
    rule: Rule
    input_file: str | None
    input_file_id: UUID | None
    requests: list[dict[str, Any]] | None
    template: dict[str, Any] | None
    endpoint: str | None
    model: str | None
    priority: int | None
    completion_window: str
    window_seconds: int
    skip_invalid: bool
    output_expires_seconds: int | None
    webhook_url: str | None
    metadata: dict[str, str] | None
    missed: Missed
    catch_up_seconds: int
    overlap: Overlap
    pause_after_failures: int | None
    jitter_seconds: int
    enabled: bool


DEFAULTS: Final[Mapping[str, Any]] = {
    "timezone": "UTC",
    "dst_gap": "after",
    "dst_fold": "first",
    "completion_window": "24h",
    "missed": "latest",
    "catch_up_seconds": 7 * _DAY,
    "overlap": "allow",
    "pause_after_failures": 10,
    "jitter_seconds": 0,
    "enabled": True,
    "skip_invalid": False,
}


def check_schedule(given: Mapping[str, Any], *, has_input: bool = False) -> ScheduleRequest:
    """Check a body that was read already.

    Args:
        has_input: what is to be run is known already, and `given` need not say.

    Raises:
        InvalidRequest: naming every wrong field, its value and the remedy.
    """
    try:
        body = ScheduleBody.model_validate(given)
    except ValidationError as error:
        known = list(ScheduleBody.model_fields)
        raise invalid_request(field_errors(error.errors(include_url=False), known)) from None
    filled: dict[str, Any] = {
        name: default if (found := getattr(body, name)) is None else found
        for name, default in DEFAULTS.items()
    }
    check_inputs(body, has_input=has_input)
    seconds = window_seconds(filled["completion_window"])
    assert seconds is not None
    file, expiry = body.input_file_id, body.output_expires_after
    return ScheduleRequest(
        name=body.name,
        rule=_rule(body, filled),
        input_file=file,
        input_file_id=None if file is None else parse_id(IdPrefix.FILE, file),
        requests=body.requests,
        template=body.template,
        endpoint=body.endpoint,
        model=body.model,
        priority=body.priority,
        completion_window=filled["completion_window"],
        window_seconds=seconds,
        skip_invalid=filled["skip_invalid"],
        output_expires_seconds=None if expiry is None else expiry.seconds,
        webhook_url=body.webhook_url,
        metadata=body.metadata,
        missed=Missed(filled["missed"]),
        catch_up_seconds=filled["catch_up_seconds"],
        overlap=Overlap(filled["overlap"]),
        pause_after_failures=filled["pause_after_failures"] or None,
        jitter_seconds=filled["jitter_seconds"],
        enabled=filled["enabled"],
    )


def merged(current: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's body with a change laid over it; null takes a field back to its default.

    A rule replaces the rule that was there, an input the input.
    """
    whole = dict(current)
    if any(change.get(name) is not None for name in RULES):
        whole |= dict.fromkeys(RULES)
    if change.get("requests") is not None:
        whole |= dict.fromkeys(INPUTS)
    if change.get("input_file_id") is not None:
        whole["requests"] = None
    whole.update(change)
    if "endpoint" not in change and (whole.get("template") or whole.get("requests")):
        whole["endpoint"] = None  # these tell it themselves
    return whole


def check_inputs(body: ScheduleBody, *, has_input: bool) -> None:
    """Exactly one thing to run."""
    given = [name for name in ("input_file_id", "requests") if getattr(body, name) is not None]
    if len(given) > 1:
        raise _refused("requests", "and input_file_id are both given; give one of them")
    if body.template is not None and "input_file_id" not in given:
        raise _refused("template", "needs input_file_id, a file whose rows it is filled with")
    if not given and not has_input:
        raise _refused("input_file_id", "is required (or requests); say what is to be run")


def _rule(body: ScheduleBody, filled: Mapping[str, Any]) -> Rule:
    given = [name for name in RULES if getattr(body, name) is not None]
    if len(given) != 1:
        said = "are all missing" if not given else f"cannot stand together ({', '.join(given)})"
        raise _refused("cron", f"every_seconds and at {said}; give exactly one of the three")
    check_zone(filled["timezone"])
    start_at, end_at = _moment("start_at", body.start_at), _moment("end_at", body.end_at)
    if start_at is not None and end_at is not None and end_at <= start_at:
        raise _refused(
            "end_at", f"{body.end_at:.0f} is not behind start_at, {body.start_at:.0f}; give a later"
            " end"
        )  # fmt: skip
    return Rule(
        timezone=filled["timezone"],
        cron=None if body.cron is None else check_cron(body.cron),
        every_seconds=body.every_seconds,
        at=_moment("at", body.at),
        start_at=start_at,
        end_at=end_at,
        dst_gap=DstGap(filled["dst_gap"]),
        dst_fold=DstFold(filled["dst_fold"]),
    )


def check_fires(rule: Rule, now: datetime) -> None:
    """Refuse a rule that has nothing left to fire for.

    Raises:
        InvalidRequest: naming why.
    """
    if rule.next_after(now) is not None:
        return
    if rule.at is not None and rule.at <= now:
        raise _refused("at", f"{_shown(rule.at)} has passed (now is {_shown(now)}); give a later")
    if rule.end_at is not None and rule.end_at <= now:
        raise _refused(
            "end_at", f"{_shown(rule.end_at)} has passed (now is {_shown(now)}); give a later end"
        )
    field = next(name for name in RULES if getattr(rule, name) is not None)
    raise _refused(
        field,
        "never fires between start_at "
        f"({_shown(rule.start_at) if rule.start_at else 'now'}) and end_at "
        f"({_shown(rule.end_at) if rule.end_at else 'never'}); widen them or correct the rule",
    )


def _shown(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _moment(field: str, seconds: float | None) -> datetime | None:
    if seconds is None:
        return None
    if seconds >= datetime(9000, 1, 1, tzinfo=UTC).timestamp():
        raise _refused(field, f"{seconds:.0f} is too far away; give unix seconds, not milliseconds")
    return datetime.fromtimestamp(seconds, UTC)


def _refused(field: str, clause: str) -> InvalidRequest:
    return invalid_request([FieldError(field, clause)])


def batch_request(row: Mapping[str, Any]) -> BatchRequest:
    """What a run asks of POST /v1/batches, from the columns of its schedule."""
    metadata = row["metadata_text"]
    return BatchRequest(
        input_file="",
        input_file_id=row["input_file_id"],
        endpoint=row["endpoint"],
        completion_window=row["completion_window"],
        window_seconds=row["window_seconds"],
        metadata=None if metadata is None else orjson.loads(metadata),
        output_expires_seconds=row["output_expires_seconds"],
        skip_invalid=row["skip_invalid"],
        default_model=row["model"],
        default_priority=row["priority"],
        webhook_url=row["webhook_url"],
    )
