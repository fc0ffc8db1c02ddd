"""Batches for tests: input lines, and an `openai` client of a deployment."""

import json
import time
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, Final

import openai
from openai.types import Batch

from tests.support.deployment import Deployment
from tests.support.processes import until

CHAT_URL: Final = "/v1/chat/completions"
FINAL: Final = frozenset({"completed", "failed", "expired", "cancelled"})


def line(custom_id: str, model: str, prompt: str = "Hello?", **body: Any) -> dict[str, Any]:
    """A line of an input file."""
    asked = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 4}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT_URL, "body": {**asked, **body}}


def jsonl(lines: Iterable[Any]) -> bytes:
    """Lines as a file's content."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def openai_client(deployment: Deployment) -> openai.OpenAI:
    """The official client, pointed at the deployment."""
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{deployment.port}/v1", api_key="unused", max_retries=0
    )


def submit(
    client: openai.OpenAI, content: bytes | BinaryIO, window: Any = "24h", **extra: Any
) -> Batch:
    """Upload a file and create a batch of it."""
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT_URL,
        completion_window=window,
        extra_body=extra or None,
    )


def settled(
    client: openai.OpenAI,
    batch: Batch,
    seconds: float = 90,
    each: Callable[[Batch], None] = lambda _: None,
    pause: float = 0,
) -> Batch:
    """The batch once it is final; `each` sees it at every look, `pause` seconds apart."""

    def look() -> Batch | None:
        time.sleep(pause)
        found = client.batches.retrieve(batch.id)
        each(found)
        return found if found.status in FINAL else None

    return until(look, seconds, f"the end of {batch.id}")


def results(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """A results file by custom_id."""
    assert file_id is not None
    found = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    by_id = {each["custom_id"]: each for each in found}
    assert len(by_id) == len(found), "a custom_id stands twice in a results file"
    return by_id


class Counts:
    """Watches the counts of a batch: they add up at every moment and never go back."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def __call__(self, batch: Batch) -> None:
        counts = batch.request_counts
        assert counts is not None
        now = (counts.total, counts.completed, counts.failed)
        assert counts.completed + counts.failed <= counts.total, now
        if self.seen:
            before = self.seen[-1]
            assert before[0] in (0, now[0]), (before, now)
            assert now[1] >= before[1], (before, now)
            assert now[2] >= before[2], (before, now)
        self.seen.append(now)
        if batch.status in ("completed", "expired", "cancelled"):
            assert counts.completed + counts.failed == counts.total, now
