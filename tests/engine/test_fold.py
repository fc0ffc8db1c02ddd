"""Folding on the real engine: the same answers in both modes, whatever is folded when.

vLLM packs a CPU's base weights away, so these engines run with packing off (unpacked_cpu.py), in
float32. Greedy answers are compared token for token.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import cli.demo
from core.generation import Aborted, Completion
from tests.engine.conftest import write_adapter
from tests.engine.contract import Answers, FoldContract, ask, chat, complete, request
from tests.engine.test_demo_adapters import FOLDER, NAMES
from tests.support.good_adapters import GOOD
from tests.support.scale import Scale
from workers.engine.protocol import EngineDead, FoldRefused, LocalAdapter
from workers.engine.vllm_engine import VllmEngine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

_UNPACKED = ("--worker-extension-cls", "tests.support.unpacked_cpu.UnpackedFold")
#: Few blocks of few tokens, so that parked requests and running ones compete for the KV cache.
_FLAGS = ("--max-model-len", "512", "--max-num-seqs", "12", "--num-gpu-blocks-override", "48")
_MORE = ("Name three fruits.", "Who are you?", "Tell me about the sea.", "What comes after Monday?")


@pytest_asyncio.fixture(
    scope="module", params=["--async-scheduling", "--no-async-scheduling"], ids=["async", "sync"]
)
async def engine(base_model: Path, request: pytest.FixtureRequest) -> AsyncIterator[VllmEngine]:
    if request.param.startswith("--no") and not request.config.getoption("--full"):
        pytest.skip("a GPU schedules asynchronously; the other way with --full")
    flags = [*_UNPACKED, *_FLAGS, request.param]
    engine = VllmEngine.from_flags(str(base_model), flags, fold=True)
    await engine.start()
    yield engine
    await engine.close()


@pytest_asyncio.fixture
async def four(engine: VllmEngine, tmp_path: Path) -> list[LocalAdapter]:
    """The demo's three adapters and a random one, resident."""
    adapters = [
        LocalAdapter(700 + number, f"{700 + number}-{name}", str(FOLDER / name), name)
        for number, name in enumerate(NAMES)
    ]
    adapters.append(write_adapter(tmp_path / "random", 710))
    for adapter in adapters:
        await engine.load_adapter(adapter)
    return adapters


class TestVllmFold(FoldContract):
    @pytest.fixture
    def folding(self, engine: VllmEngine) -> VllmEngine:
        return engine


