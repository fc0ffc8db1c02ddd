"""Lines of a batch's file: split the same however the bytes come, read without a surprise."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.batch_lines import BadLine, GoodLine, LineReader, RawLine, split_lines

URL = "/v1/chat/completions"
GOOD: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": URL,
    "body": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
}


def read(content: bytes) -> GoodLine | BadLine:
    return LineReader(URL, 10_000_000).read(RawLine(1, len(content), content))


@given(
    content=st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"\xef\xbb\xbf", b" ", b"\xff"])),
    cuts=st.lists(st.integers(0, 40)),
    longest=st.integers(1, 12),
)
def test_lines_do_not_depend_on_how_the_bytes_come(
    content: list[bytes], cuts: list[int], longest: int
) -> None:
    whole = b"".join(content)
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[a:b] for a, b in itertools.pairwise(places)]
    found = list(split_lines(pieces, longest))
    assert found == list(split_lines([whole], longest))
    # counted as an editor counts them
    raw = whole.split(b"\n")
    for number, size, kept in found:
        assert size == len(raw[number - 1])
        assert (kept is None) == (size > longest)


def test_a_byte_order_mark_belongs_to_the_first_line_alone() -> None:
    found = list(split_lines([b"\xef\xbb\xbfa\n\xef\xbb\xbfb"], 100))
    assert [line.content for line in found] == [b"a", b"\xef\xbb\xbfb"]


@pytest.mark.parametrize(
    "nasty",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"custom_id": ' + b"9" * 100_000 + b"}",
        b'{"custom_id": 1e999999}',
        b'{"custom_id": NaN}',
        b'{"custom_id": "\\ud800", "method": "POST"}',
        b'{"custom_id": "a\\u0000"}',
        b'{"\\ud800": 1}',
        b'"text"',
        b"null",
        b"\x00",
        b"{}",
        b'{"custom_id": "a", "custom_id": "b"}',
        json.dumps({**GOOD, "body": {"model": "m", "messages": [[[[]]]] * 5000}}).encode(),
        json.dumps({**GOOD, "body": {**GOOD["body"], "seed": 10**400}}).encode(),
        json.dumps({**GOOD, "body": {f"k{n}": n for n in range(5000)}}).encode(),
        json.dumps({**GOOD, **{f"k{n}": n for n in range(5000)}}).encode(),
        json.dumps({**GOOD, "url": {"a": ["b"] * 1000}}).encode(),
        json.dumps({**GOOD, "method": ["POST"]}).encode(),
    ],
    ids=range(19),
)
def test_a_nasty_line_is_bad_and_told_briefly(nasty: bytes) -> None:
    bad = read(nasty)
    assert isinstance(bad, BadLine), bad
    assert bad.message
    assert len(bad.message) <= 1000
    bad.message.encode()  # whatever it quotes can be stored
    json.dumps(bad.as_error()).encode()


@given(
    st.binary(max_size=60) | st.text().map(lambda text: json.dumps({"custom_id": text}).encode())
)
def test_no_bytes_break_the_reader(content: bytes) -> None:
    assert isinstance(read(content), BadLine)


def test_a_good_line_is_good() -> None:
    found = read(json.dumps(GOOD).encode())
    assert isinstance(found, GoodLine)
    assert found.custom_id == "a"
