"""The whole stack on a GPU beside the bare engine in the same run.

    python -m benchmarks.full_stack [JOBS] [--bare TOKENS_PER_SECOND]

8B-shaped random weights, 8 random rank-16 adapters in 8 slots, jobs interleaved over the adapters:
with 2,000 jobs, which is the default, the row `eight` of benchmarks/engine_ratio.py. First the bare
`AsyncLLM` with every prompt upfront; then, after it is closed, `lorry up` with the same engine
flags: every job is posted over REST and polled back, through API, Celery and worker. The clock of
the stack runs from the first POST to the last answer read. `--bare` takes the bare engine's figure
from `engine_ratio eight` instead, measured just before on the same machine.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx

from benchmarks.stack import running_stack
from benchmarks.workload import ENGINE_FLAGS, Work, make_adapters, make_model, requests

ADAPTERS = 8
FLAGS = [*ENGINE_FLAGS, "--max-loras", str(ADAPTERS)]
#: Connections that post and poll.
CLIENTS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=int, nargs="?", default=2000)
    parser.add_argument("--bare", type=float)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lorry-bench"))
    parser.add_argument("--only-bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_bare:
        asyncio.run(bare(options.jobs, options.folder))
        return
    make_model(options.folder / "model")
    make_adapters(options.folder / "adapters", ADAPTERS)
    bare_rate = options.bare or bare_in_a_process_of_its_own(options.jobs, options.folder)
    rate = stack(options.jobs, options.folder)
    print(f"full stack / bare engine: {rate / bare_rate:.3f}")


def bare_in_a_process_of_its_own(jobs: int, folder: Path) -> float:
    """The bare engine's tokens per second; its GPU memory is free again afterwards."""
    command = [sys.executable, "-m", "benchmarks.full_stack", str(jobs), "--only-bare"]
    output = subprocess.run(
        [*command, "--folder", str(folder)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    print(output, end="", flush=True)
    return float(json.loads(output.splitlines()[-1])["out_tok_s"])


async def bare(jobs: int, folder: Path) -> None:
    """Measure the bare engine and print its figure."""
    from vllm.lora.request import LoRARequest

    from benchmarks.bare import bare_run, report
    from workers.engine.vllm_engine import VllmEngine

    engine = VllmEngine.from_flags(str(folder / "model"), FLAGS)
    started = time.perf_counter()
    await engine.start()
    start_s = round(time.perf_counter() - started, 1)
    adapters = [
        LoRARequest(f"a{i}", i + 1, str(folder / "adapters" / f"a{i}")) for i in range(ADAPTERS)
    ]
    await bare_run(engine, requests(200, seed=9), lambda i: adapters[i % ADAPTERS])
    rate = await bare_run(engine, requests(jobs), lambda i: adapters[i % ADAPTERS])
    await engine.close()
    report(name="bare engine", jobs=jobs, adapters=ADAPTERS, start_s=start_s, out_tok_s=round(rate))


def stack(jobs: int, folder: Path) -> float:
    """Measure `lorry up`; returns output tokens per second."""
    arguments = [str(folder / "model"), *FLAGS]
    for number in range(ADAPTERS):
        arguments += ["--adapter", f"a{number}={folder / 'adapters' / f'a{number}'}"]
    started = time.perf_counter()
    with running_stack(arguments, ready_seconds=400) as client:
        start_s = round(time.perf_counter() - started, 1)
        base_url = str(client.base_url)
        asyncio.run(submit_all(base_url, requests(200, seed=9)))
        seconds, post_s, tokens, states = asyncio.run(submit_all(base_url, requests(jobs)))
    figures = {"jobs": jobs, "states": states, "start_s": start_s, "post_s": round(post_s, 2)}
    figures["out_tok_s"] = round(tokens / seconds)
    print(json.dumps({"name": "full stack", "s": round(seconds, 1), **figures}), flush=True)
    if states != {"succeeded": jobs}:
        raise SystemExit("not every job succeeded")
    return tokens / seconds


async def submit_all(base_url: str, work: list[Work]) -> tuple[float, float, int, dict[str, int]]:
    """Post every request, poll every job back.

    Returns:
        Seconds from the first POST to the last answer, seconds of posting, output tokens, and how
        many jobs ended in which state.
    """
    limits = httpx.Limits(max_connections=CLIENTS)
    gate = asyncio.Semaphore(CLIENTS)
    async with httpx.AsyncClient(base_url=base_url, timeout=60, limits=limits) as client:

        async def post(number: int, request: Work) -> str:
            body = {
                "model": f"a{number % ADAPTERS}",
                "prompt": request.prompt,
                "max_tokens": request.output_tokens,
                "temperature": 0.8,
                "ignore_eos": True,
            }
            async with gate:
                response = await client.post("/v1/jobs", json=body)
            job_id: str = response.raise_for_status().json()["id"]
            return job_id

        async def wait(job_id: str) -> tuple[str, int]:
            while True:
                async with gate:
                    response = await client.get(f"/v1/jobs/{job_id}", params={"wait": 20})
                job = response.raise_for_status().json()
                if job["finished_at"] is not None:
                    answer = job["response"] or {"usage": {"completion_tokens": 0}}
                    return job["state"], answer["usage"]["completion_tokens"]

        started = time.perf_counter()
        ids = await asyncio.gather(*(post(i, request) for i, request in enumerate(work)))
        posted = time.perf_counter()
        answers = await asyncio.gather(*map(wait, ids))
        ended = time.perf_counter()
    states: dict[str, int] = {}
    for state, _ in answers:
        states[state] = states.get(state, 0) + 1
    return ended - started, posted - started, sum(tokens for _, tokens in answers), states


if __name__ == "__main__":
    main()
