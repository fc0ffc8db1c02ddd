"""Validation: each bad input is a clear error with its line, and nothing is left behind."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from db.database import Database
from tests.support.api import count
from tests.support.batch_bench import GOOD, MOST_LINES, Bench, running_bench
from tests.support.batches import CHAT_URL, jsonl, line
from tests.support.jobs import BASE


@pytest.fixture
async def bench(database_url: str, database: Database, tmp_path: Path) -> AsyncIterator[Bench]:
    async with running_bench(database_url, database, tmp_path) as running:
        yield running


def _raw(**changes: Any) -> bytes:
    """A good line with members changed; None takes one out."""
    given = {**line("x", "a0"), **changes}
    return json.dumps({k: v for k, v in given.items() if v is not None}).encode()


@pytest.mark.parametrize(
    ("bad", "code", "word", "param"),
    [
        (b"no json", "invalid_json_line", "not valid JSON", None),
        (b"[1, 2]", "invalid_json_line", "JSON object", None),
        (b"\xff\xfe", "invalid_json_line", "UTF-8", None),
        (b"[" * 100_000, "invalid_json_line", "nested", None),
        (_raw(body={"model": "a0", "messages": [], "x": []}), "invalid_request", "x", None),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "invalid_json_line", "nested", None),
        (_raw(custom_id=None), "missing_required_parameter", "custom_id", "custom_id"),
        (_raw(custom_id=7), "invalid_custom_id", "7", "custom_id"),
        (_raw(custom_id=""), "invalid_custom_id", "1 to 512", "custom_id"),
        (_raw(custom_id="a\0b"), "invalid_custom_id", "NUL", "custom_id"),
        (_raw(custom_id="good"), "duplicate_custom_id", "line 1", "custom_id"),
        (_raw(method="GET"), "invalid_method", "GET", "method"),
        (_raw(method=None), "missing_required_parameter", "method", "method"),
        (_raw(url="/v1/completions"), "mismatched_endpoint", CHAT_URL, "url"),
        (_raw(url="/v1/embeddings"), "invalid_url", CHAT_URL, "url"),
        (_raw(body=None), "missing_required_parameter", "body", "body"),
        (_raw(body=[]), "invalid_request", "a list of 0", "body"),
        (_raw(body={"model": "a0", "prompt": "x"}), "invalid_request", "messages", "body"),
        (_raw(priority=3), "unknown_parameter", "priority", "priority"),
        (_raw(body={**GOOD["body"], "stream": True}), "invalid_request", "stream", "body.stream"),
        (_raw(body={**GOOD["body"], "tools": [1]}), "invalid_request", "tools", "body.tools"),
        (_raw(body={**GOOD["body"], "model": "zz9"}), "model_not_found", "zz9", "body.model"),
        (
            _raw(body={**GOOD["body"], "max_tokens": 9000}),
            "invalid_request",
            "8192",
            "body.max_tokens",
        ),
        (_raw(body={**GOOD["body"], "deadline": 5}), "invalid_request", "passed", "body.deadline"),
        (_raw(body={"k\0": 1, "model": "a0", "messages": []}), "invalid_request", "k", None),
        (b'{"custom_id":"' + b"x" * 10_000_000 + b'"}', "line_too_long", "10000016", None),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else None,
)
async def test_a_bad_line_is_named_and_nothing_is_left(
    bench: Bench, bad: bytes, code: str, word: str, param: str | None
) -> None:
    batch = await bench.validated(jsonl([GOOD]) + bad + b"\n" + jsonl([line("z", "a1")]))
    assert batch["status"] == "failed"
    (error,) = batch["errors"]["data"]
    assert error["line"] == 2
    assert error["code"] == code
    assert word in error["message"]
    assert param is None or error["param"] == param
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert batch["failed_at"]
    await bench.assert_nothing_left()


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (jsonl([GOOD]), [1]),
        (jsonl([GOOD])[:-1], [1]),
        (jsonl([GOOD, line("b", "a1")]).replace(b"\n", b"\r\n"), [1, 2]),
        (b"\xef\xbb\xbf" + jsonl([GOOD]), [1]),
        (b"\n\n" + jsonl([GOOD]) + b"  \n\n" + jsonl([line("b", "a1")]) + b"\n", [3, 6]),
    ],
    ids=["one line", "no end", "crlf", "bom", "blank lines"],
)
async def test_odd_but_good_files_are_taken(bench: Bench, content: bytes, lines: list[int]) -> None:
    batch = await bench.validated(content)
    assert batch["status"] == "in_progress", batch
    assert batch["request_counts"]["total"] == len(lines)
    async with bench.database.connection() as connection:
        rows = await connection.fetch("SELECT batch_line FROM jobs ORDER BY id")
    assert [row["batch_line"] for row in rows] == lines
    assert bench.doorbell.rings


@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", b"\xef\xbb\xbf"])
async def test_an_empty_file_fails(bench: Bench, content: bytes) -> None:
    batch = await bench.validated(content)
    assert batch["status"] == "failed"
    assert batch["errors"]["data"][0]["code"] == "empty_file"


async def test_every_bad_line_is_told_up_to_a_cap(bench: Bench) -> None:
    batch = await bench.validated(jsonl([GOOD]) + b"bad\n" * 300)
    assert [error["line"] for error in batch["errors"]["data"]] == list(range(2, 302))
    batch = await bench.validated(b"bad\n" * 5000)
    errors = batch["errors"]["data"]
    assert len(errors) == 1001
    assert errors[-1]["code"] == "too_many_errors"
    await bench.assert_nothing_left()


async def test_a_good_model_behind_many_unknown_ones_is_known(bench: Bench) -> None:
    lines = [line(f"r{n}", f"nothing-{n}") for n in range(2500)]
    good = [line("good", "a0"), line("base", BASE)]
    batch = await bench.validated(jsonl([*lines, *good]), skip_invalid=True)
    assert batch["status"] == "in_progress", batch
    assert batch["request_counts"] == {"total": 2502, "completed": 0, "failed": 2500}
    assert await count(bench.database) == 2


async def test_invalid_utf8_far_behind(bench: Bench) -> None:
    content = jsonl(line(f"r{n}", "a0") for n in range(40_000)) + b'{"custom_id": "\xc3("}\n'
    batch = await bench.validated(content + jsonl([line("last", "a0")]))
    (error,) = batch["errors"]["data"]
    assert error["line"] == 40_001
    assert "UTF-8" in error["message"]
    await bench.assert_nothing_left()


async def test_a_file_of_too_many_lines(bench: Bench) -> None:
    batch = await bench.validated(b"{}\n" * 100 + b"\n" * MOST_LINES)
    assert "too_many_lines" not in {error["code"] for error in batch["errors"]["data"]}
    content = jsonl(line(f"r{n}", "a0") for n in range(MOST_LINES + 1))
    batch = await bench.validated(content)
    assert [error["code"] for error in batch["errors"]["data"]] == ["too_many_lines"]
    await bench.assert_nothing_left()


async def test_a_file_that_was_deleted_meanwhile(bench: Bench) -> None:
    file_id = await bench.upload(jsonl([GOOD]))
    created = (await bench.create(file_id)).json()
    await bench.api.client.delete(f"/v1/files/{file_id}")
    await bench.duties.validate()
    batch = await bench.get(created["id"])
    assert batch["status"] == "failed"
    assert batch["errors"]["data"][0]["code"] == "file_not_found"
    refused = await bench.create(file_id)
    assert refused.status_code == 404
    assert refused.json()["error"]["param"] == "input_file_id"


async def test_a_results_file_is_no_input(bench: Bench) -> None:
    file_id = await bench.upload(jsonl([GOOD]))
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE files SET purpose = 'batch_output'")
    refused = await bench.create(file_id)
    assert refused.status_code == 400
    assert "batch_output" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
        ({"skip": True}, "skip"),
    ],
)
async def test_a_wrong_field_of_a_batch_is_named(
    bench: Bench, fields: dict[str, Any], param: str
) -> None:
    refused = await bench.create(await bench.upload(jsonl([GOOD])), **fields)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)


@pytest.mark.parametrize(("window", "seconds"), [("24h", 86_400), ("30m", 1800), ("1d2h", 93_600)])
async def test_windows_of_any_length(bench: Bench, window: str, seconds: int) -> None:
    file_id = await bench.upload(jsonl([GOOD]))
    batch = (await bench.create(file_id, completion_window=window)).json()
    assert batch["expires_at"] - batch["created_at"] == seconds
    assert batch["completion_window"] == window


async def test_foreign_batches_are_not_there(bench: Bench) -> None:
    batch = await bench.validated(jsonl([GOOD]))
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE batches SET tenant_id = 2")
    path = f"/v1/batches/{batch['id']}"
    client = bench.api.client
    assert (await client.get(path)).status_code == 404
    assert (await client.get(f"{path}/results")).status_code == 404
    assert (await client.post(f"{path}/cancel")).status_code == 404
    assert (await client.get("/v1/batches")).json()["data"] == []


async def test_the_promise_is_made_from_measured_rates(bench: Bench) -> None:
    content = jsonl(line(f"r{n}", BASE) for n in range(100))
    batch = await bench.validated(content, completion_window="1m")
    assert batch["lorry"]["estimated_finish_at"] is None
    assert "no worker" in batch["lorry"]["warning"]
    async with bench.database.connection() as connection:
        await connection.execute(
            "INSERT INTO workers (base_model_id, hostname, pid, engine, engine_version, limits,"
            " lease_expires_at) SELECT id, 'h', 1, 'simulated', '1', '{}',"
            " now() + interval '1 hour' FROM base_models"
        )
        await connection.execute(
            "INSERT INTO worker_rates (worker_id, adapter_version_id, base_model_id,"
            " tokens_per_second, jobs_per_second) SELECT id, 0, base_model_id, 100, 10 FROM workers"
        )
    quick = await bench.get(batch["id"])
    assert quick["lorry"]["warning"] is None
    assert abs(quick["lorry"]["estimated_finish_at"] - quick["created_at"] - 10) <= 3
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE worker_rates SET jobs_per_second = 0.5")
    slow = await bench.get(batch["id"])
    assert slow["lorry"]["estimated_finish_at"] > slow["expires_at"]
    assert "completion_window" in slow["lorry"]["warning"]
    # a batch behind it waits for it too
    behind = (await bench.create(await bench.upload(jsonl([GOOD])))).json()
    assert behind["lorry"]["estimated_finish_at"] > slow["lorry"]["estimated_finish_at"]
