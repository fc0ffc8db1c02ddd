"""A slot filled by its image is, bit for bit, what vLLM itself makes of it."""

from typing import Any

import pytest

from tests.support.lora_slots import SLOTS, adapter, manager_of

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.vllm]

_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

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
    several = [adapter(number, **_ADAPTERS[0]) for number in range(1, SLOTS + 2)]
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
    for number in range(1, SLOTS + 2):
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
