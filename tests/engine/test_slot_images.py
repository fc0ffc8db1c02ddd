"""A slot filled by its image is, bit for bit, what vLLM itself makes of it."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.vllm]

_SLOTS = 3
_RANK = 8
_WIDTH = 24
#: Of each linear layer the widths of its slices.
_LAYERS = {"qkv_proj": (16, 8, 8), "o_proj": (24,), "gate_up_proj": (40, 40), "down_proj": (24,)}
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def manager_of(device: str) -> Any:
    """vLLM's manager over its own layers, without the model, which no test here needs."""
    from vllm.lora.layers import column_parallel_linear, row_parallel_linear
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager

    classes: dict[str, type[BaseLinearLayerWithLoRA]] = {
        "qkv_proj": column_parallel_linear.MergedQKVParallelLinearWithLoRA,
        "gate_up_proj": column_parallel_linear.MergedColumnParallelLinearWithLoRA,
        "o_proj": row_parallel_linear.RowParallelLinearWithLoRA,
        "down_proj": row_parallel_linear.RowParallelLinearWithLoRA,
    }

    def layer(name: str) -> Any:
        made: Any = object.__new__(classes[name])
        torch.nn.Module.__init__(made)
        made.tp_size, made.n_slices = 1, len(_LAYERS[name])
        made.lora_a_stacked, made.lora_b_stacked = (
            tuple(
                torch.randn(_SLOTS, 1, *shape, dtype=torch.bfloat16, device=device)
                for shape in shapes
            )
            for shapes in (
                [(_RANK, _WIDTH)] * len(_LAYERS[name]),
                [(width, _RANK) for width in _LAYERS[name]],
            )
        )
        return made

    manager: Any = LRUCacheLoRAModelManager.__new__(LRUCacheLoRAModelManager)
    manager.modules = {f"layers.{i}.{name}": layer(name) for i in range(2) for name in _LAYERS}
    manager.packed_modules = {
        f"layers.{i}.{name}": [f"layers.{i}.{part}" for part in parts]
        for i in range(2)
        for name, parts in _PACKED.items()
    }
    manager.lora_config = type("Config", (), {"max_loras": _SLOTS, "max_cpu_loras": 2 * _SLOTS})
    manager.is_pooling_model = manager._is_moe = manager._is_3d_moe_model = False
    manager._enable_mixed_moe_lora_format = manager._enable_moe_shared_loras = False
    manager.lora_index_to_id = [None] * _SLOTS
    manager._registered_adapters = AdapterLRUCache(2 * _SLOTS, manager.deactivate_adapter)
    manager._active_adapters = AdapterLRUCache(_SLOTS, manager._deactivate_adapter)
    return manager


