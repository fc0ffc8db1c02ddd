"""The body of POST /v1/jobs: read, checked, and made into the one form that is kept."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson
from pydantic import ValidationError

from core.generation import Endpoint
from core.invalid import FieldError, field_errors, invalid_request, shown
from core.json_text import parse_object
from core.request_body import DEFAULT_COMPLETION_TOKENS, ChatBody, CommonBody, CompletionBody
from core.webhook_addresses import Allowed
from core.webhook_url import UrlRefused, check_url

#: What an answer without max_tokens is expected to take, for sizing only.
EXPECTED_CHAT_TOKENS: Final = 512
CHARACTERS_PER_TOKEN: Final = 4
_LARGEST_COUNT: Final = 2**31 - 1

#: Fields that a job keeps beside the body that the engine sees.
OUR_FIELDS: Final = frozenset(
    {"model", "priority", "deadline", "metadata", "stream", "webhook_url"}
)

_NO_TOOLS: Final = "is not supported: answers are text; describe the tools in a message, or ask "
#: Fields of OpenAI's or vLLM's that people do send, each with what to do instead.
REFUSED: Final[Mapping[str, str]] = {
    "tools": _NO_TOOLS + "for JSON with response_format",
    "tool_choice": _NO_TOOLS + "for JSON with response_format",
    "functions": _NO_TOOLS + "for JSON with response_format",
    "function_call": _NO_TOOLS + "for JSON with response_format",
    "stream_options": "is not supported: answers are never streamed; remove it",
    "guided_json": "is not supported; give the schema as response_format",
    "structured_outputs": "is not supported; give the schema as response_format",
    "best_of": "is not supported; use n and choose yourself",
    "chat_template": "is not supported: the model's own template is used",
}


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A valid request.

    Args:
        body: what the engine sees: the given fields without Lorry's own, `max_completion_tokens`
            as `max_tokens`, no nulls.
        deadline: unix seconds, or None.
    """

    endpoint: Endpoint
    model: str
    body: Mapping[str, Any]
    priority: int
    deadline: float | None
    metadata: Mapping[str, str] | None
    webhook_url: str | None = None

    def body_json(self) -> str:
        """`body` as canonical JSON: sorted keys, no spaces."""
        return orjson.dumps(self.body, option=orjson.OPT_SORT_KEYS).decode()

    def metadata_json(self) -> str | None:
        """`metadata` as JSON, as the user ordered it."""
        return None if self.metadata is None else orjson.dumps(self.metadata).decode()

    def fingerprint(self) -> bytes:
        """SHA-256 over everything that was asked: equal for requests that mean the same."""
        whole = [self.model, self.body, self.priority, self.deadline, self.metadata]
        if self.webhook_url is not None:  # without one, as in every release before
            whole.append(self.webhook_url)
        return hashlib.sha256(orjson.dumps(whole, option=orjson.OPT_SORT_KEYS)).digest()

    def deadline_at(self, now: float) -> datetime | None:
        """The deadline as an aware time.

        Apart from parsing, since a repeat of an old request is answered with the old job even
        when the deadline has passed meanwhile.

        Args:
            now: unix seconds.

        Raises:
            InvalidRequest: it has passed, or lies beyond the year 9999.
        """
        if self.deadline is None:
            return None
        if self.deadline <= now:
            problem = f"{self.deadline:.0f} has passed (now is {now:.0f}); give a later time"
        elif self.deadline >= datetime.max.replace(tzinfo=UTC).timestamp():
            problem = f"{self.deadline:.0f} is too far away; give unix seconds, not milliseconds"
        else:
            return datetime.fromtimestamp(self.deadline, UTC)
        raise invalid_request([FieldError("deadline", problem, str(self.deadline))])

    def check_webhook(self, allowed: Allowed) -> None:
        """Refuse a `webhook_url` that names a forbidden address, or is not encrypted.

        Apart from parsing, since the operator's settings have a say in it.

        Raises:
            InvalidRequest: it cannot be used.
        """
        if self.webhook_url is not None:
            check_webhook_url(self.webhook_url, allowed)

    def check_context(self, max_model_len: int) -> None:
        """Refuse a request that cannot fit, whatever its text.

        Args:
            max_model_len: the model's context in tokens, prompt and answer together.

        Raises:
            InvalidRequest: `max_tokens`, or a prompt of token ids with it, is beyond the context.
        """
        prompt = self._prompt_token_ids()
        most = self.body.get("max_tokens")
        if most is not None and most >= max_model_len:
            raise invalid_request(
                [
                    FieldError(
                        "max_tokens",
                        f"{most} leaves no room for a prompt in the model's context of "
                        f"{max_model_len} tokens; give at most {max_model_len - 1}",
                        str(most),
                    )
                ]
            )
        needed = 1 if most is None else most
        if prompt is not None and len(prompt) + needed > max_model_len:
            raise invalid_request(
                [
                    FieldError(
                        "prompt",
                        f"of {len(prompt)} token ids and {needed} to answer are beyond the "
                        f"model's context of {max_model_len} tokens; shorten the prompt or lower "
                        "max_tokens",
                    )
                ]
            )

    def expected_tokens(self, max_model_len: int) -> int:
        """A guess at prompt and answers together, in tokens, for sizing what is fed at once."""
        most = self.body.get("max_tokens")
        if most is None:
            guess = DEFAULT_COMPLETION_TOKENS
            most = guess if self.endpoint == "completion" else EXPECTED_CHAT_TOKENS
        answer = min(most, max_model_len) * self.body.get("n", 1)
        return int(min(self._prompt_tokens() + answer, _LARGEST_COUNT))

    def _prompt_tokens(self) -> int:
        token_ids = self._prompt_token_ids()
        if token_ids is not None:
            return len(token_ids)
        if self.endpoint == "completion":
            characters = len(self.body["prompt"])
        else:
            characters = sum(_text_length(message) for message in self.body["messages"])
        return 1 + characters // CHARACTERS_PER_TOKEN

    def _prompt_token_ids(self) -> Sequence[int] | None:
        prompt = self.body.get("prompt")
        return prompt if isinstance(prompt, list) else None