def _prompts(count: int) -> list[str]:
    data = Path(cli.demo.__file__).parent / "data"
    lines = [(data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in NAMES]
    learnt = [json.loads(line)["prompt"] for row in zip(*lines, strict=False) for line in row]
    return [*_MORE, *learnt][:count]


def _bodies(count: int, tokens: int = 24) -> list[dict[str, Any]]:
    """Greedy ones, some with logprobs, some in JSON; and two choices by a seed."""
    extras: list[dict[str, Any]] = [
        {},
        {"logprobs": True, "top_logprobs": 2},
        {"repetition_penalty": 1.2},
        {"response_format": {"type": "json_object"}},
        {"n": 2, "temperature": 0.7, "seed": 3},
    ]
    return [
        chat(text, **{"temperature": 0, "max_tokens": tokens, **extras[place % len(extras)]})
        for place, text in enumerate(_prompts(count))
    ]


def _texts(outcome: Any) -> list[str]:
    assert isinstance(outcome, Completion), outcome
    return [choice.text for choice in outcome.choices]


async def _answers(
    engine: VllmEngine, bodies: Sequence[Mapping[str, Any]], adapter: LocalAdapter | None
) -> list[list[str]]:
    outcomes = await ask(engine, [request(body, adapter=adapter) for body in bodies])
    return [_texts(outcome) for outcome in outcomes]


async def test_a_folded_adapter_answers_as_it_does_as_lora(
    engine: VllmEngine, four: list[LocalAdapter], scale: Scale
) -> None:
    assert engine.info.fold_refusal is None
    bodies = _bodies(scale(5, 100))
    plain = await _answers(engine, bodies[:4], None)
    for adapter in four[scale(2, 0) :]:
        as_lora = await _answers(engine, bodies, adapter)
        await engine.fold(adapter.lora_int_id)
        assert await _answers(engine, bodies, adapter) == as_lora
        await engine.fold(None)
        assert as_lora[:4] != plain
    assert await _answers(engine, bodies[:4], None) == plain


async def test_folds_at_random_moments_change_no_answer(
    engine: VllmEngine, four: list[LocalAdapter], scale: Scale
) -> None:
    """Four adapters and the base at once, more than compute at once and than the KV cache holds."""
    bodies = _bodies(scale(4, 40), tokens=scale(20, 40))
    who: list[LocalAdapter | None] = [None, *four]
    alone = {a.lora_int_id if a else 0: await _answers(engine, bodies, a) for a in who}
    digest = await engine.fold_digest()
    random.seed(scale(5, 6))
    pairs = [(adapter, place) for adapter in who for place in range(len(bodies))]
    random.shuffle(pairs)
    asked = asyncio.create_task(
        ask(engine, [request(bodies[place], adapter=adapter) for adapter, place in pairs])
    )
    folds = 0
    while not asked.done():
        await asyncio.sleep(random.uniform(0, 0.4))
        await engine.fold(random.choice([None, *(a.lora_int_id for a in four)]))
        folds += 1
        # whoever is never folded would wait for ever: the base has its turn
        if random.random() < 0.3:
            await engine.fold(None)
            await asyncio.sleep(random.uniform(0, 1.0))
    await engine.fold(None)
    for (adapter, place), outcome in zip(pairs, await asked, strict=True):
        assert _texts(outcome) == alone[adapter.lora_int_id if adapter else 0][place]
    assert folds > scale(5, 10)
    assert await engine.fold_digest() == digest


async def test_a_seed_means_the_same_in_both_modes_and_across_them(
    engine: VllmEngine, four: list[LocalAdapter]
) -> None:
    adapter, other = four[0], four[1]
    body = chat("Tell me a story", seed=11, temperature=0.9, max_tokens=60, ignore_eos=True)
    as_lora = await _answers(engine, [body], adapter)
    await engine.fold(adapter.lora_int_id)
    assert await _answers(engine, [body], adapter) == as_lora
    await engine.fold(None)
    asked = asyncio.create_task(_answers(engine, [body], adapter))
    for _ in range(4):  # parked half-way, and gone on
        await asyncio.sleep(0.3)
        await engine.fold(other.lora_int_id)
        await asyncio.sleep(0.2)
        await engine.fold(None)
    assert await asked == as_lora


async def test_the_base_is_restored_bit_for_bit(
    engine: VllmEngine, four: list[LocalAdapter], scale: Scale
) -> None:
    digest = await engine.fold_digest()
    for cycle in range(scale(8, 1000)):
        times = await engine.fold(four[cycle % 4].lora_int_id)
        assert times.fold > 0
        if cycle % 3 == 0:  # else straight to the next one
            await engine.fold(None)
    await engine.fold(four[0].lora_int_id)
    assert await engine.fold_digest() != digest
    await engine.fold(None)
    assert await engine.fold_digest() == digest


async def test_an_adapter_that_cannot_be_folded_is_refused_and_works_as_lora(
    engine: VllmEngine, tmp_path: Path
) -> None:
    from db.adapter_package import PackageLimits, unpack

    package = unpack(GOOD["lm_head"](tmp_path / "in"), tmp_path / "out", PackageLimits())
    adapter = LocalAdapter(730, "730-lm", str(package.folder), "lm")
    await engine.load_adapter(adapter)
    with pytest.raises(FoldRefused, match="adapts"):
        await engine.fold(730)
    await complete(engine, {"prompt": "still here", "max_tokens": 2}, adapter)
    await engine.remove_adapter(730)


async def test_a_cpu_with_packed_weights_does_not_fold(base_model: Path, scale: Scale) -> None:
    if not scale.full:
        pytest.skip("an engine of its own: with --full")
    own = ("--worker-extension-cls", "workers.engine.vllm_fold_worker.FoldExtension")
    engine = VllmEngine.from_flags(str(base_model), ["--max-model-len", "256", *own], fold=True)
    try:
        await engine.start()
        assert "packed" in (engine.info.fold_refusal or "")
        with pytest.raises(FoldRefused, match="packed"):
            await engine.fold(1)
        await complete(engine, {"prompt": "still here", "max_tokens": 2})
    finally:
        await engine.close()


@pytest.mark.parametrize("number", [991, 992], ids=["half-way", "wrong step"])
async def test_a_fold_that_goes_wrong_ends_the_engine_and_answers_nothing(
    base_model: Path, tmp_path: Path, number: int, scale: Scale
) -> None:
    """Adapter 991 fails half-way through; 992 leaves the guard alone between step and answer."""
    if number == 992 and not scale.full:
        pytest.skip("an engine of its own: with --full")
    flags = ["--worker-extension-cls", "tests.support.unpacked_cpu.FailingFold", *_FLAGS]
    engine = VllmEngine.from_flags(str(base_model), flags, fold=True)
    try:
        await engine.start()
        bad, good = write_adapter(tmp_path / "bad", number), write_adapter(tmp_path / "good", 5)
        for adapter in (bad, good):
            await engine.load_adapter(adapter)
        answers = Answers()
        body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True}
        sent = [request(body, adapter=adapter) for adapter in (bad, good, None)]
        engine.submit(sent, answers.done)
        if number == 991:
            with pytest.raises(EngineDead, match="half-way"):
                await engine.fold(number)
        else:
            await engine.fold(number)
        await asyncio.wait_for(engine.wait_dead(), 60)
        await answers.wait(3, seconds=30)
        assert all(isinstance(outcome, Aborted) for outcome in answers.outcomes.values())
    finally:
        await engine.close()
