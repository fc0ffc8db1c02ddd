"""On a CPU, a slot that is kept empty for the base model's tokens.

vLLM marks a token without adapter by slot −1. Its GPU kernels pass over it; its CPU kernels (to
0.32: vllm-project/vllm#48421) take it for Python's index of the last slot. So where a step holds
both kinds, the base model's requests would be answered with whatever adapter lies there. The engine
gets one slot more than it was told, and an empty adapter is pinned in the last one.

Import it only after `prepare_environment`.
"""

import asyncio
import json
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

#: Ids far from those of Postgres.
_LAST_ID: Final = 2**31 - 1
#: Modules by one of which vLLM takes an adapter for one of the model's, most frequent first.
_MODULES: Final = ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "down_proj", "dense")


def extra_slots(args: Any) -> int:
    """How many slots an engine needs beside those for adapters: 1 on a CPU with LoRA, or 0."""
    return int(bool(args.enable_lora) and current_platform.is_cpu())


def with_extra_slots(args: Any) -> Any:
    """vLLM's arguments with those slots; as they are where there are none."""
    if not (extra := extra_slots(args)):
        return args
    args = copy(args)
    args.max_loras += extra
    args.max_cpu_loras = max(args.max_cpu_loras or 0, args.max_loras) + extra
    return args


async def keep_last_slot_empty(llm: Any, slots: int) -> None:
    """Pin an adapter that does nothing in the last of `slots` slots, before any other is loaded.

    vLLM fills the first free slot, so the same one under other ids takes those before it meanwhile.

    Raises:
        RuntimeError: vLLM takes none for this model.
    """
    ids = range(_LAST_ID - slots + 1, _LAST_ID + 1)
    with TemporaryDirectory(prefix="lorry-empty-") as folder:
        await _add_first(llm, ids[0], Path(folder))
        for lora_id in ids[1:]:
            await llm.add_lora(LoRARequest(f"empty-{lora_id}", lora_id, folder))
    await llm.pin_lora(_LAST_ID)
    for lora_id in ids[:-1]:
        await llm.remove_lora(lora_id)


async def _add_first(llm: Any, lora_id: int, folder: Path) -> None:
    for module in _MODULES:
        await asyncio.to_thread(_write, folder, module)
        try:
            await llm.add_lora(LoRARequest(f"empty-{lora_id}", lora_id, str(folder)))
            return
        except EngineDeadError:
            raise
        except Exception:  # none of this model's modules
            await llm.remove_lora(lora_id)
    raise RuntimeError(
        "vLLM takes no adapter for this model on a CPU: start the worker with --no-enable-lora"
    )


def _write(folder: Path, module: str) -> None:
    """An adapter of zeros for a layer that no model has: it loads, and does nothing."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": [module]}))
    name = f"base_model.model.lorry.nothing.{module}"
    zeros = {
        f"{name}.lora_A.weight": np.zeros((1, 8), np.float32),
        f"{name}.lora_B.weight": np.zeros((8, 1), np.float32),
    }
    save_file(zeros, folder / "adapter_model.safetensors")
