"""What a run did over time: a JSON line of a file five times a second, for a profile of it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from workers.drain.core import DrainCore
from workers.engine.protocol import Engine
from workers.engine.vllm_engine import VllmEngine

INTERVAL_SECONDS: Final = 0.2


@asynccontextmanager
async def traced(
    engine: Engine, row: str, path: Path | None, core: DrainCore | None = None
) -> AsyncIterator[None]:
    """Append samples to a file as long as this lasts; nothing without a file."""
    sampling = asyncio.create_task(_sample(engine, row, path, core)) if path else None
    try:
        yield
    finally:
        if sampling:
            sampling.cancel()


async def _sample(engine: Engine, row: str, path: Path, core: DrainCore | None) -> None:
    started = time.perf_counter()
    with path.open("a") as file:
        while True:
            sample = {"row": row, "s": round(time.perf_counter() - started, 2)}
            sample |= _of_engine(engine) | (_of_drain(core) if core else {})
            print(json.dumps(sample), file=file)
            await asyncio.sleep(INTERVAL_SECONDS)


def _of_engine(engine: Engine) -> dict[str, Any]:
    """Tokens made and worked on since its start; requests in its last step and those that wait for
    one, as vLLM's core counts them itself."""
    seen = {"made": engine.made(), "worked": engine.progress()}
    if isinstance(engine, VllmEngine) and engine._calls:
        seen |= {"in_step": engine._calls.work.in_step, "waiting": engine._calls.work.waiting}
    return seen


def _of_drain(core: DrainCore) -> dict[str, Any]:
    """Jobs and adapters in the engine; loads and their seconds; which version is folded."""
    return {
        "running": core.feeder.running,
        "adapters": core.slots.in_use,
        "loads": core.slots.loads,
        "load_s": round(core.slots.load_seconds, 2),
        "folded": core.feeder.folding.folded,
    }
