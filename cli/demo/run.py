"""`lorry demo`: a whole stack, 24 prompts over HTTP to four models, and their answers."""

import time
from collections import Counter
from typing import Any, Final

from rich.console import Console

from cli.client import Client
from cli.demo.prompts import DEMO_PROMPTS, DemoPrompt
from cli.demo.show import Board, Show
from cli.demo.stack import DemoStack
from cli.output import show_json
from core.states import FINAL_STATES, JobState

_POLL_SECONDS: Final = 1.0
_FINAL: Final = frozenset(state.value for state in FINAL_STATES)


def run(*, engine: str, as_json: bool) -> int:
    """Run the demo.

    Args:
        engine: `vllm` or `simulated`.
        as_json: print one JSON document instead of the show (which then goes to stderr).

    Returns:
        0 if every job succeeded, else 1.

    Raises:
        LorryError: the stack could not start, or was lost on the way.
    """
    show = Show(Console(stderr=as_json))
    show.title(f"lorry demo: {len(DEMO_PROMPTS)} prompts for four models, by the engine {engine}")
    with DemoStack(engine, show.line) as stack:
        with show.waiting():
            url = stack.wait_ready()
        with Client(url) as client:
            began = time.monotonic()
            jobs = _run_jobs(client, show)
            seconds = time.monotonic() - began
        with show.waiting():
            stack.stop()
    return _report(show, jobs, seconds, as_json=as_json)


def _run_jobs(client: Client, show: Show) -> list[tuple[DemoPrompt, dict[str, Any]]]:
    counts = Counter(prompt.model for prompt in DEMO_PROMPTS)
    with show.progress(list(counts), list(counts.values())) as board:
        jobs = [client.post("/v1/jobs", _body(prompt)) for prompt in DEMO_PROMPTS]
        _wait_for_all(client, jobs, board)
    return list(zip(DEMO_PROMPTS, jobs, strict=True))


def _body(prompt: DemoPrompt) -> dict[str, Any]:
    return {
        "model": prompt.model,
        "messages": [{"role": "user", "content": prompt.prompt}],
        "max_completion_tokens": prompt.max_tokens,
        "temperature": 0,
    }


def _wait_for_all(client: Client, jobs: list[dict[str, Any]], board: Board) -> None:
    """Poll until every job is final, replacing each in `jobs`."""
    waiting = list(range(len(jobs)))
    while waiting:
        # the long poll on the oldest sets the pace; whatever finished meanwhile answers at once
        for index in list(waiting):
            pace = _POLL_SECONDS if index == waiting[0] else 0
            job = client.get(f"/v1/jobs/{jobs[index]['id']}", wait=pace)
            if job["state"] in _FINAL:
                jobs[index] = job
                waiting.remove(index)
                board.finished(DEMO_PROMPTS[index].model, _tokens(job))


def _tokens(job: dict[str, Any]) -> int:
    usage = (job.get("response") or {}).get("usage") or {}
    return int(usage.get("completion_tokens", 0))


def _report(
    show: Show, jobs: list[tuple[DemoPrompt, dict[str, Any]]], seconds: float, *, as_json: bool
) -> int:
    succeeded = sum(job["state"] == JobState.SUCCEEDED for _, job in jobs)
    speed = sum(_tokens(job) for _, job in jobs) / seconds
    if as_json:
        facts = {"succeeded": succeeded, "tokens_per_second": speed, "seconds": seconds}
        show_json({"jobs": [job for _, job in jobs], **facts})
    else:
        show.answers([(prompt.model, prompt.prompt, job) for prompt, job in jobs])
        print(
            f"demo: {len(jobs)} jobs, {succeeded} succeeded, {speed:.0f} tok/s, {seconds:.1f} s",
            flush=True,
        )
    return 0 if succeeded == len(jobs) else 1
