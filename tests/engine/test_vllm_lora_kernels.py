"""Tile sizes of LoRA's kernels: vLLM finds what is measured for its GPU, and nothing of others."""

import json
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import workers.engine
from benchmarks.lora_kernels import LARGE_RANK, LAYERS, MEASURED, SLOTS, TOKENS, grid, put
from benchmarks.workload import RANK

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

#: Those that come with Lorry.
_FILES = sorted(Path(workers.engine.__file__).parent.glob("lora_kernels/*.json"))
#: For 8 slots, layers of two slices, 64 and 512 tokens, inputs of 4,096 and rank 16.
_SHRINK = {
    "9": {"2": {"64": {"4096": {"16": {"block_m": 16}}}, "512": {"4096": {"16": {"block_m": 32}}}}}
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """vLLM's look-up, as it is after `use_tuned_kernels` on an "NVIDIA H200-Test"."""
    from vllm.lora.ops.triton_ops import utils

    from workers.engine import vllm_lora_kernels

    (tmp_path / "NVIDIA_H200_Test.json").write_text(json.dumps({"shrink": _SHRINK}))
    monkeypatch.setattr(vllm_lora_kernels, "FOLDER", tmp_path)
    return _look_up(monkeypatch, utils, "NVIDIA H200-Test")


def _look_up(monkeypatch: pytest.MonkeyPatch, utils: Any, gpu: str) -> Any:
    from workers.engine.vllm_lora_kernels import loader

    load = loader(utils.load_lora_op_config, lambda: gpu)
    monkeypatch.setattr(utils, "load_lora_op_config", load)
    return utils.get_lora_op_configs.__wrapped__  # without what it remembers


def _shrink(kernels: Any, batch: int, slices: int = 2, hidden: int = 4096) -> Any:
    return kernels(
        "shrink", max_loras=9, batch=batch, hidden_size=hidden, rank=16, num_slices=slices
    )


def test_the_nearest_measured_step_counts(kernels: Any) -> None:
    assert _shrink(kernels, 8)["block_m"] == 16
    assert _shrink(kernels, 64)["block_m"] == 16
    assert _shrink(kernels, 480, hidden=5120)["block_m"] == 32


@pytest.mark.parametrize("slices", [1, 3, 4])
def test_layers_of_other_slices_find_something(kernels: Any, slices: int) -> None:
    assert _shrink(kernels, 64, slices)["block_m"] == 16


def test_what_is_not_measured_stays_as_vllm_has_it(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.ops.triton_ops import utils

    facts = {"max_loras": 9, "batch": 64, "hidden_size": 4096, "rank": 16, "num_slices": 1}
    assert kernels("expand", **facts, add_inputs=True)["block_m"] == 64
    assert kernels("expand", **facts, add_inputs=False)["block_m"] == 64
    other = _look_up(monkeypatch, utils, "NVIDIA A10")
    assert other("expand", **facts, add_inputs=True)["block_m"] == 64


def test_files_have_all_that_a_kernel_asks_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.lora.ops.triton_ops import utils

    from workers.engine import vllm_lora_kernels

    made: dict[str, Any] = {}
    for slots, layer, tokens, rank in product(SLOTS, LAYERS, TOKENS, (RANK, LARGE_RANK)):
        for kernel in (kernel for kernel, layers in MEASURED.items() if layer in layers):
            put(made, kernel, layer, slots, tokens, rank, grid(kernel)[rank == RANK])
    (tmp_path / "made.json").write_text(json.dumps(made))
    own = utils.load_lora_op_config
    for file in (tmp_path / "made.json", *_FILES):
        monkeypatch.setattr(vllm_lora_kernels, "FOLDER", file.parent)
        monkeypatch.setattr(utils, "load_lora_op_config", own)
        look_up = _look_up(monkeypatch, utils, file.stem)
        for slots, slices, batch, rank in product(
            (2, 9, 65), (1, 2, 3, 4), (1, 700, 8192), (8, 64)
        ):
            facts = {"max_loras": slots, "batch": batch, "hidden_size": 2048, "rank": rank}
            for kernel in MEASURED:
                found = look_up(kernel, num_slices=slices, add_inputs=True, **facts)
                assert found.keys() == grid(kernel)[0].keys(), (file.stem, kernel, facts)
                if file.stem == "made":  # and a rank finds its own, not that of all
                    assert found == grid(kernel)[rank < LARGE_RANK]
