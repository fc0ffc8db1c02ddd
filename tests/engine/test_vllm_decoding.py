"""Decoding once at the end gives, character by character, what vLLM's decoder gives."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from workers.engine.vllm_outputs import _decode_stepwise, decode


@pytest.fixture(scope="module")
def byte_level(base_model: Path) -> Tokenizer:
    """The demo model's tokenizer: characters may be cut anywhere between tokens."""
    return Tokenizer.from_file(str(base_model / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """One like Llama 2's: a space before each word, bytes for what is not in the vocabulary."""
    words = ["▁Hello", "▁world", "▁", "ing", ",", "▁é", "\ufffd"]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_random_tokens_decode_alike(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    size = tokenizer.get_vocab_size()
    draw = random.Random(1)
    odd = [token for token in range(size) if "\ufffd" in tokenizer.decode([token])]
    for _ in range(2000):
        pool = odd if draw.random() < 0.3 else range(size)
        prompt = [draw.choice(pool) for _ in range(draw.randrange(1, 14))]
        answer = [draw.choice(pool) for _ in range(draw.randrange(0, 20))]
        expected = _decode_stepwise(tokenizer, prompt, answer)
        assert decode(tokenizer, prompt, answer) == expected, (prompt, answer)


def test_a_cut_character_is_dropped(byte_level: Tokenizer) -> None:
    prompt = byte_level.encode("Smile:").ids
    whole = byte_level.encode(" yes 🙂").ids
    assert decode(byte_level, prompt, whole) == " yes 🙂"
    assert decode(byte_level, prompt, whole[:-1]).strip() == "yes"


def test_the_space_before_the_first_word_stays(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.get_vocab()
    assert decode(byte_fallback, [ids["▁Hello"]], [ids["▁world"]]) == " world"
