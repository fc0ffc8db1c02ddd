"""Find the tile sizes of vLLM's LoRA kernels for this GPU, and write them down.

    python -m benchmarks.lora_kernels [--out FILE] [--budget SECONDS]             (a GPU)

Every configuration of a grid is timed on the layers of an 8B-shaped Llama at rank 16, for steps of
16 to 2,048 tokens and for 8, 16 and 32 slots: once with all tokens of one adapter, and once spread
evenly over as many as there are slots. What makes the sum of both least is kept, and vLLM's own
configuration where nothing is faster. Each time is of launches inside a CUDA graph, over the
weights of several layers in turn, so that they do not lie in the cache. A line of JSON for each
kernel and layer, its times in microseconds, then the ratio of all times added up. The file goes
where `workers/engine/vllm_lora_kernels.py` finds it.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.bare import report
from benchmarks.workload import HIDDEN, INTERMEDIATE, KEY_VALUE, RANK

Config = dict[str, Any]

#: Layers by their slices, as vLLM packs them: outputs of each, and inputs.
LAYERS: Final = {
    "qkv": ((HIDDEN, KEY_VALUE, KEY_VALUE), HIDDEN),
    "o": ((HIDDEN,), HIDDEN),
    "gate_up": ((INTERMEDIATE, INTERMEDIATE), HIDDEN),
    "down": ((HIDDEN,), INTERMEDIATE),
}
#: `expand` knows a layer by its slices and outputs, and so `o` and `down` as one.
MEASURED: Final = {"expand": ("qkv", "o", "gate_up"), "shrink": tuple(LAYERS)}
TOKENS: Final = (16, 64, 128, 256, 512, 768, 1024, 2048)
SLOTS: Final = (8, 16, 32)
#: A rank that is not measured, and keeps vLLM's own: it takes the nearest one of the file.
LARGE_RANK: Final = 64
#: Layers whose weights are used in turn.
TURNS: Final = 6
#: Processes that compile at once.
COMPILERS: Final = 14


def grid(kernel: str) -> list[Config]:
    """What is tried for `expand` or `shrink`."""
    both = {"num_ctas": 1, "max_nreg": None}
    if kernel == "expand":
        tiles = itertools.product((16, 32, 64), (64, 128, 256), (4, 8))
        return [
            both | {"block_m": m, "block_n": n, "block_k": RANK, "num_warps": w, "num_stages": 2}
            for m, n, w in tiles
        ]
    tiles = itertools.product((16, 32, 64), (64, 128, 256), (4, 8, 16, 32))
    return [
        both | {"block_m": m, "block_n": 16, "block_k": k, "split_k": split, "num_warps": 4,
                "num_stages": 4 if k < 256 else 2, "group_size_m": 8}
        for m, k, split in tiles
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """Which tokens of a step take which slot: spread evenly over the first `adapters` slots."""

    tokens: int
    slots: int
    adapters: int


class Bench:
    """Weights and buffers of one layer."""

    def __init__(self, layer: str, slots: int) -> None:
        import torch
        from vllm.lora.ops.triton_ops import utils

        # vLLM remembers layers by their addresses, which weights that are gone have left to others
        utils._LORA_A_PTR_DICT.clear()
        utils._LORA_B_PTR_DICT.clear()
        self.outputs, self.inputs = LAYERS[layer]
        self.slots = slots

        def made(*shape: int) -> Any:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.01

        slices = len(self.outputs)
        self.a = [[made(slots, 1, RANK, self.inputs) for _ in range(slices)] for _ in range(TURNS)]
        self.b = [[made(slots, 1, n, RANK) for n in self.outputs] for _ in range(TURNS)]
        self.x = made(max(TOKENS), self.inputs)
        self.y = made(max(TOKENS), sum(self.outputs))
        self.between = torch.randn(slices, max(TOKENS), RANK, device="cuda")

    def launches(self, kernel: str, step: Step) -> list[Callable[[], Any]]:
        """A launch for each turn, and what it wrote to."""
        import torch
        from vllm.lora.ops.triton_ops import LoRAKernelMeta
        from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
        from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

        meta = LoRAKernelMeta.make(step.slots, step.tokens, "cuda")
        meta.prepare_tensors(torch.arange(step.tokens, device="cuda") % step.adapters)
        facts = meta.meta_args(step.tokens, False)
        between = self.between[:, : step.tokens].contiguous()
        y = self.y[: step.tokens]
        x = self.x[: step.tokens]

        def launch(turn: int) -> Callable[[], Any]:
            def shrink() -> Any:
                _lora_shrink(x, self.a[turn], between, *facts, 1.0)
                return between

            def expand() -> Any:
                _lora_expand(between, self.b[turn], y, *facts, 0, True)
                return y

            return shrink if kernel == "shrink" else expand

        return [launch(turn) for turn in range(TURNS)]


def with_config(config: Config | None) -> None:
    """Make vLLM's kernels take a configuration; None is vLLM's own."""
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op, utils

    def given(*_args: Any, **_named: Any) -> Config:
        assert config is not None
        return config

    for module in (lora_expand_op, lora_shrink_op):
        module.get_lora_op_configs = given if config else utils.get_lora_op_configs


def compile_some(share: Sequence[tuple[str, Config]]) -> int:
    """Compile configurations into the cache on the disk, in a process of its own."""
    benches = {layer: Bench(layer, 2) for layer in LAYERS}
    for kernel, config in share:
        with_config(config)
        for layer in MEASURED[kernel]:
            benches[layer].launches(kernel, Step(64, 2, 2))[0]()
    return len(share)


def time_of(launches: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one launch, inside a CUDA graph; the least of three."""
    import torch

    for launch in launches:  # compiles, and tells the GPU where a layer's weights are
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()  # not torch.cuda.graph, which collects garbage each time
        for launch in [*launches, *launches]:
            launch()
        graph.capture_end()
    graph.replay()
    least = float("inf")
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        least = min(least, begin.elapsed_time(end))
    return least * 1000 / (2 * len(launches))


