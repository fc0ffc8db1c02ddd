"""Rows of a file, and requests made of them by a template."""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any, Final

JSON_SUFFIXES: Final = frozenset({".jsonl", ".ndjson", ".json"})
TABLES: Final = {".csv": ",", ".tsv": "\t"}
#: Python's own limit is 131,072 characters.
LONGEST_CELL: Final = 64 * 1024 * 1024
_FIELD: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


class UnknownColumn(Exception):
    """A template names a column that the row does not have."""

    def __init__(self, name: str, columns: Mapping[str, Any]) -> None:
        known = ", ".join(str(column) for column in columns if column is not None)
        super().__init__(f"names {name!r}; the columns are {known}")


class BadRow(Exception):
    """A row that cannot be read. `number` is its line, counted from 1."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def fill(template: str, columns: Mapping[str, Any]) -> str:
    """`template` with `{name}` replaced by the column of that name; `{{` stands for a brace.

    Raises:
        UnknownColumn: there is none of that name.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        if found[1] not in columns:
            raise UnknownColumn(found[1], columns)
        column = columns[found[1]]
        return "" if column is None else str(column)

    return _FIELD.sub(value, template)


def fill_all(template: Any, columns: Mapping[str, Any]) -> Any:
    """A JSON value with every text in it filled. Raises UnknownColumn."""
    if isinstance(template, str):
        return fill(template, columns)
    if isinstance(template, list):
        return [fill_all(item, columns) for item in template]
    if isinstance(template, dict):
        return {name: fill_all(item, columns) for name, item in template.items()}
    return template


def read_rows(file: IO[str], suffix: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each row with its line's number: of a table, of JSON objects, or of plain text.

    A line of text, or a JSON text, is a row with the column `text`.

    Args:
        suffix: of the file's name: `.csv`, `.tsv`, `.jsonl`, …; anything else is plain text.

    Raises:
        BadRow: a line that is none.
        UnicodeDecodeError: the file is not UTF-8.
    """
    if suffix in TABLES:
        csv.field_size_limit(LONGEST_CELL)
        reader = csv.DictReader(file, delimiter=TABLES[suffix])
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise BadRow(reader.line_num, str(error)) from None
        return
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if suffix not in JSON_SUFFIXES:
            yield number, {"text": line.rstrip("\r\n")}
            continue
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRow(number, f"is not JSON: {error}") from None
        if isinstance(given, str):
            given = {"text": given}
        if not isinstance(given, dict):
            raise BadRow(number, "must be a JSON object, or a text in quotes")
        yield number, given
