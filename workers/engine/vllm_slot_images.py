"""An adapter's slot made up ahead, so that a load copies it whole.

vLLM fills a slot module by module: it scales B on the host, clears the slot and copies each piece,
some two thousand small calls for a model of 32 layers, all between two steps. Here the reader's
thread does that into an image of one slot, which lies on the device in one piece; what is left for
the load is one call that copies all of it. The image is made by vLLM's own `set_lora`, on modules
that differ from the model's only in where their slots lie, so that whatever it slices or pads is as
it would be. Layers that are not linear (embeddings, experts) are left to vLLM.

Import it only in vLLM's worker process.
"""

import copy
import math
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

#: Bytes of a GPU's memory that images leave free, beyond what vLLM has taken for itself.
_LEFT_FREE: Final = 1 << 30

#: Of one slot, what belongs to each stacked tensor, on the device.
Image = list[torch.Tensor]

#: What is used of vLLM's `LoRAModelManager`.
_USED: Final = (
    "modules",
    "lora_index_to_id",
    "activate_adapter",
    "get_adapter",
    "list_adapters",
    "_create_merged_loras_inplace",
    "_get_lora_layer_weights",
)


def slot_images(manager: Any, device: torch.device) -> "SlotImages | None":
    """Images for the slots of a rank's `LoRAModelManager`, which takes them from then on; None
    where a release of vLLM has its slots otherwise."""
    if not all(hasattr(manager, name) for name in _USED):
        return None
    images = SlotImages(manager, device)
    return images if images.possible else None


class SlotImages:
    """Makes images in the reader's thread (`make`), and places them between two steps."""

    def __init__(self, manager: Any, device: torch.device) -> None:
        self._manager = manager
        self._device = device
        modules: dict[str, Any] = manager.modules
        linear = {
            name: module
            for name, module in modules.items()
            if isinstance(module, BaseLinearLayerWithLoRA)
        }
        self._others = {name: module for name, module in modules.items() if name not in linear}
        self._stacked = [tensor for module in linear.values() for tensor in _stacked(module)]
        self._sizes = [math.prod(tensor.shape[1:]) for tensor in self._stacked]
        # a module of two names takes its slot from the last of them: vLLM's order is left to it
        once = len(set(map(id, linear.values()))) == len(linear)
        self.possible = once and len({tensor.dtype for tensor in self._stacked}) == 1
        if self.possible:
            self._prepare(linear)

    def _prepare(self, linear: dict[str, Any]) -> None:
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None
        #: one slot on the host, for the reader's thread to write
        self.draft = torch.zeros(sum(self._sizes), dtype=self._stacked[0].dtype, pin_memory=on_gpu)
        pieces = iter(self._pieces(self.draft))
        self._drafted = {name: _elsewhere(module, pieces) for name, module in linear.items()}
        #: what came into vLLM's memory since, as long as it is there
        self._kept: WeakValueDictionary[int, Any] = WeakValueDictionary()
        manager = self._manager
        self._merge = manager._create_merged_loras_inplace  # noqa: SLF001 - vLLM has no other place
        self._activate = manager.activate_adapter
        manager._create_merged_loras_inplace = self._added  # noqa: SLF001
        manager.activate_adapter = self._place

    def _pieces(self, image: torch.Tensor) -> Image:
        """Of an image, what belongs to each stacked tensor, as that has it for all slots."""
        pieces = image.split(self._sizes)
        return [
            piece.view(1, *tensor.shape[1:])
            for piece, tensor in zip(pieces, self._stacked, strict=True)
        ]

    def in_slot(self, lora_id: int) -> bool:
        """Whether an adapter has a slot."""
        return lora_id in self._manager.lora_index_to_id

    def in_memory(self, lora_id: int) -> Any:
        """An adapter in vLLM's memory, in a slot or not, as a `LoRAModel`; None for others, and for
        those that came before this. Unlike vLLM's own `get_adapter` this is no use of it: which
        one vLLM evicts next stays as it is."""
        return self._kept.get(lora_id) if lora_id in self._manager.list_adapters() else None

    def make(self, lora: Any) -> Image | None:
        """Make a `LoRAModel`'s image where there is room for one. It is merged, as a load does it,
        unless it was read into a slot at once (`lorry_slot`, in vllm_file_layouts.py).

        Raises:
            Exception: what vLLM raises for an adapter that does not fit the model.
        """
        if hasattr(lora, "lorry_slot"):
            lora.lorry_slot(self.draft)
            return self.sent()
        self._merge_once(lora)
        self.draft.zero_()
        for name, module in self._drafted.items():
            weights = self._manager._get_lora_layer_weights(lora, name)  # noqa: SLF001
            if weights:
                module.set_lora(0, weights.lora_a, weights.lora_b)
        return self.sent()

    def beyond(self, lora: Any) -> bool:
        """Whether an adapter adapts modules that no image has."""
        return any(self._manager._get_lora_layer_weights(lora, name) for name in self._others)  # noqa: SLF001

    def sent(self) -> Image | None:
        """The pieces of what is drafted, on the device."""
        if self._stream is None:
            return self._pieces(self.draft.clone())
        free, _ = torch.cuda.mem_get_info(self._device)
        if free < _LEFT_FREE + self.draft.nbytes:
            return None
        with torch.cuda.stream(self._stream):
            image = self.draft.to(self._device, non_blocking=True)
        self._stream.synchronize()  # the next draft may be written, and this one placed
        return self._pieces(image)

    def _added(self, lora: Any) -> None:
        """In place of vLLM's `_create_merged_loras_inplace`, which it calls for an adapter that
        comes into its memory."""
        self._merge_once(lora)
        self._kept[lora.id] = lora

    def _merge_once(self, lora: Any) -> None:
        if not hasattr(lora, "lorry_image"):
            self._merge(lora)
            lora.lorry_image = None

    def _place(self, lora_id: int) -> bool:
        """In place of vLLM's `activate_adapter`, which fills what is not linear."""
        lora = self._manager.get_adapter(lora_id)
        image: Image | None = getattr(lora, "lorry_image", None)
        if image is None and hasattr(lora, "lorry_slot"):
            lora.lorry_slot(slot := torch.empty_like(self.draft))
            image = self._pieces(slot)
        if image is None:
            return bool(self._activate(lora_id))
        modules, self._manager.modules = self._manager.modules, self._others
        try:
            activated = bool(self._activate(lora_id))
        finally:
            self._manager.modules = modules
        if activated:
            index = self._manager.lora_index_to_id.index(lora_id)
            torch._foreach_copy_([tensor[index : index + 1] for tensor in self._stacked], image)
            if image[0].is_cuda:  # its memory is another stream's
                image[0].record_stream(torch.cuda.current_stream(self._device))
        lora.lorry_image = None  # its memory is worth more than another load of the same
        return activated


def _stacked(module: Any) -> tuple[torch.Tensor, ...]:
    """Where a module keeps its slots: a tensor of A and one of B for each slice."""
    return (*module.lora_a_stacked, *module.lora_b_stacked)


def _elsewhere(module: Any, pieces: Any) -> Any:
    """The same module with one slot, in the next of these pieces."""
    twin = copy.copy(module)
    twin.lora_a_stacked = tuple(next(pieces) for _ in module.lora_a_stacked)
    twin.lora_b_stacked = tuple(next(pieces) for _ in module.lora_b_stacked)
    twin.reset_lora = _cleared
    return twin


def _cleared(_index: int) -> None:
    """In place of a module's `reset_lora`: the draft is cleared at once, not piece by piece."""
