"""What reading an adapter ahead takes from the steps that compute beside it: vLLM's way, and by a
known layout of its file.

    python -m benchmarks.reader_cost            (CPU; 84 MB adapters of an 8B model)

The reader is the one of the engine's worker, over vLLM's own layers with the shapes of an 8B model.
The steps are a thread like that of vLLM's core: many small calls of Python and torch, then a wait
for the GPU. Each way reads one adapter after another beside them, with a pause between two.
`lost_ms` is how much computing an adapter cost: steps that were not made, times what one takes.
Every figure is a line of JSON; the ratio of the losses comes last.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import torch
from vllm.lora.request import LoRARequest

from benchmarks.bare import report
from benchmarks.workload import HIDDEN, INTERMEDIATE, KEY_VALUE, LAYERS, RANK, make_adapters
from tests.support.lora_slots import Shape, manager_of, reading
from workers.engine.vllm_file_layouts import FileLayouts
from workers.engine.vllm_slot_images import slot_images

SHAPE: Final = Shape(
    layers=[f"model.layers.{number}." for number in range(LAYERS)],
    linear={
        "self_attn.qkv_proj": (HIDDEN, (HIDDEN, KEY_VALUE, KEY_VALUE)),
        "self_attn.o_proj": (HIDDEN, (HIDDEN,)),
        "mlp.gate_up_proj": (HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
        "mlp.down_proj": (INTERMEDIATE, (HIDDEN,)),
    },
    rank=RANK,
    slots=1,
)
#: Small calls of a step, and the seconds that it waits for the GPU: a host that is busy for about
#: 60 and for about 40 % of the time.
STEPS: Final = ((1000, 0.002), (1000, 0.006))
PAUSE_SECONDS: Final = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--folder", default="/tmp/lorry-bench")
    options = parser.parse_args()
    torch.set_num_threads(1)  # copies are not to take the steps' core
    ways = ways_of(make_adapters(Path(options.folder) / "adapters", 3))
    ratios = []
    for calls, wait in STEPS:
        alone = steps(options.seconds, calls, wait)
        lost = {}
        for name, read in ways.items():
            rate, reads = beside(read, partial(steps, options.seconds, calls, wait))
            lost[name] = (1 - rate / alone) * options.seconds / len(reads)
            report(
                name=name,
                step_ms=round(1e3 / alone, 1),
                step_beside_ms=round(1e3 / rate, 1),
                read_ms=round(1e3 * statistics.median(reads)),
                lost_ms=round(1e3 * lost[name], 1),
            )
        ratios.append(lost["by layout"] / lost["vLLM's way"])
    print(json.dumps({"lost by layout / vLLM's way": [round(ratio, 3) for ratio in ratios]}))


def ways_of(folders: list[Path]) -> dict[str, Callable[[int], object]]:
    """Both ways to read adapter number n and make its slot's image."""
    manager = manager_of("cpu", SHAPE)
    images = slot_images(manager, torch.device("cpu"))
    assert images is not None
    read = reading(manager, SHAPE)
    layouts = FileLayouts(manager, read, images)

    def request(number: int) -> LoRARequest:
        return LoRARequest(f"a{number}", 1 + number, str(folders[number % len(folders)]))

    layouts.read(request(0))  # the first of a kind
    return {
        "vLLM's way": lambda number: images.make(read(request(number))),
        "by layout": lambda number: layouts.read(request(number)),
    }


def steps(seconds: float, calls: int, wait: float) -> float:
    """Steps in a second."""
    tensor, count = torch.zeros(64), 0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(calls):
            _ = tensor + 1
            _ = {number: number for number in range(20)}
        time.sleep(wait)
        count += 1
    return count / seconds


def beside(
    read: Callable[[int], object], measure: Callable[[], float]
) -> tuple[float, list[float]]:
    """What is measured while a thread reads, and the seconds of each reading."""
    over, seconds = threading.Event(), list[float]()

    def reader() -> None:
        while not over.wait(PAUSE_SECONDS):
            began = time.perf_counter()
            read(len(seconds))
            seconds.append(time.perf_counter() - began)

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        return measure(), seconds
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
