"""Safetensors files read without any tensor library: what is in them, and whether it is finite.

The format: 8 bytes of header length (little endian), a JSON header with type, shape and offsets of
each tensor, then the bytes, in one piece and without holes.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from core.adapter_rules import TensorInfo

_MOST_HEADER_BYTES: Final = 16 * 1024 * 1024
_MOST_DIMENSIONS: Final = 8
_CHUNK_BYTES: Final = 4 * 1024 * 1024
_BYTES_EACH: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
#: The exponent's bits: all of them set are infinity or no number.
_EXPONENTS: Final[Mapping[str, tuple[Any, int]]] = {
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


class BadSafetensors(ValueError):
    """The file is not what the format says; the message tells where."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor and where its bytes lie in the file."""

    info: TensorInfo
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a file, by name.

    Raises:
        BadSafetensors: the header is no header, or does not fit the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
            raise BadSafetensors(f"its header says {length} bytes, in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BadSafetensors(f"its header is not JSON ({str(error)[:100]})") from None
    if not isinstance(header, dict):
        raise BadSafetensors("its header is not an object")
    header.pop("__metadata__", None)
    places = {name: _place(name, entry, 8 + length) for name, entry in header.items()}
    _check_whole(places, 8 + length, size)
    return places


def look_at_values(path: Path, places: Mapping[str, TensorPlace]) -> tuple[list[str], set[str]]:
    """The tensors that hold an infinity or no number, and those that are zero throughout.

    Reads every byte, a few megabytes at a time. Types other than F32, F16 and BF16 are passed over.
    """
    infinite, zero = [], set()
    with path.open("rb") as file:
        for name, place in places.items():
            if place.info.dtype not in _EXPONENTS:
                continue
            finite, nothing = True, True
            kind, exponent = _EXPONENTS[place.info.dtype]
            for chunk in _chunks(file, place):
                bits = np.frombuffer(chunk, kind) & (exponent | (exponent - 1))
                finite = finite and not bool(np.any((bits & exponent) == exponent))
                nothing = nothing and not bool(np.any(bits))
            if not finite:
                infinite.append(name)
            if nothing:
                zero.add(name)
    return infinite, zero


def _chunks(file: BinaryIO, place: TensorPlace) -> Iterator[bytes]:
    file.seek(place.start)
    left = place.end - place.start
    while left:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise BadSafetensors("it ends early")
        left -= len(chunk)
        yield chunk


def _place(name: str, entry: Any, data: int) -> TensorPlace:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        each = _BYTES_EACH[dtype]
    except (KeyError, TypeError, ValueError):
        raise BadSafetensors(
            f"{name[:200]}: its entry is incomplete or of an unknown type"
        ) from None
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    if len(numbers) > _MOST_DIMENSIONS + 2 or not all(_is_size(number) for number in numbers):
        raise BadSafetensors(f"{name[:200]}: its shape or offsets are no sizes")
    if end - start != math.prod(shape) * each:
        raise BadSafetensors(
            f"{name[:200]}: has {end - start} bytes, expected {math.prod(shape) * each}"
        )
    return TensorPlace(TensorInfo(dtype, tuple(shape)), data + start, data + end)


def _is_size(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63


def _check_whole(places: Mapping[str, TensorPlace], data: int, size: int) -> None:
    at = data
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != at:
            raise BadSafetensors(f"{name[:200]}: overlaps another tensor or leaves a hole")
        at = place.end
    if at != size:
        raise BadSafetensors(f"its tensors end at byte {at}, the file at {size}: it was cut off")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name stands twice")
    return fields
