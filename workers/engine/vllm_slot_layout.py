"""How a slot is written from what an adapter's file holds: which of its elements go where.

Import it only in vLLM's worker process.
"""

import copy
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor that vLLM has read, and where its elements are in the file.

    Args:
        address: of its first element in memory.
        scale: what it is multiplied with when it is merged.
    """

    address: int
    size: int
    item_size: int
    dtype: torch.dtype
    first: int
    scale: float


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of the file, as `torch.as_strided` takes them, and the place in the draft that they
    are copied to."""

    dtype: torch.dtype
    first: int
    size: Sequence[int]
    stride: Sequence[int]
    place: torch.Tensor
    scale: float

    def of(self, content: torch.Tensor) -> torch.Tensor:
        return content.view(self.dtype).as_strided(self.size, self.stride, self.first)


class SlotLayout:
    """How the draft is written from what a file holds behind its header.

    Args:
        lora: a `LoRAModel` of this kind, without its tensors.
        draft: one slot.
    """

    def __init__(self, lora: Any, pieces: Sequence[Piece], draft: torch.Tensor) -> None:
        self._lora = lora
        self._pieces = pieces
        self._draft = draft
        self._places = [piece.place for piece in pieces]
        scaled = [piece for piece in pieces if piece.scale != 1]
        self._scaled = [piece.place for piece in scaled]
        # tensors: as plain numbers they would be rounded to the type of what they scale
        self._scales = [torch.tensor(piece.scale, dtype=torch.float64) for piece in scaled]
        self._content: torch.Tensor | None = None
        self._sources: list[torch.Tensor] = []

    def write(self, content: torch.Tensor) -> None:
        """Write the draft, which has been cleared, from a file's bytes."""
        if content is not self._content:
            self._content, self._sources = content, [piece.of(content) for piece in self._pieces]
        torch._foreach_copy_(self._places, self._sources)
        if self._scaled:
            torch._foreach_mul_(self._scaled, self._scales)

    def forget(self) -> None:
        """Keep no file's bytes."""
        self._content, self._sources = None, []

    def lora(self, version: int) -> Any:
        """The adapter that was written last, for vLLM to keep. Its tensors are in its `lorry_slot`
        alone, which writes a whole slot, and takes no more memory than vLLM's would."""
        lora = copy.copy(self._lora)
        lora.id = version
        sizes = [place.numel() for place in self._places]
        kept = torch.empty(sum(sizes), dtype=self._draft.dtype).split(sizes)
        torch._foreach_copy_(self._shaped(kept), self._places)
        lora.lorry_slot = lambda slot: self._restore(kept, slot)
        return lora

    def _restore(self, kept: Sequence[torch.Tensor], slot: torch.Tensor) -> None:
        slot.zero_()
        places = [
            slot.as_strided(place.size(), place.stride(), place.storage_offset())
            for place in self._places
        ]
        torch._foreach_copy_(places, self._shaped(kept))

    def _shaped(self, kept: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [one.view(place.size()) for one, place in zip(kept, self._places, strict=True)]


class CopiesInto(TorchDispatchMode):  # type: ignore[misc]
    """Sees what is copied into a tensor by its own thread.

    Attributes:
        copies: views of the tensor, each with what was copied there.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._address = tensor.untyped_storage().data_ptr()
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is torch.ops.aten.copy_.default
            and args[0].untyped_storage().data_ptr() == self._address
        ):
            self.copies.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def pieces_of(
    origins: Sequence[Origin], copies: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[Piece]:
    """What was copied, as pieces of the file; without what came from elsewhere."""
    addresses = [origin.address for origin in origins]
    pieces = []
    for place, source in copies:
        origin = origins[bisect_right(addresses, source.data_ptr()) - 1] if origins else None
        if origin is None or not 0 <= source.data_ptr() - origin.address < origin.size:
            continue
        first = origin.first + (source.data_ptr() - origin.address) // origin.item_size
        size, stride = source.size(), source.stride()
        pieces.append(Piece(origin.dtype, first, size, stride, place, origin.scale))
    return pieces
