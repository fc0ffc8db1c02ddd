"""What an adapter costs until it answers: from the store, the disk, the engine's own memory; and
what switching costs the drain.

    python -m benchmarks.adapter_loads            (8B-shaped random weights, 84 MB adapters, a GPU)
    python -m benchmarks.adapter_loads --cpu      (the demo's model, adapters of its shape)

One engine with 8 slots, which can keep every adapter in its memory (`max_cpu_loras`). Loads are
those of an idle engine, medians over a few adapters:

- fetch: from the store to the worker's disk, every byte verified. A prefetch has done it before.
- disk_cold: from the disk, the files dropped from the system's page cache before.
- disk: from files in the page cache. What a load costs after a prefetch.
- ahead: the engine has read it ahead into locked memory.
- cpu: the engine has it in memory, but in no slot.
- slot: it has a slot.

Then the same jobs go through the whole drain over 8 adapters in 8 slots, over 24 that the engine
has to read from the disk without and with reading ahead, and over the same 24 from its memory.
`switch_ms` is what a switch added to the run, `load_ms` how long the drain waited for the engine,
which takes no load inside a step. Every figure is a line of JSON; the ratios of the drains come
last.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import uvloop

from benchmarks.bare import report
from benchmarks.drained import Bench, register
from benchmarks.engine_ratio import run_drain
from benchmarks.engine_rows import Row
from benchmarks.servers import running_servers
from benchmarks.workload import ENGINE_FLAGS, Work, make_adapters, make_model, requests
from core.settings import Settings
from db import registry
from db.database import Database
from db.migrate import upgrade
from db.store import Store
from workers.adapter_files import AdapterFiles
from workers.engine.protocol import LocalAdapter
from workers.engine.vllm_engine import VllmEngine

SLOTS: Final = 8
ADAPTERS: Final = 24
#: Adapters that each kind of load is measured with.
SAMPLES: Final = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--jobs", type=int, help="of each drain")
    parser.add_argument("--folder", default="/tmp/lorry-bench")
    options = parser.parse_args()
    with running_servers() as servers:
        upgrade(servers.postgres_url)
        uvloop.run(run(options, servers.postgres_url))


async def run(options: argparse.Namespace, database_url: str) -> None:
    """Start the engine, measure, stop it."""
    flags, model, folders = (on_cpu if options.cpu else on_gpu)(Path(options.folder))
    flags += ["--max-loras", str(SLOTS), "--max-cpu-loras", str(2 * ADAPTERS)]
    engine = VllmEngine.from_flags(str(model), flags)
    started = time.perf_counter()
    await engine.start()
    report(name="engine", flags=flags, start_s=round(time.perf_counter() - started, 1))
    started = time.perf_counter()
    try:
        with TemporaryDirectory(prefix="lorry-bench-") as scratch:
            async with Database.connect(database_url) as database:
                info = engine.info
                base = await registry.declare_base(
                    database, info.base_model, info.limits.max_model_len
                )
                store = Store.open(str(Path(scratch) / "store"))
                bench = Bench(engine, database, store, base, folders, Path(scratch) / "cache")
                await loads(bench)
                await drains(bench, work_of(options))
    finally:
        await engine.close()
    report(name="measured in", s=round(time.perf_counter() - started, 1))


# -- single loads --------------------------------------------------------------------------------


async def loads(bench: Bench) -> None:
    """Each kind of load, on an engine that does nothing else."""
    for which in range(ADAPTERS):
        await register(bench, which)
    versions = [
        version
        for which in range(ADAPTERS)
        for version in await registry.current_versions(
            bench.database, bench.base_model_id, f"a{which}"
        )
    ]
    files = AdapterFiles(bench.database, bench.store, bench.cache)
    adapters, fetches = [], []
    for version in versions:
        started = time.perf_counter()
        adapters.append(await files.local(version))
        fetches.append(time.perf_counter() - started)
    say("fetch", fetches, mb=round(size_of(adapters[0]) / 1e6, 1))

    samples, others = adapters[:SAMPLES], adapters[SAMPLES : SAMPLES + SLOTS]
    await load(bench, others[:1])  # the first load of all warms what is compiled late
    for adapter in samples:
        forget_pages(adapter)
    say("disk_cold", await load(bench, samples))
    for adapter in samples:
        await bench.engine.remove_adapter(adapter.lora_int_id)
    disk = await load(bench, samples)
    say("disk", disk)
    for adapter in samples:
        await bench.engine.remove_adapter(adapter.lora_int_id)
    await read_ahead(bench, samples)
    say("ahead", await load(bench, samples))
    say("slot", await load(bench, samples))
    await load(bench, others)  # they take every slot; the samples stay in memory
    cpu = await load(bench, samples)
    say("cpu", cpu)
    fetch = statistics.median(fetches)
    say("not prefetched", [fetch + seconds for seconds in disk])
    for adapter in (*samples, *others):
        await bench.engine.remove_adapter(adapter.lora_int_id)


async def load(bench: Bench, adapters: Sequence[LocalAdapter]) -> list[float]:
    """Load these one after another; returns the seconds of each."""
    seconds = []
    for adapter in adapters:
        started = time.perf_counter()
        await bench.engine.load_adapter(adapter)
        seconds.append(time.perf_counter() - started)
    return seconds


async def read_ahead(bench: Bench, adapters: Sequence[LocalAdapter]) -> None:
    """Have the engine read these, and wait until it has."""
    calls: Any = bench.engine._calls
    while len(await calls.adapters.read_ahead(adapters)) < len(adapters):
        await asyncio.sleep(0.01)


def size_of(adapter: LocalAdapter) -> int:
    """Bytes of an adapter's files."""
    return sum(file.stat().st_size for file in Path(adapter.path).iterdir())