def check_webhook_url(url: str, allowed: Allowed, field: str = "webhook_url") -> None:
    """Raise InvalidRequest, naming `field`, where webhooks may not go to `url`."""
    try:
        check_url(url, allowed)
    except UrlRefused as error:
        raise invalid_request([FieldError(field, str(error), shown(url))]) from None


def _text_length(message: Mapping[str, Any]) -> int:
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def parse_job_request(raw: bytes) -> JobRequest:
    """Read and check the body of POST /v1/jobs.

    Raises:
        InvalidRequest: naming field, value and remedy; `details["errors"]` lists every error as
            {field, message, value?}.
    """
    return check_job_request(parse_object(raw))


def check_job_request(given: dict[str, Any]) -> JobRequest:
    """Check what was read already; `given` is used up. Raises like `parse_job_request`."""
    errors = _take_refused(given)
    kind = _body_class(given, errors)
    if kind is not None:
        try:
            body = kind.model_validate(given)
        except ValidationError as error:
            known = [field.alias or name for name, field in kind.model_fields.items()]
            errors += field_errors(error.errors(include_url=False), known)
    if errors:
        raise invalid_request(errors)
    return _request_of(body, given)


def _take_refused(given: dict[str, Any]) -> list[FieldError]:
    """Take out the fields that are refused with a remedy of their own, and say so of each."""
    errors = []
    for name, clause in REFUSED.items():
        value = given.pop(name, None)
        if value is not None:
            errors.append(FieldError(name, clause, shown(value)))
    if given.get("stream") is True:
        del given["stream"]
        remedy = "poll the job with ?wait=30 instead"
        errors.append(
            FieldError("stream", f"is true, but answers are never streamed; {remedy}", "true")
        )
    prompt = given.get("prompt")
    if isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt[:1]):
        errors.append(
            FieldError("prompt", "is a list of prompts; send one job for each", shown(prompt))
        )
    return errors


def _body_class(given: dict[str, Any], errors: list[FieldError]) -> type[CommonBody] | None:
    """Which of the two kinds of request this is; None, with an error added, if that is unclear."""
    for name in ("messages", "prompt"):
        if given.get(name, 0) is None:  # null is what clients send for "not given"
            del given[name]
    if "messages" in given and "prompt" in given:
        errors.append(
            FieldError(
                "messages",
                "and prompt are both given; give messages for a chat or prompt for a completion",
            )
        )
        return None
    if "messages" in given:
        return ChatBody
    if "prompt" not in given:
        errors.append(
            FieldError("messages", "is required (or prompt, for a completion); add one of them")
        )
        return None
    # a list of prompts was refused already: its items would only be reported once more
    return None if errors and errors[-1].field == "prompt" else CompletionBody


def _request_of(body: CommonBody, given: Mapping[str, Any]) -> JobRequest:
    kept = {name: getattr(body, name) for name in body.model_fields_set - OUR_FIELDS}
    kept = {name: value for name, value in kept.items() if value is not None}
    most = kept.pop("max_completion_tokens", None)
    if most is not None:
        kept["max_tokens"] = most
    if "response_format" in kept:
        kept["response_format"] = given["response_format"]
    if "messages" in kept:
        kept["messages"] = [_without_nulls(message) for message in given["messages"]]
    return JobRequest(
        endpoint="chat" if isinstance(body, ChatBody) else "completion",
        model=body.model,
        body=kept,
        priority=body.priority or 0,
        deadline=body.deadline,
        metadata=body.metadata,
        webhook_url=body.webhook_url,
    )


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}
