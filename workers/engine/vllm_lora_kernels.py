"""Tile sizes of vLLM's LoRA kernels, as measured for a GPU (`python -m benchmarks.lora_kernels`).

vLLM takes them from files for a GPU's name where `VLLM_TUNED_CONFIG_FOLDER` is set, and one for all
otherwise: blocks of 64 tokens, of which 8 sequences of an adapter fill an eighth. It has no files
of its own. That variable also changes how its mixture-of-experts layers choose theirs, so the files
in `lora_kernels/` are handed to the two kernels of dense layers alone.

Import it only in vLLM's worker process.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.triton_utils import HAS_TRITON

_log = init_logger(__name__)

FOLDER: Final = Path(__file__).parent / "lora_kernels"

#: Slices of a packed layer; models have up to four.
_MOST_SLICES: Final = 16


def use_tuned_kernels() -> None:
    """Hand this process's LoRA kernels what is measured for its GPU, unless the operator has files
    of their own, or wants the same sums whatever the batch (`VLLM_BATCH_INVARIANT`)."""
    if not HAS_TRITON or envs.VLLM_TUNED_CONFIG_FOLDER or envs.VLLM_BATCH_INVARIANT:
        return
    from vllm.lora.ops.triton_ops import utils

    own = getattr(utils, "load_lora_op_config", None)
    if own is None:
        _log.info("this release takes no tile sizes for LoRA's kernels: left as it is")
        return
    utils.load_lora_op_config = loader(own, torch.cuda.get_device_name)


def loader(own: Callable[..., Any], gpu: Callable[[], str]) -> Callable[..., Any]:
    """In place of vLLM's `load_lora_op_config`: what is measured for a GPU and a kernel, or what
    vLLM has (`own`). `expand` is measured adding to its layer's output, and takes the same where it
    writes beside it (`VLLM_LORA_ENABLE_DUAL_STREAM`)."""

    @functools.cache
    def load(op_type: str, add_inputs: bool | None) -> Any:
        return tuned(gpu()).get(op_type) or own(op_type, add_inputs)

    return load


def file_of(gpu: str) -> Path:
    """The file for a GPU, by its name as torch tells it: vLLM's own rule."""
    return FOLDER / f"{gpu.replace(' ', '_').replace('-', '_')}.json"


def tuned(gpu: str) -> dict[str, Any]:
    """What is measured for a GPU: by kernel (`expand`, `shrink`), then as vLLM's own files are:
    by the number of slots and one, of slices, of tokens, and by the sizes that are summed over and
    made. Empty for a GPU that was not measured."""
    path = file_of(gpu)
    if not path.exists():
        return {}
    kernels: dict[str, Any] = json.loads(path.read_text())
    for slots in (slots for kernel in kernels.values() for slots in kernel.values()):
        most = slots[max(slots)]
        for slices in range(1, _MOST_SLICES + 1):  # vLLM finds the nearest of all else
            slots.setdefault(str(slices), most)
    return kernels