def adapter(number: int, *, rank: int, parts: tuple[str, ...]) -> Any:
    """An adapter on these projections, its weights drawn from `number`."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    drawn = torch.Generator().manual_seed(number)
    widths = {name: made[0] for name, made in _LAYERS.items() if name not in _PACKED}
    for name, names in _PACKED.items():
        widths |= dict(zip(names, _LAYERS[name], strict=True))
    loras = {}
    for i in range(2):
        for part in parts:
            a = torch.randn(rank, _WIDTH, generator=drawn).bfloat16()
            b = torch.randn(widths[part], rank, generator=drawn).bfloat16()
            name = f"layers.{i}.{part}"
            loras[name] = LoRALayerWeights(name, rank, 3 * rank, a, b)
    return LoRAModel(number, rank, loras)


#: Full, a lower rank, only some projections (one alone of a packed layer), and those that another
#: had in the slot before.
_ADAPTERS: list[dict[str, Any]] = [
    {"rank": 8, "parts": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")},
    {"rank": 4, "parts": ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")},
    {"rank": 8, "parts": ("v_proj",)},
    {"rank": 2, "parts": ("down_proj",)},
    {"rank": 8, "parts": ("gate_proj", "up_proj", "down_proj")},
]


@pytest.mark.parametrize("device", _DEVICES)
def test_a_slot_is_as_vllm_fills_it(device: str) -> None:
    from workers.engine.vllm_slot_images import slot_images

    own, imaged = manager_of(device), manager_of(device)
    images = slot_images(imaged, torch.device(device))
    assert images is not None
    for number, facts in enumerate(_ADAPTERS, start=1):
        own.add_adapter(adapter(number, **facts))
        own.activate_adapter(number)
        ahead = adapter(number, **facts)
        ahead.lorry_image = images.make(ahead)
        imaged.add_adapter(ahead)
        imaged.activate_adapter(number)
        assert imaged.lora_index_to_id == own.lora_index_to_id
        assert set(imaged.list_adapters()) == set(own.list_adapters())
        slot = own.lora_index_to_id.index(number)
        for name, module in own.modules.items():
            for stacked in ("lora_a_stacked", "lora_b_stacked"):
                pairs = zip(
                    getattr(module, stacked), getattr(imaged.modules[name], stacked), strict=True
                )
                for expected, found in pairs:
                    assert torch.equal(found[slot], expected[slot]), (number, name, stacked)


def test_only_its_own_slot_is_written() -> None:
    from workers.engine.vllm_slot_images import slot_images

    manager = manager_of("cpu")
    images = slot_images(manager, torch.device("cpu"))
    assert images is not None
    before = {name: module.lora_b_stacked[0].clone() for name, module in manager.modules.items()}
    first = adapter(1, **_ADAPTERS[0])
    first.lorry_image = images.make(first)
    images.make(adapter(2, **_ADAPTERS[1]))  # a draft behind it must not change it
    manager.add_adapter(first)
    manager.activate_adapter(1)
    for name, module in manager.modules.items():
        assert torch.equal(module.lora_b_stacked[0][1:], before[name][1:])
    whole = first.loras["layers.1.o_proj"].lora_b
    assert torch.equal(manager.modules["layers.1.o_proj"].lora_b_stacked[0][0, 0], whole)


def test_an_adapter_that_was_not_made_ready_is_loaded_by_vllm() -> None:
    from workers.engine.vllm_slot_images import slot_images

    manager = manager_of("cpu")
    assert slot_images(manager, torch.device("cpu")) is not None
    late = adapter(1, **_ADAPTERS[0])
    manager.add_adapter(late)
    manager.activate_adapter(1)
    b = late.loras["layers.0.o_proj"].lora_b
    assert torch.equal(manager.modules["layers.0.o_proj"].lora_b_stacked[0][0, 0], b)


def test_an_evicted_adapter_comes_back_from_memory() -> None:
    """Its image is gone with its first activation; what vLLM keeps is whole."""
    from workers.engine.vllm_slot_images import slot_images

    manager = manager_of("cpu")
    images = slot_images(manager, torch.device("cpu"))
    assert images is not None
    several = [adapter(number, **_ADAPTERS[0]) for number in range(1, _SLOTS + 2)]
    for one in several:
        one.lorry_image = images.make(one)
        manager.add_adapter(one)
        manager.activate_adapter(one.id)
    assert 1 not in manager.lora_index_to_id
    manager.activate_adapter(1)
    slot = manager.lora_index_to_id.index(1)
    b = several[0].loras["layers.0.o_proj"].lora_b
    assert torch.equal(manager.modules["layers.0.o_proj"].lora_b_stacked[0][slot, 0], b)


def test_what_is_in_memory_gets_an_image_for_its_next_slot() -> None:
    from workers.engine.vllm_slot_images import slot_images

    manager = manager_of("cpu")
    images = slot_images(manager, torch.device("cpu"))
    assert images is not None
    for number in range(1, _SLOTS + 2):
        manager.add_adapter(adapter(number, **_ADAPTERS[0]))
        manager.activate_adapter(number)
    kept = images.in_memory(1)
    assert not images.in_slot(1)
    b = kept.loras["layers.0.o_proj"].lora_b.clone()
    kept.lorry_image = images.make(kept)
    assert torch.equal(kept.loras["layers.0.o_proj"].lora_b, b)  # its scaling is not merged again
    manager.activate_adapter(1)
    slot = manager.lora_index_to_id.index(1)
    assert torch.equal(manager.modules["layers.0.o_proj"].lora_b_stacked[0][slot, 0], b)
    manager.remove_adapter(1)
    assert images.in_memory(1) is None


def test_a_release_with_other_slots_is_left_alone() -> None:
    from workers.engine.vllm_slot_images import slot_images

    assert slot_images(object(), torch.device("cpu")) is None
