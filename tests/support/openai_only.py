"""A program that knows OpenAI's client and nothing of Lorry, and takes a batch through.

    python openai_only.py BASE_URL INPUT.jsonl

It uploads, creates, retrieves, lists, cancels and reads content; what does not hold is an error.
Prints what it saw as JSON.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import openai
from openai import OpenAI
from openai.types import Batch
from openai.types.chat import ChatCompletion

URL: Final = "/v1/chat/completions"
LONGEST_SECONDS = 400


def read_answers(lines: Iterable[str]) -> dict[str, ChatCompletion]:
    """The answers in an output file, by custom_id: what a user's own program does with one."""
    answers = {}
    for line in lines:
        result = json.loads(line)
        assert result["id"], result
        assert not result["error"], result
        assert result["response"]["status_code"] == 200, result
        assert result["response"]["request_id"], result
        answer = ChatCompletion.model_validate(result["response"]["body"])
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + (
            answer.usage.completion_tokens
        )
        assert result["custom_id"] not in answers, "a custom_id twice"
        answers[result["custom_id"]] = answer
    return answers


def main(base_url: str, source: Path) -> None:
    client = OpenAI(base_url=base_url, api_key="unused")
    asked = [json.loads(line)["custom_id"] for line in source.open(encoding="utf-8")]

    began = time.monotonic()
    file = client.files.create(file=source.open("rb"), purpose="batch")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.retrieve(file.id).bytes == source.stat().st_size
    assert file.id in [each.id for each in client.files.list(purpose="batch")]
    assert client.files.content(file.id).read() == source.read_bytes()

    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=URL,
        completion_window="24h",
        metadata={"made_by": "openai_only"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert batch.status in ("validating", "in_progress")
    assert batch.metadata == {"made_by": "openai_only"}
    done = finished(client, batch)
    assert done.status == "completed", done
    counts = done.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (len(asked), len(asked), 0)
    assert done.created_at <= (done.in_progress_at or 0) <= (done.completed_at or 0)
    assert done.errors is None and done.error_file_id is None and done.output_file_id is not None
    answers = read_answers(client.files.content(done.output_file_id).iter_lines())
    assert set(answers) == set(asked)
    assert done.usage is not None
    used = sum(answer.usage.completion_tokens for answer in answers.values() if answer.usage)
    assert done.usage.output_tokens == used
    seconds = time.monotonic() - began
    assert done.id in [each.id for each in itertools.islice(client.batches.list(limit=2), 9)]

    second = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    assert client.batches.cancel(second.id).status in ("cancelling", "cancelled", "finalizing")
    ended = finished(client, second)
    assert ended.status in ("cancelled", "completed"), ended
    if ended.status == "cancelled":
        assert ended.cancelling_at is not None and ended.cancelled_at is not None
    kept = [each for each in (ended.output_file_id, ended.error_file_id) if each]
    lines = [line for each in kept for line in client.files.content(each).text.splitlines()]
    assert ended.request_counts is not None
    assert len(lines) == ended.request_counts.total
    codes = {json.loads(line)["error"]["code"] for line in lines if json.loads(line)["error"]}
    assert codes <= {"batch_cancelled"}

    assert client.files.delete(file.id).deleted
    refused(openai.NotFoundError, lambda: client.files.retrieve(file.id))
    refused(openai.NotFoundError, lambda: client.batches.retrieve("batch_nothing"))
    refused(openai.BadRequestError, lambda: client.files.create(file=b"x", purpose="vision"))
    print(
        json.dumps(
            {
                "lines": len(asked),
                "seconds": round(seconds, 2),
                "model": done.model,
                "models": sorted({answer.model for answer in answers.values()}),
                "second": ended.status,
            }
        )
    )


def finished(client: OpenAI, batch: Batch) -> Batch:
    deadline = time.monotonic() + LONGEST_SECONDS
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
        counts = batch.request_counts
        assert counts is not None
        assert counts.completed + counts.failed <= counts.total
    return batch


def refused(kind: type[openai.APIStatusError], call: object) -> None:
    assert callable(call)
    try:
        call()
    except kind as error:
        assert error.type == "invalid_request_error"
        assert error.message
        return
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
