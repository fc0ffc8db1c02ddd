"""What restoring the base weights and folding an adapter take: the row `times` of fold.py."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.bare import report
from benchmarks.drained import Bench
from benchmarks.fold_bare import bare_adapter, bare_request
from benchmarks.workload import Work
from core.generation import Outcome
from workers.engine.protocol import Engine, FoldRefused, LocalAdapter


async def times(bench: Bench) -> None:
    """Restore and fold with each kind of copy, idle and under load."""
    engine: Any = bench.engine
    pair = [bare_adapter(bench, which) for which in (0, 1)]
    for adapter in pair:
        await engine.load_adapter(adapter)
    for kind in ("host", "gpu", "auto"):
        if hasattr(engine, "_calls"):
            try:
                await engine._calls.prepare_fold(kind)
            except FoldRefused as error:
                report(name=f"times {kind}", refused=str(error))
                continue
        for load in (0, 256):
            await _times(engine, pair, kind, load)
    for adapter in pair:
        await engine.remove_adapter(adapter.lora_int_id)


async def _times(engine: Engine, pair: Sequence[LocalAdapter], kind: str, load: int) -> None:
    rng = random.Random(3)
    work = [Work([rng.randrange(10, 9000) for _ in range(128)], 1500) for _ in range(load)]
    ended: list[Outcome] = []
    sent = [bare_request(request, pair[i % 2]) for i, request in enumerate(work)]
    engine.submit(sent, lambda _request, outcome: ended.append(outcome))
    await asyncio.sleep(2 if load else 0)
    switches = [pair[0].lora_int_id, pair[1].lora_int_id, pair[0].lora_int_id, None]
    found = [await engine.fold(version) for version in switches]
    await engine.abort([request.request_id for request in sent])
    while len(ended) < load:
        await asyncio.sleep(0.01)
    report(
        name=f"times {kind}",
        running=load,
        first_fold_ms=[round(1000 * x, 1) for x in (found[0].fold, found[0].pause)],
        restore_ms=[round(1000 * times.restore, 1) for times in found[1:]],
        fold_ms=[round(1000 * times.fold, 1) for times in found[1:3]],
        pause_ms=[round(1000 * times.pause, 1) for times in found[1:]],
    )
