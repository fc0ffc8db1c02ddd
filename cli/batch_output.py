"""A batch's answers in a file, in the order of its input."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cli.batch_inputs import in_input_order
from cli.client import Client, Refused
from cli.jobs import answers
from cli.paths import segment


def write_answers(client: Client, batch: dict[str, Any], target: Path) -> None:
    """Write what came of a batch's lines: whole results (.jsonl), a table (.csv), or texts (.txt).

    The file appears when it is whole. Nothing is written for a batch without results.
    """
    if not (batch["output_file_id"] or batch["error_file_id"]):
        return
    scratch = target.with_name(f".{target.name}.part")
    try:
        with scratch.open("w", encoding="utf-8", newline="") as file:
            _WRITERS[target.suffix](file, _in_order(client, batch))
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def _in_order(client: Client, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    sources = [
        _documents(client, batch[name])
        for name in ("output_file_id", "error_file_id")
        if batch[name] is not None
    ]
    return in_input_order(_custom_ids(client, batch["input_file_id"]), *sources)


def _documents(client: Client, file_id: str) -> Iterator[dict[str, Any]]:
    for line in client.lines(f"/v1/files/{segment(file_id)}/content"):
        yield json.loads(line)


def _custom_ids(client: Client, file_id: str) -> Iterator[str | None]:
    """Of the input, line by line; nothing where it was deleted meanwhile."""
    try:
        for line in client.lines(f"/v1/files/{segment(file_id)}/content"):
            try:
                yield json.loads(line)["custom_id"]
            except (ValueError, KeyError, TypeError):
                yield None
    except Refused:
        return


def _write_jsonl(file: IO[str], results: Iterator[dict[str, Any]]) -> None:
    for result in results:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")


def _write_csv(file: IO[str], results: Iterator[dict[str, Any]]) -> None:
    table = csv.writer(file)
    table.writerow(["custom_id", "answer", "error"])
    for result in results:
        error = (result["error"] or {}).get("message", "")
        table.writerow([result["custom_id"], _text(result), error])


def _write_txt(file: IO[str], results: Iterator[dict[str, Any]]) -> None:
    """An answer a line; a line feed inside one is written as a space."""
    for result in results:
        file.write(" ".join(_text(result).splitlines()) + "\n")


def _text(result: dict[str, Any]) -> str:
    response = result["response"]
    return "\n".join(answers({"response": response["body"]})) if response else ""


_WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".txt": _write_txt}
