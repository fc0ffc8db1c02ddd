"""The bare engine of benchmarks/fold.py: no queue, no fold; vLLM's, or the simulated one."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.bare import bare_run
from benchmarks.drained import Bench
from benchmarks.fold_rows import FoldRow
from benchmarks.workload import Work
from core.generation import GenerationRequest, Outcome
from workers.engine.protocol import EngineRequest, LocalAdapter
from workers.engine.simulated import SimulatedEngine

_numbers = itertools.count(1)


async def bare(bench: Bench, row: FoldRow, work: Sequence[Work]) -> float:
    """Output tokens per second of the engine by itself: no queue, no fold."""
    in_flight = 512 if row.kind == "grouped" else len(work)
    if not isinstance(bench.engine, SimulatedEngine):
        return await _bare_vllm(bench, row, work, in_flight)
    waiting = asyncio.Semaphore(in_flight)
    done: asyncio.Event = asyncio.Event()
    left = len(work)

    def ended(_request: EngineRequest, outcome: Outcome) -> None:
        nonlocal left
        left -= 1
        waiting.release()
        if not left:
            done.set()

    adapters = {
        which: bare_adapter(bench, which) for which in {*map(row.row.adapter_of, range(len(work)))}
    }
    for adapter in list(adapters.values())[:8]:
        await bench.engine.load_adapter(adapter)
    started = time.perf_counter()
    loaded = dict.fromkeys(list(adapters)[:8])
    for number, request in enumerate(work):
        await waiting.acquire()
        which = row.row.adapter_of(number)
        if which not in loaded:
            await bench.engine.load_adapter(adapters[which])
            loaded[which] = None
        bench.engine.submit([bare_request(request, adapters[which])], ended)
    await done.wait()
    seconds = time.perf_counter() - started
    for adapter in adapters.values():
        await bench.engine.remove_adapter(adapter.lora_int_id)
    return sum(request.output_tokens for request in work) / seconds


async def _bare_vllm(bench: Bench, row: FoldRow, work: Sequence[Work], in_flight: int) -> float:
    from vllm.lora.request import LoRARequest

    def adapter(number: int) -> Any:
        one = bare_adapter(bench, row.row.adapter_of(number))
        return LoRARequest(one.lora_name, one.lora_int_id, one.path)

    return await bare_run(bench.engine, work, adapter, in_flight)


def bare_adapter(bench: Bench, which: int) -> LocalAdapter:
    # ids far from those of the registry
    return LocalAdapter(
        1_000_000 + which, f"bare-{which}", str(bench.folder(which)), f"bare-{which}"
    )


def bare_request(
    request: Work, adapter: LocalAdapter | None, greedy: bool = False
) -> EngineRequest:
    body = {
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0 if greedy else 0.8,
        "ignore_eos": True,
    }
    return EngineRequest(
        f"bare-{next(_numbers)}", GenerationRequest("completion", body), adapter, ""
    )
