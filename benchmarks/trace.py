"""What a drain did over time: a JSON line of a file five times a second, for a profile of a run."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from workers.drain.core import DrainCore
from workers.engine.protocol import Engine

INTERVAL_SECONDS: Final = 0.2


@asynccontextmanager
async def traced(
    core: DrainCore, engine: Engine, row: str, path: Path | None
) -> AsyncIterator[None]:
    """Append samples to a file as long as this lasts; nothing without a file."""
    sampling = asyncio.create_task(_sample(core, engine, row, path)) if path else None
    try:
        yield
    finally:
        if sampling:
            sampling.cancel()


async def _sample(core: DrainCore, engine: Engine, row: str, path: Path) -> None:
    """Seconds; tokens made and worked on since the engine's start; jobs and adapters in the engine;
    loads and their seconds; which adapter version is folded."""
    started = time.perf_counter()
    with path.open("a") as file:
        while True:
            sample: dict[str, Any] = {
                "row": row,
                "s": round(time.perf_counter() - started, 2),
                "made": engine.made(),
                "worked": engine.progress(),
                "running": core.feeder.running,
                "adapters": core.slots.in_use,
                "loads": core.slots.loads,
                "load_s": round(core.slots.load_seconds, 2),
                "folded": core.feeder.folding.folded,
            }
            print(json.dumps(sample), file=file)
            await asyncio.sleep(INTERVAL_SECONDS)