def spreads(tokens: int, slots: int) -> Iterator[Step]:
    yield Step(tokens, slots, 1)
    yield Step(tokens, slots, slots)


def best_of(bench: Bench, kernel: str, tokens: int) -> tuple[Config | None, list[float], float]:
    """The configuration for a step's tokens, vLLM's own two times, and the best sum."""
    work = [bench.launches(kernel, step) for step in spreads(tokens, bench.slots)]
    with_config(None)
    own = [time_of(launches) for launches in work]
    best, least = None, sum(own)
    for config in grid(kernel):
        with_config(config)
        first = time_of(work[1])
        if first >= least:
            continue
        if (taken := first + time_of(work[0])) < least:
            best, least = config, taken
    return best, own, least


def check(bench: Bench, kernel: str, config: Config, tokens: int) -> None:
    """Refuse a configuration that computes something else than vLLM's own."""
    import torch

    made = []
    for one in (None, config):
        with_config(one)
        bench.y.zero_()
        made.append(bench.launches(kernel, Step(tokens, bench.slots, bench.slots))[0]().clone())
    if not torch.allclose(made[0].float(), made[1].float(), rtol=0.02, atol=1e-4):
        raise SystemExit(f"{kernel} at {tokens} tokens goes wrong with {config}")


def own_config(kernel: str, layer: str, slots: int, tokens: int, rank: int) -> Config:
    """What vLLM takes by itself."""
    from vllm.lora.ops.triton_ops.utils import get_lora_op_configs

    outputs, inputs = LAYERS[layer]
    found: Config = get_lora_op_configs(
        kernel,
        max_loras=slots + 1,
        batch=tokens,
        hidden_size=inputs if kernel == "shrink" else max(outputs),
        rank=rank,
        num_slices=len(outputs),
        add_inputs=True,
    )
    return found


def tiles_of(config: Config | None) -> list[int]:
    """What differs between configurations, for a line; nothing of vLLM's own."""
    names = ("block_m", "block_n", "block_k", "split_k", "num_warps")
    return [config[name] for name in names if name in config] if config else []


def put(
    found: Config, kernel: str, layer: str, slots: int, tokens: int, rank: int, config: Config
) -> None:
    """Write a configuration down where vLLM looks for it."""
    outputs, inputs = LAYERS[layer]
    summed, made = (inputs, rank) if kernel == "shrink" else (rank, max(outputs))
    place = found.setdefault(kernel, {})
    for key in (slots + 1, len(outputs), tokens, summed):
        place = place.setdefault(str(key), {})
    place[str(made)] = config


def measure(out: Path, budget: float) -> None:
    """Time everything, and write the file."""
    began = time.perf_counter()
    found: Config = {}
    totals = [0.0, 0.0]
    for slots, layer in itertools.product(SLOTS, LAYERS):
        bench = Bench(layer, slots)
        for kernel in (name for name, layers in MEASURED.items() if layer in layers):
            line: dict[str, list[Any]] = {}
            for tokens in TOKENS:
                if time.perf_counter() - began > budget:
                    continue
                best, own, least = best_of(bench, kernel, tokens)
                if best:
                    check(bench, kernel, best, tokens)
                for rank in (RANK, LARGE_RANK):
                    own_one = own_config(kernel, layer, slots, tokens, rank)
                    config = best if best and rank == RANK else own_one
                    put(found, kernel, layer, slots, tokens, rank, config)
                line[str(tokens)] = [*(round(us, 1) for us in (*own, least)), *tiles_of(best)]
                totals[0] += sum(own)
                totals[1] += least
            report(name=f"{kernel} {layer}", slots=slots, own_one_own_all_best_sum_us_tiles=line)
            out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    report(name="tuned / vLLM's own, all times added up", ratio=round(totals[1] / totals[0], 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="instead of the place for this GPU")
    parser.add_argument("--budget", type=float, default=600, help="seconds to measure in")
    options = parser.parse_args()
    tried = [(kernel, config) for kernel in MEASURED for config in grid(kernel)]
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(COMPILERS, mp_context=context) as pool:
        list(pool.map(compile_some, [tried[i::COMPILERS] for i in range(COMPILERS)]))
    report(name="compiled", configurations=len(tried), s=round(time.perf_counter() - began, 1))
    measure(options.out or place_for_this_gpu(), options.budget)


def place_for_this_gpu() -> Path:
    """Where the worker looks."""
    import torch

    from workers.engine.vllm_lora_kernels import file_of

    return file_of(torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
