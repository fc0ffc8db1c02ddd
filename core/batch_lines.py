"""A batch's input, line by line: split in bounded memory, read, and checked."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from core.batch_request import ENDPOINTS
from core.errors import InvalidRequest
from core.invalid import shown
from core.json_text import parse_object
from core.json_values import Uncarriable, check_text, replace_unstorable
from core.request import JobRequest, check_job_request

LONGEST_CUSTOM_ID: Final = 512
LONGEST_MESSAGE: Final = 1000
#: Fields of one body that are told about.
_TOLD: Final = 5
_BOM: Final = b"\xef\xbb\xbf"
_MEMBERS: Final = frozenset({"custom_id", "method", "url", "body"})


class RawLine(NamedTuple):
    """A line of the file, counted from 1. `content` is None where it was too long to keep."""

    number: int
    size: int
    content: bytes | None


@dataclass(frozen=True, slots=True)
class LineDefaults:
    """What a line gets that says nothing itself: a schedule's model and priority."""

    model: str | None = None
    priority: int | None = None

    def lay_under(self, body: dict[str, Any]) -> None:
        """Put in what `body` lacks."""
        for name, value in (("model", self.model), ("priority", self.priority)):
            if value is not None and body.get(name) is None:
                body[name] = value


@dataclass(frozen=True, slots=True)
class GoodLine:
    """A line that can become a job, as far as it tells by itself."""

    number: int
    custom_id: str
    request: JobRequest


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot, and why: a member of a batch's `errors`.

    Args:
        custom_id: where it could be read.
        param: the field that is wrong, or None.
    """

    number: int
    code: str
    message: str
    param: str | None = None
    custom_id: str | None = None

    def as_error(self) -> dict[str, Any]:
        """As OpenAI lists it."""
        return {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "line": self.number,
        }


class NoLine(Exception):
    """Why a line is none; the arguments are those of BadLine."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def split_lines(pieces: Iterable[bytes], longest: int) -> Iterator[RawLine]:
    """The lines in pieces of a file; blank ones are left out, but counted.

    Takes LF and CRLF, a byte order mark at the beginning, and a last line without an end.

    Args:
        longest: bytes of a line that are kept at most.
    """
    held: list[bytes] = []
    size, number, first = 0, 0, True
    for piece in pieces:
        start = 0
        while (end := piece.find(b"\n", start)) >= 0:
            part = piece[start:end]
            start = end + 1
            number += 1
            size += len(part)
            if size <= longest:
                held.append(part)
            line = _line(number, size, held, longest, first)
            held, size, first = [], 0, False
            if line is not None:
                yield line
        rest = piece[start:]
        size += len(rest)
        if size <= longest:
            held.append(rest)
        elif held:
            held = []  # too long: its beginning is of no use
    if size:
        line = _line(number + 1, size, held, longest, first)
        if line is not None:
            yield line


def _line(number: int, size: int, held: list[bytes], longest: int, first: bool) -> RawLine | None:
    if size > longest:
        return RawLine(number, size, None)
    content = held[0] if len(held) == 1 else b"".join(held)
    if first:
        content = content.removeprefix(_BOM)
    content = content.strip(b" \t\r")
    return RawLine(number, size, content) if content else None


