"""Where vLLM puts what an adapter's file holds, learned once for all files of a kind.

Read vLLM's way, an adapter is some thousands of small calls, each of which takes the interpreter
from the steps that compute meanwhile. Adapters of one recipe have the same tensors in the same
places of their files, so the first of them is read vLLM's way, and watched: which piece of the file
came to which place of the slot. For the next ones that is one read of the whole file, one call that
copies its pieces, and one that scales B, and none of those holds the interpreter. A kind whose
first file does not come out of this bit for bit is read vLLM's way always.

Import it only in vLLM's worker process.
"""

import copy
import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import torch
from vllm.lora.utils import parse_fine_tuned_lora_name

from workers.engine.vllm_slot_images import Image, SlotImages
from workers.engine.vllm_slot_layout import CopiesInto, Origin, Piece, SlotLayout, pieces_of

#: Kinds that are remembered.
_KINDS: Final = 64
#: What a configuration says of where an adapter comes from, and nothing of what it is.
_ORIGIN: Final = frozenset({"auto_mapping", "base_model_name_or_path", "peft_version", "revision"})
#: Lists that PEFT writes in the order of a set.
_SETS: Final = ("target_modules", "modules_to_save")
#: Types that adapters come in, as safetensors names them.
_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: The longest header that safetensors takes.
_LONGEST_HEADER: Final = 100_000_000


class _Kind(NamedTuple):
    """What files must have in common: the configuration; the header, which gives every tensor's
    name, type, shape and place; and how many bytes are behind it."""

    configuration: str
    header: bytes
    size: int


class FileLayouts:
    """Reads adapters, in the reader's thread.

    Args:
        manager: a rank's `LoRAModelManager`.
        read: vLLM's own way from a `LoRARequest` to a `LoRAModel`.
        images: what makes them ready.
    """

    def __init__(self, manager: Any, read: Callable[[Any], Any], images: SlotImages) -> None:
        self._manager = manager
        self._read = read
        self._images = images
        #: None for a kind that is read vLLM's way
        self._layouts: dict[_Kind, SlotLayout | None] = {}
        #: the last file's bytes behind its header, and room for more
        self._content = torch.empty(0, dtype=torch.uint8)

    def read(self, request: Any) -> tuple[Any, Image | None]:
        """An adapter as a `LoRAModel`, and its image where there is room for one.

        Raises:
            Exception: what vLLM raises for an adapter that cannot be read.
        """
        kind = self._fetched(Path(request.lora_path))
        if kind is not None and (layout := self._layouts.get(kind)) is not None:
            return self._by_layout(layout, request.lora_int_id)
        lora = self._read(request)
        if kind is None or kind in self._layouts:
            return lora, self._images.make(lora)
        return lora, self._learned(kind, lora)

    def _fetched(self, folder: Path) -> _Kind | None:
        """An adapter's kind, its bytes in `_content`; None for files that vLLM may know better."""
        try:
            with (folder / "adapter_model.safetensors").open("rb", buffering=0) as file:
                (length,) = struct.unpack("<Q", _filled(file, memoryview(bytearray(8))))
                if length > _LONGEST_HEADER:
                    return None
                header = bytes(_filled(file, memoryview(bytearray(length))))
                size = os.fstat(file.fileno()).st_size - file.tell()
                kind = _Kind(_configuration(folder), header, size)
                if kind not in self._layouts or self._layouts[kind] is not None:
                    _filled(file, memoryview(self._room(size).numpy())[:size])
                return kind
        except (OSError, ValueError):
            return None

    def _room(self, size: int) -> torch.Tensor:
        if self._content.numel() < size:
            for layout in filter(None, self._layouts.values()):
                layout.forget()
            self._content = torch.empty(-(-size // 8) * 8, dtype=torch.uint8)  # of any type
        return self._content

    def _by_layout(self, layout: SlotLayout, version: int) -> tuple[Any, Image | None]:
        self._images.draft.zero_()
        layout.write(self._content)
        return layout.lora(version), self._images.sent()

    def _learned(self, kind: _Kind, lora: Any) -> Image | None:
        """Make an image vLLM's way, and remember what came where."""
        origins = self._origins(kind.header, lora)
        with CopiesInto(self._images.draft) as watch:
            image = self._images.make(lora)
        if len(self._layouts) >= _KINDS:
            del self._layouts[next(iter(self._layouts))]
        pieces = pieces_of(origins, watch.copies)
        whole = len(pieces) == len(watch.copies)  # if not, some of it was made up on the way
        self._layouts[kind] = self._proven(lora, pieces) if whole else None
        return image

    def _origins(self, header: bytes, lora: Any) -> list[Origin]:
        """The tensors of a `LoRAModel` that has not been merged, by address; none where a release
        of vLLM has them otherwise."""
        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        mapper = getattr(mapper, "get_rename_mapper", lambda: mapper)()
        origins = []
        try:
            for name, facts in json.loads(header).items():
                if name == "__metadata__":
                    continue
                module, is_a = parse_fine_tuned_lora_name(name, mapper)
                if (weights := lora.loras.get(module)) is None:  # vLLM has left it out
                    continue
                tensor = weights.lora_a if is_a else weights.lora_b
                dtype = _DTYPES[facts["dtype"]]
                origins.append(
                    Origin(
                        tensor.data_ptr(),
                        tensor.nbytes,
                        tensor.element_size(),
                        dtype,
                        facts["data_offsets"][0] // dtype.itemsize,
                        1.0 if is_a else float(weights.scaling),
                    )
                )
        except (AttributeError, KeyError, TypeError, ValueError):
            return []
        return sorted(origins, key=lambda origin: origin.address)

    def _proven(self, lora: Any, pieces: Sequence[Piece]) -> SlotLayout | None:
        """A layout, if it writes what vLLM has written to the draft, and all that it has read."""
        if self._images.beyond(lora) or getattr(lora, "modules_to_save", None):
            return None
        draft = self._images.draft
        layout, expected = SlotLayout(_without_tensors(lora), pieces, draft), draft.clone()
        draft.zero_()
        try:
            layout.write(self._content)
        except RuntimeError:  # a piece that is not in the file
            return None
        return layout if torch.equal(draft, expected) else None


def _without_tensors(lora: Any) -> Any:
    """A merged `LoRAModel` that says which modules it adapts, and holds nothing."""
    bare = copy.copy(lora)
    bare.loras = dict.fromkeys(lora.loras)
    return bare


def _configuration(folder: Path) -> str:
    """A configuration without what may differ within a kind.

    Raises:
        ValueError: it is none.
    """
    configuration = json.loads((folder / "adapter_config.json").read_bytes())
    if not isinstance(configuration, dict):
        raise ValueError("the configuration is no object")
    known = {name: value for name, value in configuration.items() if name not in _ORIGIN}
    for name in _SETS:
        if isinstance(known.get(name), list):
            known[name] = sorted(map(str, known[name]))
    return json.dumps(known, sort_keys=True)


def _filled(file: BinaryIO, room: memoryview) -> memoryview:
    """A buffer, filled from a file.

    Raises:
        ValueError: the file ends before.
    """
    left = room
    while left:
        if not (read := file.readinto(left)):  # type: ignore[attr-defined]
            raise ValueError("the file ends before its content does")
        left = left[read:]
    return room
