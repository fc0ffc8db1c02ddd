"""What each step tells vLLM's LoRA kernels, made on the host and sent without waiting for the GPU.

The kernels take, for a step's tokens and for its samples: each one's slot, their order by slot, the
slots that occur, how many each has, and where each begins. vLLM makes these with `torch.sort` and
`torch.unique` on the GPU, from a mapping that it has on the host, and waits for the GPU several
times for that: `torch.unique` must know how many there are. So a step is not prepared while the one
before it computes, although the scheduler is asynchronous (vllm-project/vllm#53309 would mend it).
Here the same tensors come from numpy. A GPU was busy for 97 instead of 90 % of the time with it.

Import it only in vLLM's worker process.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.triton_utils import HAS_TRITON

_log = init_logger(__name__)

#: What is filled for the tokens and for the samples of a step, as vLLM names it.
TENSORS: Final = (
    "token_lora_mapping",
    "token_indices_sorted_by_lora_ids",
    "active_lora_ids",
    "num_tokens_per_lora",
    "lora_token_start_loc",
    "no_lora_flag_cpu",
    "num_active_loras_cpu",
)


def prepare_on_host() -> None:
    """Make this process's LoRA wrappers for GPUs prepare their steps on the host; a release that
    has them otherwise keeps its own way."""
    if not HAS_TRITON:
        return  # a CPU's wrappers have no such kernels
    from vllm.lora.ops.triton_ops import LoRAKernelMeta
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    if _is_known(LoRAKernelMeta) and hasattr(PunicaWrapperGPU, "_update_base_metadata"):
        PunicaWrapperGPU.update_metadata = update_metadata
    else:
        _log.info("this release prepares LoRA's steps otherwise than Lorry knows: left as it is")


def _is_known(meta: Any) -> bool:
    """Whether a release's `LoRAKernelMeta` is filled by `tell`, and filled by itself on the GPU."""
    fields = set(TENSORS) | {"captured_lora_counts"} <= meta.__dataclass_fields__.keys()
    takes = list(inspect.signature(meta.prepare_tensors).parameters)
    return fields and takes == ["self", "token_lora_mapping"]


def update_metadata(
    wrapper: Any,
    mapping: Any,
    lora_index_to_id: Sequence[int | None],
    max_loras: int,
    vocab_size: int,
    **_: Any,
) -> None:
    """In place of `PunicaWrapperGPU.update_metadata`."""
    wrapper.is_prefill = mapping.is_prefill
    wrapper._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)  # noqa: SLF001
    slots = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id}
    tell(wrapper.token_mapping_meta, slots_of(mapping.index_mapping, slots))
    tell(wrapper.prompt_mapping_meta, slots_of(mapping.prompt_mapping, slots))


def slots_of(adapters: Sequence[int], slots: dict[int, int]) -> np.ndarray:
    """The slot of each token, −1 without an adapter; int32, one for each of `adapters`."""
    ids, where = np.unique(np.asarray(adapters, dtype=np.int64), return_inverse=True)
    found = [slots[lora_id] if lora_id > 0 else -1 for lora_id in ids.tolist()]
    return np.asarray(found, dtype=np.int32)[where]


def tell(meta: Any, slots: np.ndarray) -> None:
    """Fill a `LoRAKernelMeta`, as its `prepare_tensors` does, from the slots of tokens (int32)."""
    active, counts = np.unique(slots, return_counts=True)
    without = not np.any(slots >= 0)
    meta.no_lora_flag_cpu[0] = without
    meta.num_active_loras_cpu[0] = 0 if without else _captured(meta, active.size)
    room, tokens = meta.active_lora_ids.numel(), 0 if without else slots.size
    lengths = [tokens, tokens, room, room, room + 1]
    sent = np.zeros(sum(lengths), dtype=np.int32)
    mapping, order, ids, per_slot, start = np.split(sent, np.cumsum(lengths)[:-1])
    ids.fill(-1)
    if not without:
        mapping[:] = slots
        order[:] = np.argsort(slots, kind="stable")
        ids[: active.size] = active
        per_slot[: active.size] = counts
        start[1 : 1 + active.size] = np.cumsum(counts)
    targets = (
        meta.token_lora_mapping[:tokens],
        meta.token_indices_sorted_by_lora_ids[:tokens],
        meta.active_lora_ids,
        meta.num_tokens_per_lora,
        meta.lora_token_start_loc,
    )
    _send(sent, lengths, targets)


def _captured(meta: Any, active: int) -> int:
    """The count of adapters that a CUDA graph was captured for, where graphs differ by it."""
    return min((n for n in meta.captured_lora_counts if n >= active), default=active)


def _send(sent: np.ndarray, lengths: Sequence[int], targets: Sequence[torch.Tensor]) -> None:
    """Copy pieces that lie one behind the other to where each belongs, without waiting."""
    host = torch.from_numpy(sent)
    if targets[0].is_cuda:
        host = host.pin_memory()  # torch keeps it until the copies are done
    for piece, target in zip(host.split(lengths), targets, strict=True):
        target.copy_(piece, non_blocking=True)