class LineReader:
    """Reads the lines of one batch, and remembers every custom_id.

    Of an id its 64-bit hash is kept, salted anew in each process: a million ids take about 100 MB,
    and the chance that two of them are taken for one is 3 in 100 million (the batch would fail
    with a wrong error; sent again, it would not).
    """

    def __init__(
        self, endpoint: str, longest: int, defaults: LineDefaults = LineDefaults()
    ) -> None:
        self._url = endpoint
        self._kind = ENDPOINTS[endpoint]
        self._longest = longest
        self._defaults = defaults
        self._seen: dict[int, int] = {}

    def read(self, line: RawLine) -> GoodLine | BadLine:
        """Check a line. The first line with a custom_id has it; later ones are bad."""
        custom_id = None
        try:
            given = self._object(line)
            custom_id = _custom_id(given)
            self._check_fresh(custom_id, line.number)
            self._check_envelope(given)
            return GoodLine(line.number, custom_id, self._request(given))
        except NoLine as error:
            message = replace_unstorable(error.message[:LONGEST_MESSAGE])
            param = error.param and replace_unstorable(error.param[:LONGEST_MESSAGE])
            return BadLine(line.number, error.code, message, param, custom_id)

    def _object(self, line: RawLine) -> dict[str, Any]:
        if line.content is None:
            raise NoLine(
                "line_too_long",
                f"This line has {line.size} bytes; a line may have {self._longest} "
                "(LORRY_MAX_BODY_BYTES). Shorten it.",
            )
        try:
            return parse_object(line.content)
        except InvalidRequest as error:
            said = error.message.replace("the body", "it", 1)
            raise NoLine(
                "invalid_json_line", f"This line is not parseable as a JSON object: {said}."
            ) from None

    def _check_fresh(self, custom_id: str, number: int) -> None:
        first = self._seen.setdefault(hash(custom_id), number)
        if first != number:
            raise NoLine(
                "duplicate_custom_id",
                f"The custom_id {shown(custom_id)} of this line is that of line {first} too. "
                "Give every line its own.",
                "custom_id",
            )

    def _check_envelope(self, given: dict[str, Any]) -> None:
        method, url = given.get("method"), given.get("url")
        if method is None:
            raise _missing("method")
        if method != "POST":
            raise NoLine("invalid_method", f"The method {shown(method)} must be 'POST'.", "method")
        if url is None:
            raise _missing("url")
        if url != self._url:
            known = isinstance(url, str) and url in ENDPOINTS
            raise NoLine(
                "mismatched_endpoint" if known else "invalid_url",
                f"The url {shown(url)} must be the batch's endpoint, {self._url!r}; "
                "a batch has one endpoint.",
                "url",
            )
        if "body" not in given:
            raise _missing("body")
        if not isinstance(given["body"], dict):
            raise NoLine(
                "invalid_request",
                f"The body must be a JSON object, not {shown(given['body'])}.",
                "body",
            )
        for name in given:
            if name not in _MEMBERS:
                raise NoLine(
                    "unknown_parameter",
                    f"{shown(name)} is not a member of a line: those are custom_id, method, url "
                    "and body. Remove it.",
                    name[:80].encode("utf-8", "backslashreplace").decode(),
                )

    def _request(self, given: dict[str, Any]) -> JobRequest:
        self._defaults.lay_under(given["body"])
        try:
            request = check_job_request(given["body"])
        except InvalidRequest as error:
            field = error.details.get("field")
            raise NoLine(
                "invalid_request", _all_of(error), f"body.{field}" if field else "body"
            ) from None
        if request.endpoint != self._kind:
            needed = "messages" if self._kind == "chat" else "prompt"
            raise NoLine(
                "invalid_request", f"{needed} is required for {self._url}; add it.", "body"
            )
        if request.webhook_url is not None:
            raise NoLine(
                "invalid_request",
                "webhook_url is the batch's: give it with POST /v1/batches, and remove it here.",
                "body.webhook_url",
            )
        return request


def _custom_id(given: dict[str, Any]) -> str:
    custom_id = given.get("custom_id")
    if custom_id is None:
        raise _missing("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= LONGEST_CUSTOM_ID:
        raise NoLine(
            "invalid_custom_id",
            f"The custom_id must be a string of 1 to {LONGEST_CUSTOM_ID} characters, "
            f"not {shown(custom_id)}.",
            "custom_id",
        )
    try:
        return check_text(custom_id)
    except Uncarriable as error:
        raise NoLine("invalid_custom_id", f"The custom_id {error}.", "custom_id") from None


def _all_of(error: InvalidRequest) -> str:
    """What is wrong with a body, each field named; there is no other place to look it up."""
    found = error.details.get("errors")
    if not isinstance(found, list):
        return error.message
    said = [f"{each['field']} {each['message']}".strip() for each in found[:_TOLD]]
    more = len(found) - len(said)
    return "; ".join(said) + (f"; and {more} more" if more else "")


def _missing(name: str) -> NoLine:
    return NoLine("missing_required_parameter", f"This line has no {name}; add it.", name)