def forget_pages(adapter: LocalAdapter) -> None:
    """Let the system forget what it has read of an adapter's files."""
    for path in Path(adapter.path).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def say(name: str, seconds: Sequence[float], **facts: Any) -> None:
    """A line: the median and the extremes, in milliseconds."""
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    report(name=name, ms=ms(middle), least=ms(low), most=ms(high), n=len(seconds), **facts)


def ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


# -- the drain -----------------------------------------------------------------------------------


async def drains(bench: Bench, work: Sequence[Work]) -> None:
    """The same jobs over few adapters and over many; the many from the disk, then from memory."""
    few = Row("few", len(work), lambda i: i % SLOTS, "")
    many = Row("many", len(work), lambda i: i % ADAPTERS, "")
    await run_drain(bench, few, work[: len(work) // 4])  # warms the engine, and loads the few
    rates, seconds = {}, {}
    ahead: Callable[[Sequence[LocalAdapter]], None] = bench.engine.read_ahead
    rows = [("resident", few), ("not read ahead", many), ("from disk", many), ("from memory", many)]
    for name, row in rows:
        if name in ("not read ahead", "from disk"):
            await forget_all(bench)
        how = _nothing if name == "not read ahead" else ahead
        bench.engine.read_ahead = how  # type: ignore[assignment,method-assign]
        rates[name], facts = await run_drain(bench, row, work)
        seconds[name] = facts["s"], facts["loads"]
        each = facts["load_s"] / max(1, facts["loads"])
        report(name=f"drain {name}", out_tok_s=round(rates[name]), load_ms=ms(each), **facts)
    for name in ("not read ahead", "from disk", "from memory"):
        added, switches = seconds[name][0] - seconds["resident"][0], seconds[name][1] - SLOTS
        report(name=f"switch {name}", switch_ms=ms(added / max(1, switches)), switches=switches)
    for name in ("not read ahead", "from disk", "from memory"):
        report(name=f"{name} / resident", ratio=round(rates[name] / rates["resident"], 3))


def _nothing(_adapters: Sequence[LocalAdapter]) -> None:
    """In place of `read_ahead`."""


async def forget_all(bench: Bench) -> None:
    """Empty the engine's memory of adapters, whoever loaded them."""
    for lora_int_id in list(bench.engine._adapters):
        await bench.engine.remove_adapter(lora_int_id)


def work_of(options: argparse.Namespace) -> list[Work]:
    """Jobs of each drain: enough that adapters beyond the slots get several turns."""
    count = options.jobs or (96 if options.cpu else 512)
    longest = 16 if options.cpu else 96
    if options.cpu:
        return [Work([500 + i] * 16, longest) for i in range(count)]
    return [Work(one.prompt, min(longest, one.output_tokens)) for one in requests(count)]


# -- what it runs on -----------------------------------------------------------------------------


def on_gpu(folder: Path) -> tuple[list[str], Path, list[Path]]:
    """Flags, model and adapters of the 8B shape."""
    return (
        list(ENGINE_FLAGS),
        make_model(folder / "model"),
        make_adapters(folder / "adapters", ADAPTERS),
    )


def on_cpu(folder: Path) -> tuple[list[str], Path, list[Path]]:
    """Flags and model of the demo, and random adapters of its shape."""
    from cli.demo.base import ensure_base
    from tests.support.adapters import LINEAR, Draft

    model = ensure_base(Settings().cache_folder(), lambda text: print(text, file=sys.stderr))
    adapters = [
        Draft(rank=8, modules=LINEAR, seed=number).write(folder / "cpu-adapters" / f"a{number}")
        for number in range(ADAPTERS)
    ]
    flags = ["--max-model-len", "512", "--max-num-seqs", "32", "--max-lora-rank", "8"]
    return [*flags, "--no-enable-prefix-caching"], model, adapters


if __name__ == "__main__":
    main()
