"""Values are judged by their bits, and read a few megabytes at a time."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from db.safetensors_file import look_at_values, read_header
from tests.support.adapters import raw_safetensors

_INFINITE = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


@pytest.mark.parametrize("dtype", _INFINITE)
def test_the_largest_number_is_finite_and_the_next_bits_are_not(dtype: str, tmp_path: Path) -> None:
    infinity = _INFINITE[dtype]
    width = 4 if dtype == "F32" else 2
    sign = 1 << (8 * width - 1)
    bits = {
        "largest": infinity - 1,
        "lowest": sign | (infinity - 1),
        "infinity": infinity,
        "minus infinity": sign | infinity,
        "no number": infinity + 1,
        "zero": 0,
        "minus zero": sign,
    }
    header = {
        name: {"dtype": dtype, "shape": [1], "data_offsets": [n * width, (n + 1) * width]}
        for n, name in enumerate(bits)
    }
    data = b"".join(value.to_bytes(width, "little") for value in bits.values())
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors(header, data))
    infinite, zero = look_at_values(path, read_header(path))
    assert set(infinite) == {"infinity", "minus infinity", "no number"}
    assert zero == {"zero", "minus zero"}


def test_one_bad_value_is_found_wherever_it_lies(tmp_path: Path) -> None:
    large = np.ones(3 * 1024 * 1024 + 5, np.float32)
    for at in (0, 1024 * 1024 - 1, 1024 * 1024, len(large) - 1):
        spoilt = large.copy()
        spoilt[at] = np.nan
        save_file({"good": large[:9], "bad": spoilt}, tmp_path / "x.safetensors")
        places = read_header(tmp_path / "x.safetensors")
        assert look_at_values(tmp_path / "x.safetensors", places) == (["bad"], set())
