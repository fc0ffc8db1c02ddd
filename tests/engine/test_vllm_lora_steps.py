"""What a step tells the LoRA kernels is what vLLM itself would tell them."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

_SLOTS = 8
_PER_TOKEN = ("token_lora_mapping", "token_indices_sorted_by_lora_ids")


def meta(counts: list[int]) -> Any:
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    made = LoRAKernelMeta.make(_SLOTS, 512, "cpu", counts)
    for name in _PER_TOKEN:
        getattr(made, name).fill_(77)  # what an earlier step has left
    return made


@pytest.mark.parametrize("counts", [[], [1, 2, 4, 8, 9]], ids=["one graph", "graphs by adapters"])
@pytest.mark.parametrize(
    "slots",
    [[-1], [-1] * 40, [3], [5, 5, 0, 5], [-1, 2, -1, 2, 7], list(range(_SLOTS)), [-1, *range(8)]],
    ids=str,
)
def test_the_kernels_are_told_what_vllm_would_tell_them(
    counts: list[int], slots: list[int]
) -> None:
    import torch

    from workers.engine.vllm_lora_steps import TENSORS, tell

    rng = np.random.default_rng(len(slots))
    for step in (np.array(slots), rng.choice(slots, 300), rng.choice(slots, 17)):
        theirs, ours = meta(counts), meta(counts)
        for before in (np.arange(_SLOTS), step):  # nothing of the step before is left
            theirs.prepare_tensors(torch.from_numpy(before))
            tell(ours, before.astype(np.int32))
        for name in TENSORS:
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name


def test_this_release_is_one_that_is_known() -> None:
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    from workers.engine.vllm_lora_steps import _is_known

    assert _is_known(LoRAKernelMeta)


def test_tokens_take_the_slots_of_their_adapters() -> None:
    from workers.engine.vllm_lora_steps import slots_of

    slots = {101: 0, 7: 5, 2**31 - 1: 2}
    assert slots_of((7, 0, 101, 101, 2**31 - 1, 0), slots).tolist() == [5, -1, 0, 0, 2, -1]
    assert slots_of((0, 0), {}).tolist() == [-1, -1]
    with pytest.raises(KeyError):  # as in vLLM: a step with an adapter that has no slot is a bug
        slots_of((7, 8), slots)
