"""vLLM's manager of adapters over its own layers, without the model and the engine around them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

SLOTS: Final = 3
RANK: Final = 8
_PACKED: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Shape:
    """A model's linear layers.

    Args:
        layers: names that their modules' begin with.
        linear: of each module its width in, and the widths of its slices.
    """

    layers: Sequence[str]
    linear: Mapping[str, tuple[int, Sequence[int]]]
    rank: int = RANK
    slots: int = SLOTS

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Of each projection its width in and out."""
        return {
            part: (into, width)
            for name, (into, widths) in self.linear.items()
            for part, width in zip(_parts(name), widths, strict=True)
        }


SMALL: Final = Shape(
    layers=("layers.0.", "layers.1."),
    linear={
        "qkv_proj": (24, (16, 8, 8)),
        "o_proj": (24, (24,)),
        "gate_up_proj": (24, (40, 40)),
        "down_proj": (24, (24,)),
    },
)


def _parts(module: str) -> Sequence[str]:
    kind = module.rpartition(".")[2]
    return [module.removesuffix(kind) + part for part in _PACKED.get(kind, (kind,))]


def manager_of(device: str, shape: Shape = SMALL) -> Any:
    """The manager, its slots full of what is to be overwritten."""
    from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager

    manager: Any = LRUCacheLoRAModelManager.__new__(LRUCacheLoRAModelManager)
    manager.model = SimpleNamespace()
    manager.modules = {
        at + name: _module(name, shape, device) for at in shape.layers for name in shape.linear
    }
    manager.packed_modules = {
        name: _parts(name) for name in manager.modules if len(_parts(name)) > 1
    }
    slots = shape.slots
    manager.lora_config = SimpleNamespace(max_loras=slots, max_cpu_loras=2 * slots)
    manager.is_pooling_model = manager._is_moe = manager._is_3d_moe_model = False
    manager._enable_mixed_moe_lora_format = manager._enable_moe_shared_loras = False
    manager.lora_index_to_id = [None] * slots
    manager._registered_adapters = AdapterLRUCache(2 * slots, manager.deactivate_adapter)
    manager._active_adapters = AdapterLRUCache(slots, manager._deactivate_adapter)
    return manager


def _module(name: str, shape: Shape, device: str) -> Any:
    import torch
    from vllm.lora.layers import column_parallel_linear, row_parallel_linear

    classes: dict[str, Any] = {
        "qkv_proj": column_parallel_linear.MergedQKVParallelLinearWithLoRA,
        "gate_up_proj": column_parallel_linear.MergedColumnParallelLinearWithLoRA,
        "o_proj": row_parallel_linear.RowParallelLinearWithLoRA,
        "down_proj": row_parallel_linear.RowParallelLinearWithLoRA,
    }
    into, widths = shape.linear[name]
    made: Any = object.__new__(classes[name.rpartition(".")[2]])
    torch.nn.Module.__init__(made)
    made.tp_size, made.n_slices = 1, len(widths)
    made.lora_a_stacked, made.lora_b_stacked = (
        tuple(
            torch.randn(shape.slots, 1, *one, dtype=torch.bfloat16, device=device) for one in shapes
        )
        for shapes in (
            [(shape.rank, into)] * len(widths),
            [(width, shape.rank) for width in widths],
        )
    )
    return made


def adapter(number: int, *, rank: int, parts: Sequence[str]) -> Any:
    """A `LoRAModel` on these projections, its weights drawn from `number`."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    loras = {
        name: LoRALayerWeights(name, rank, 3 * rank, a.bfloat16(), b.bfloat16())
        for name, (a, b) in _drawn(number, rank, parts).items()
    }
    return LoRAModel(number, rank, loras)


def _drawn(number: int, rank: int, parts: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    import torch

    drawn = torch.Generator().manual_seed(number)
    return {
        at + part: (
            torch.randn(rank, SMALL.projections[part][0], generator=drawn),
            torch.randn(SMALL.projections[part][1], rank, generator=drawn),
        )
        for at in SMALL.layers
        for part in parts
    }


def reading(manager: Any, shape: Shape = SMALL) -> Any:
    """vLLM's own way from a `LoRARequest` to a `LoRAModel`."""
    import torch
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.worker_manager import WorkerLoRAManager

    manager.supported_lora_modules = [name.rpartition(".")[2] for name in shape.linear]
    manager.packed_modules_mapping = {name: list(parts) for name, parts in _PACKED.items()}
    manager.moe_ep_load_spec = manager._classification_head = None
    manager.supported_modules_to_save, manager._pooling_task = [], None
    worker: Any = WorkerLoRAManager.__new__(WorkerLoRAManager)
    worker._adapter_manager, worker._lora_model_cls = manager, LoRAModel
    worker.vocab_size = worker.max_position_embeddings = None
    worker.lora_config = SimpleNamespace(
        max_lora_rank=shape.rank, lora_dtype=torch.bfloat16, bias_enabled=False, target_modules=None
    )
    return worker._load_adapter


def write_adapter_file(
    folder: Path,
    number: int,
    *,
    rank: int = RANK,
    parts: Sequence[str] = tuple(SMALL.projections),
    dtype: str = "float32",
    trained: bool = True,
    **configuration: Any,
) -> Path:
    """An adapter's folder as PEFT writes it; B is zero before it is trained."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, pair in _drawn(number, rank, parts).items():
        for which, tensor in zip("AB", pair, strict=True):
            key = f"base_model.model.{name}.lora_{which}.weight"
            tensors[key] = (tensor if trained or which == "A" else 0 * tensor).to(
                getattr(torch, dtype)
            )
    save_file(tensors, folder / "adapter_model.safetensors")
    known = {"r": rank, "lora_alpha": 3 * rank, "target_modules": list(parts), "bias": "none"}
    text = json.dumps({"peft_type": "LORA"} | known | configuration)
    (folder / "adapter_config.json").write_text(text)
    return folder
