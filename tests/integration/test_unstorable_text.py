"""Text that Postgres refuses: 422 on the way in, U+FFFD on the way out, and nobody else suffers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from core.errors import ErrorCode
from core.generation import Completion, Failure, Outcome
from core.settings import Settings
from db import jobs
from db.database import Database
from db.tenants import DEFAULT_TENANT_ID
from tests.support.api import BASE, assert_problem, running_api
from tests.support.cores import drain_core
from tests.support.jobs import Bench, make_bench, submit
from tests.support.settled import settled
from workers.engine.protocol import Done, Engine, EngineRequest

GOOD = 500
PATIENT = Settings(lease_seconds=30, poll_seconds=0.05, flush_results=256)


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    return await make_bench(database, tmp_path, adapters=1)


@pytest.mark.parametrize("bad", ["\\u0000", "\\ud800", "\\udfff\\ud800"])
async def test_prompts_that_postgres_refuses_are_422_among_good_ones(
    bench: Bench, database_url: str, bad: str
) -> None:
    async with running_api(database_url) as api:
        for _ in range(3):
            for field in ("prompt", "user", "stop"):
                body = {"model": BASE, "prompt": "p", field: "text BAD text"}
                raw = orjson.dumps(body).replace(b"BAD", bad.encode())
                response = await api.client.post(
                    "/v1/jobs", content=raw, headers={"Content-Type": "application/json"}
                )
                assert_problem(response, 422, field)
            await api.submitted({"model": BASE, "prompt": "fine"})
    assert await bench.database.fetch_value("SELECT count(*) FROM job_inputs") == 3


async def test_answers_that_postgres_refuses_are_mended_and_errors_fail_alone(
    bench: Bench, tmp_path: Path, broker_url: str
) -> None:
    database = bench.database
    await submit(database, "a0", GOOD // 2)
    mended = [
        *await submit(database, "a0", 3, prompt="answer with NUL"),
        *await submit(database, "a0", 3, prompt="answer with surrogate"),
    ]
    refused = await submit(database, "a0", 3, prompt="refuse with NUL")
    refused += await submit(database, "a0", 3, prompt="refuse with surrogate")
    hiccups = await submit(database, "a0", 2, prompt="hiccup with NUL")
    hiccups += await submit(database, "a0", 2, prompt="hiccup with surrogate")
    await submit(database, "a0", GOOD // 2)
    async with drain_core(bench, tmp_path, broker_url, settings=PATIENT) as (_, engine, _):
        _spoil(engine)
        good = GOOD + len(mended) + len(hiccups)
        await settled(database, good + len(refused), succeeded=good, failed=len(refused))
    for job_id in mended:
        row = await jobs.get(database, DEFAULT_TENANT_ID, job_id)
        assert row is not None
        assert orjson.loads(row["response"])["choices"][0]["text"] == "spoilt \ufffd text"
    for job_id in refused:
        row = await jobs.get(database, DEFAULT_TENANT_ID, job_id)
        assert row is not None
        assert (row["error_code"], row["error_message"]) == (
            "invalid_request",
            "spoilt \ufffd text",
        )


def _spoil(engine: Engine) -> None:
    """Let the engine say what its prompts ask for."""
    submit_to_engine = engine.submit

    def submit_spoilt(requests: Sequence[EngineRequest], done: Done) -> None:
        submit_to_engine(
            requests, lambda request, outcome: done(request, _spoilt(request, outcome))
        )

    engine.submit = submit_spoilt  # type: ignore[method-assign]


def _spoilt(request: EngineRequest, outcome: Outcome) -> Outcome:
    asked = str(request.generation.body["prompt"])
    text = f"spoilt {chr(0xD800) if 'surrogate' in asked else chr(0)} text"
    if asked.startswith("answer") and isinstance(outcome, Completion):
        return replace(outcome, choices=[replace(c, text=text) for c in outcome.choices])
    if asked.startswith("refuse"):
        return Failure(ErrorCode.INVALID_REQUEST, text)
    if asked.startswith("hiccup") and request.request_id.endswith("-1"):
        return Failure(ErrorCode.ENGINE_ERROR, text)
    return outcome
