"""What people have, made into the lines of a batch: JSON lines, plain text, tables."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from core.errors import UsageError
from core.row_templates import JSON_SUFFIXES, LONGEST_CELL, TABLES, UnknownColumn
from core.row_templates import fill as filled

CHAT_URL: Final = "/v1/chat/completions"
COMPLETION_URL: Final = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a line gets where it says nothing itself.

    Args:
        template: how a prompt is made of a row's columns, such as `Summarise: {text}`.
        completion: whether a prompt is continued rather than answered.
        fields: further fields of the body.
        model_later: leave out the model where a line names none; who runs it will say.
    """

    model: str | None = None
    system: str | None = None
    template: str | None = None
    completion: bool = False
    fields: Mapping[str, Any] | None = None
    model_later: bool = False


def write_lines(
    source: Path, target: IO[str], defaults: Defaults, *, keep_bad: bool = False
) -> tuple[str, int]:
    """Write a file's prompts as the lines of a batch, each in the place of its own line.

    So a line that the API complains about is the line of the source.

    Args:
        target: opened with `errors="surrogateescape"` where bad lines are kept.
        keep_bad: pass JSON lines that cannot be used on as they are, for the API to set apart.

    Returns:
        The endpoint that they are for, and how many there are.

    Raises:
        UsageError: a line that cannot be made into one, with its number.
    """
    endpoint, count, last = None, 0, 0
    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            for number, given, raw in _given(file, source.suffix.lower(), defaults.template):
                try:
                    line = _line(number, given, defaults)
                    if endpoint not in (None, line["url"]):
                        raise _BadLine(
                            number,
                            f"a batch has one endpoint, and {line['url']} is not {endpoint}",
                        )
                    endpoint, text = line["url"], _json(line)
                except _BadLine:
                    if raw is None or not keep_bad:
                        raise
                    text = raw.strip()
                target.write("\n" * (number - last - 1) + text + "\n")
                count, last = count + 1, number
        except csv.Error as error:
            raise UsageError(f"{source} cannot be read as a table: {error}") from None
        except _BadLine as error:
            raise UsageError(f"{source}, line {error.number}: {error}") from None
    if not count:
        raise UsageError(f"{source} holds no prompts")
    return endpoint or CHAT_URL, count


def _json(line: Mapping[str, Any]) -> str:
    """A line as JSON; what UTF-8 cannot carry stays escaped, for the API to judge."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(line)
    return text


class _BadLine(Exception):
    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def _given(
    file: IO[str], suffix: str, template: str | None
) -> Iterator[tuple[int, Any, str | None]]:
    """Each line's number with what it holds (an object, a prompt, or why not) and its JSON."""
    if suffix in TABLES:
        csv.field_size_limit(LONGEST_CELL)
        texts = (_checked(number, text) for number, text in enumerate(file, 1))
        rows = csv.DictReader(texts, delimiter=TABLES[suffix])
        for row in rows:
            yield rows.line_num, _prompt_of_row(rows.line_num, row, template), None
        return
    for number, text in enumerate(file, 1):
        if not text.strip():
            continue
        if suffix not in JSON_SUFFIXES:
            prompt = _checked(number, text).rstrip("\r\n")
            if template is not None:
                prompt = fill(number, template, {"text": prompt})
            yield number, prompt, None
            continue
        given: Any
        try:
            given = json.loads(_checked(number, text))
            if template is not None and isinstance(given, dict) and "body" not in given:
                given = fill(number, template, given)
        except (ValueError, RecursionError) as error:
            given = _BadLine(number, f"not JSON: {error}")
        except _BadLine as error:
            given = error
        yield number, given, text


def _checked(number: int, text: str) -> str:
    """A line of the source, unless it holds bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadLine(number, "not UTF-8; save the file as UTF-8") from None
    return text


def _prompt_of_row(number: int, row: Mapping[str, Any], template: str | None) -> str:
    if template is not None:
        return fill(number, template, row)
    if row.get("prompt"):
        return str(row["prompt"])
    columns = ", ".join(str(name) for name in row if name is not None)
    raise _BadLine(
        number, f"which column is the prompt? Give --template 'Summarise: {{text}}' ({columns})"
    )


def fill(number: int, template: str, columns: Mapping[str, Any]) -> str:
    """`template` filled with a row's columns."""
    try:
        return filled(template, columns)
    except UnknownColumn as error:
        raise _BadLine(number, f"--template {error}") from None


def _line(number: int, given: Any, defaults: Defaults) -> dict[str, Any]:
    if isinstance(given, _BadLine):
        raise given
    if isinstance(given, dict) and "body" in given:
        body = given["body"]
        if isinstance(body, dict):
            given = {**given, "body": _with_defaults(number, body, defaults)}
        return {"custom_id": f"line-{number}", "method": "POST", "url": CHAT_URL, **given}
    if isinstance(given, str):
        body = _body_of_prompt(given, defaults)
    elif isinstance(given, dict) and "messages" in given:
        body = given
    elif isinstance(given, dict) and isinstance(given.get("prompt"), str):
        rest = {name: value for name, value in given.items() if name != "prompt"}
        body = {**rest, **_body_of_prompt(given["prompt"], defaults)}
    else:
        raise _BadLine(
            number, "give a batch line, a body with messages or prompt, or a text in quotes"
        )
    custom_id = body.pop("custom_id", f"line-{number}")
    url = CHAT_URL if "messages" in body else COMPLETION_URL
    body = _with_defaults(number, body, defaults)
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def _body_of_prompt(prompt: str, defaults: Defaults) -> dict[str, Any]:
    if defaults.completion:
        return {"prompt": prompt}
    first = [] if defaults.system is None else [{"role": "system", "content": defaults.system}]
    return {"messages": [*first, {"role": "user", "content": prompt}]}


def _with_defaults(number: int, body: Mapping[str, Any], defaults: Defaults) -> dict[str, Any]:
    whole = {**(defaults.fields or {}), **body}
    if "model" not in whole and not defaults.model_later:
        if defaults.model is None:
            raise _BadLine(number, "names no model; give --model")
        whole["model"] = defaults.model
    return whole


def in_input_order(
    custom_ids: Iterable[str | None], *sources: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Merge results, each source in the order of the input already, into that order.

    A result without a custom_id (of a line that could not be read) comes where its source has it.
    """
    heads = [next(source, None) for source in sources]

    def take(index: int) -> dict[str, Any]:
        head = heads[index]
        assert head is not None
        heads[index] = next(sources[index], None)
        return head

    for custom_id in custom_ids:
        for index in range(len(sources)):
            while (head := heads[index]) is not None and head.get("custom_id") is None:
                yield take(index)
        for index in range(len(sources)):
            head = heads[index]
            if head is not None and head.get("custom_id") == custom_id:
                yield take(index)
                break
    for index in range(len(sources)):
        while heads[index] is not None:
            yield take(index)
