"""An adapter whose kind is known is read in a few calls, and its slot is bit for bit vLLM's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.lora_slots import RANK, SLOTS, manager_of, reading, write_adapter_file

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.vllm]


class Reader:
    """Adapters read by their files' layouts, and the same by vLLM alone."""

    def __init__(self) -> None:
        from workers.engine.vllm_file_layouts import FileLayouts
        from workers.engine.vllm_slot_images import slot_images

        self.own, self.manager = manager_of("cpu"), manager_of("cpu")
        self._own_read = reading(self.own)
        read = reading(self.manager)
        #: ids of those that were read vLLM's way
        self.slow: list[int] = []

        def watched(request: Any) -> Any:
            self.slow.append(request.lora_int_id)
            return read(request)

        images = slot_images(self.manager, torch.device("cpu"))
        assert images is not None
        self.layouts = FileLayouts(self.manager, watched, images)

    def load(self, version: int, folder: Path) -> None:
        """Into a slot, both ways; the slots must be the same."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(f"a{version}", version, str(folder))
        self.own.add_adapter(self._own_read(request))
        lora, image = self.layouts.read(request)
        lora.lorry_image = image
        self.manager.add_adapter(lora)
        self.activate(version)

    def activate(self, version: int) -> None:
        for manager in (self.own, self.manager):
            manager.activate_adapter(version)
        assert self.manager.lora_index_to_id == self.own.lora_index_to_id
        slot = self.own.lora_index_to_id.index(version)
        for name, module in self.own.modules.items():
            for stacked in ("lora_a_stacked", "lora_b_stacked"):
                ours = getattr(self.manager.modules[name], stacked)
                for expected, found in zip(getattr(module, stacked), ours, strict=True):
                    assert torch.equal(found[slot], expected[slot]), (version, name, stacked)


_KINDS: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16"},
    {"dtype": "float16", "lora_alpha": RANK},
    {"rank": 4},
    {"rank": 2, "parts": ("v_proj", "down_proj")},
    {"parts": ("up_proj",), "use_rslora": True},
    {"alpha_pattern": {"q_proj": 7, r"layers.1.o_proj": 5}},
]


@pytest.mark.parametrize("kind", _KINDS, ids=str)
def test_the_first_of_a_kind_shows_how_the_next_are_read(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    reader = Reader()
    for version in (1, 2, 3):
        reader.load(version, write_adapter_file(tmp_path / str(version), version, **kind))
    assert reader.slow == [1]


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    """Rank, type, modules and scale: what one kind's slot holds is gone when another's is drafted,
    and no file is read by the layout of one that only looks alike."""
    reader = Reader()
    for version, kind in enumerate(_KINDS * 2, start=1):
        reader.load(version, write_adapter_file(tmp_path / str(version), version, **kind))
        reader.own.remove_adapter(version)
        reader.manager.remove_adapter(version)
    assert reader.slow == list(range(1, 1 + len(_KINDS)))
    looks_alike = write_adapter_file(tmp_path / "alike", 50, lora_alpha=5)
    reader.load(50, looks_alike)
    assert reader.slow[-1] == 50


def test_where_an_adapter_comes_from_makes_no_kind(tmp_path: Path) -> None:
    reader = Reader()
    first = write_adapter_file(tmp_path / "1", 1, base_model_name_or_path="here")
    second = write_adapter_file(tmp_path / "2", 2, base_model_name_or_path="there")
    config = second / "adapter_config.json"
    config.write_text(  # PEFT writes a set
        config.read_text().replace('"q_proj", "k_proj"', '"k_proj", "q_proj"')
    )
    reader.load(1, first)
    reader.load(2, second)
    assert reader.slow == [1]


def test_what_vllm_keeps_in_memory_comes_back(tmp_path: Path) -> None:
    """Whether it got another image meanwhile or not."""
    reader = Reader()
    for version in range(1, SLOTS + 4):
        reader.load(version, write_adapter_file(tmp_path / str(version), version))
    assert reader.slow == [1]
    assert not {1, 2, 3} & set(reader.manager.lora_index_to_id)
    for folder in tmp_path.iterdir():
        (folder / "adapter_model.safetensors").unlink()
    images = reader.layouts._images
    kept = images.in_memory(2)
    kept.lorry_image = images.make(kept)
    for version in (2, 3, 1):
        reader.activate(version)


def cut_off(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-7])


def write_nonsense(weights: Path) -> None:
    weights.write_bytes(b"not weights")


def break_configuration(weights: Path) -> None:
    weights.with_name("adapter_config.json").write_text("{")


@pytest.mark.parametrize("spoil", [cut_off, write_nonsense, break_configuration, Path.unlink])
def test_a_broken_file_fails_as_vllm_fails(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    reader = Reader()
    reader.load(1, write_adapter_file(tmp_path / "1", 1))
    broken = write_adapter_file(tmp_path / "2", 2)
    spoil(broken / "adapter_model.safetensors")
    request = LoRARequest("a2", 2, str(broken))
    with pytest.raises(Exception) as expected:
        reading(manager_of("cpu"))(request)
    with pytest.raises(type(expected.value)):
        reader.layouts.read(request)
    reader.load(3, write_adapter_file(tmp_path / "3", 3))
    assert reader.slow == [1, 2]


def test_what_is_more_than_copied_and_scaled_is_left_to_vllm(tmp_path: Path) -> None:
    """As another release may do it, and where the first of a kind does not show it: twice nothing
    is nothing."""
    reader = Reader()
    for owner, name in (
        (reader.own, "_create_merged_loras_inplace"),
        (reader.layouts._images, "_merge"),
    ):
        setattr(owner, name, doubled_before(getattr(owner, name)))
    for version in (1, 2, 3):
        folder = tmp_path / str(version)
        reader.load(version, write_adapter_file(folder, version, trained=version > 1))
    assert reader.slow == [1, 2, 3]


def doubled_before(merge: Callable[[Any], None]) -> Callable[[Any], None]:
    def other(lora: Any) -> None:
        for weights in lora.loras.values():
            weights.lora_b = weights.lora_b * 2
        merge(lora)

    return other
