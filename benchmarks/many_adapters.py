"""200 adapters on one CPU worker with 4 slots: is every answer its own adapter's, and does memory
stay where it is?

    python -m benchmarks.many_adapters [ADAPTERS] [JOBS_EACH]

Adapters of rank 1 to 8 with random weights, so that each answers differently. First one engine
answers for each adapter alone; then `lorry up` with the demo's base gets all jobs shuffled, half at
once and half while it works, the base's own among them, and every answer is compared.
"""

import asyncio
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import httpx2 as httpx
import psutil
from platformdirs import user_cache_path

from benchmarks.stack import free_port, running_stack
from cli.demo.base import DEMO_BASE, ensure_base
from core.generation import Completion
from tests.engine.contract import ask, request
from tests.support.adapters import ATTENTION, Draft
from workers.engine.protocol import LocalAdapter
from workers.engine.vllm_engine import VllmEngine

SLOTS, TOKENS, LAYERS = 4, 4, 8
FLAGS = ["--max-loras", str(SLOTS), "--max-lora-rank", "8", "--max-model-len", "512"]
PROMPTS = ("Name three fruits.", "What is a rainbow?")
_MIB = 1024**2


def main() -> None:
    adapters = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    each = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    base = ensure_base(user_cache_path("lorry"), print)
    with tempfile.TemporaryDirectory(prefix="lorry-many-") as name:
        folders = {f"a{n}": make(Path(name) / f"a{n}", n) for n in range(adapters)}
        started = time.perf_counter()
        expected = asyncio.run(alone(base, folders))
        say(alone_s=time.perf_counter() - started, answers=len(set(expected.values())))
        stack(folders, expected, each)


def make(folder: Path, number: int) -> Path:
    """An adapter of rank 1 to 8, strong enough to be heard."""
    draft = Draft(rank=1 + number % 8, modules=ATTENTION, layers=range(LAYERS), seed=number)
    draft.tensors = {name: array * 2 for name, array in draft.tensors.items()}
    return draft.write(folder)


async def alone(base: Path, folders: dict[str, Path]) -> dict[tuple[str, str], str]:
    """What each adapter, and the base, says to each prompt with nobody else in the engine."""
    engine = VllmEngine.from_flags(str(base), FLAGS)
    answers = {}
    try:
        await engine.start()
        for number, name in enumerate([DEMO_BASE, *folders]):
            adapter = None
            if name in folders:
                adapter = LocalAdapter(number, f"{number}-{name}", str(folders[name]), name)
                await engine.load_adapter(adapter)
            outcomes = await ask(engine, [request(body(p), adapter=adapter) for p in PROMPTS])
            for prompt, outcome in zip(PROMPTS, outcomes, strict=True):
                assert isinstance(outcome, Completion), outcome
                answers[name, prompt] = outcome.choices[0].text
            await engine.remove_adapter(number)
            if number % 25 == 0:
                say(alone=number)
    finally:  # the engine's processes would outlive this one
        await engine.close()
    return answers


def body(prompt: str) -> dict[str, object]:
    """A greedy chat."""
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "temperature": 0, "max_tokens": TOKENS}


def stack(folders: dict[str, Path], expected: dict[tuple[str, str], str], each: int) -> None:
    """Run the jobs through `lorry up`, and say what came of it."""
    metrics = free_port()
    arguments = [*FLAGS, *(f"--adapter={name}={folder}" for name, folder in folders.items())]
    work = [(name, PROMPTS[n % len(PROMPTS)]) for name in folders for n in range(each)]
    work += [(DEMO_BASE, PROMPTS[n % len(PROMPTS)]) for n in range(len(work) // 10)]
    random.Random(1).shuffle(work)
    environ = {"LORRY_METRICS_PORT": str(metrics), "LORRY_QUANTUM_SECONDS": "2"}
    with running_stack(arguments, ready_seconds=400, environ=environ) as client, Memory() as memory:
        started = time.perf_counter()
        ids = [post(client, *one) for one in work[: len(work) // 2]]
        ids += [slowly(client, *one) for one in work[len(work) // 2 :]]
        answers = []
        for number, job_id in enumerate(ids):
            answers.append(answer(client, job_id))
            if number % max(1, len(ids) // 8) == 0:
                say(answered=number, loads=loads(metrics), worker_mib=memory.now())
        seconds = time.perf_counter() - started
        loaded, evicted = loads(metrics), evictions(metrics)
    wrong = [one for one, got in zip(work, answers, strict=True) if got != expected[one]]
    say(
        jobs=len(work),
        adapters=len(folders),
        wrong=len(wrong),
        seconds=seconds,
        loads=loaded,
        evictions=evicted,
        first_mib=memory.samples[0],
        half_mib=max(memory.samples[: len(memory.samples) // 2]),
        most_mib=max(memory.samples),
    )
    for one in wrong[:5]:
        print("wrong:", one, "expected", repr(expected[one]))
    if wrong:
        raise SystemExit(1)


def post(client: httpx.Client, model: str, prompt: str) -> str:
    """Submit a job; returns its id."""
    response = client.post("/v1/jobs", json={"model": model, **body(prompt)})
    job_id: str = response.raise_for_status().json()["id"]
    return job_id


def slowly(client: httpx.Client, model: str, prompt: str) -> str:
    """The same, as a user here and there would."""
    time.sleep(0.05)
    return post(client, model, prompt)


def answer(client: httpx.Client, job_id: str) -> str | None:
    """A job's text once it has ended; None if it failed."""
    while True:
        response = client.get(f"/v1/jobs/{job_id}", params={"wait": 30})
        job = response.raise_for_status().json()
        if job["finished_at"] is not None:
            done = job["state"] == "succeeded"
            return job["response"]["choices"][0]["message"]["content"] if done else None


def loads(port: int) -> int:
    """Adapters that the worker has loaded so far, the same one again too."""
    return metric(port, "lorry_adapter_load_seconds_count")


def evictions(port: int) -> int:
    """Adapters that made room for another, as the worker counts them."""
    return metric(port, "lorry_adapter_evictions_total")


def metric(port: int, name: str) -> int:
    """A metric of the worker that has no labels."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    found = re.search(rf"^{name} ([\d.e+]+)", text, re.M)
    return int(float(found.group(1))) if found else 0


class Memory:
    """Samples, each second, the memory that the worker's processes have to themselves, in MiB."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self.samples.append(self.now())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def now(self) -> int:
        """Of every process below a `lorry worker`."""
        workers: Sequence[psutil.Process] = [
            process
            for process in psutil.Process().children(recursive=True)
            if "worker" in process.cmdline()
        ]
        family = {child for worker in workers for child in worker.children(recursive=True)}
        total = 0
        for process in family | set(workers):
            try:
                total += process.memory_full_info().uss
            except psutil.Error:
                continue
        return int(total / _MIB)

    def _run(self) -> None:
        while not self._over.wait(1):
            self.samples.append(self.now())


def say(**figures: float) -> None:
    """One line of figures."""
    print(json.dumps({name: round(figure, 1) for name, figure in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
