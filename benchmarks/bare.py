"""The bare engine: `AsyncLLM` with every prompt upfront, which Lorry is measured against."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.workload import Work
from workers.engine.vllm_engine import VllmEngine

_ids = itertools.count()


async def bare_run(
    engine: VllmEngine,
    work: Sequence[Work],
    adapter_of: Callable[[int], Any | None],
    in_flight: int | None = None,
) -> float:
    """Feed every request at once, straight into vLLM.

    Args:
        engine: a started engine, whose `AsyncLLM` is used as it is.
        work: the requests.
        adapter_of: the `LoRARequest` of request number i, or None.
        in_flight: how many requests at once, in their order; None is all.

    Returns:
        Output tokens per second, from the first request to the last answer.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    assert engine._calls is not None
    llm = engine._calls._llm

    room = asyncio.Semaphore(in_flight or len(work))

    async def one(number: int, request: Work) -> int:
        async with room:
            return await ask(number, request)

    async def ask(number: int, request: Work) -> int:
        params = SamplingParams(
            temperature=0.8,
            max_tokens=request.output_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=False,
        )
        tokens = 0
        async for output in llm.generate(
            {"prompt_token_ids": request.prompt},
            params,
            f"bare-{next(_ids)}",
            lora_request=adapter_of(number),
        ):
            tokens = len(output.outputs[0].token_ids)
        return tokens

    started = time.perf_counter()
    tokens = sum(await asyncio.gather(*(one(i, request) for i, request in enumerate(work))))
    return tokens / (time.perf_counter() - started)


def report(**figures: Any) -> None:
    """One JSON line, at once."""
    print(json.dumps(figures), flush=True)
