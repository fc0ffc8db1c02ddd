"""Adapters of every format on the real engine: good ones change answers, no bad one kills it."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from core.adapter_rules import BaseFacts, check
from db.adapter_package import PackageLimits, unpack
from tests.engine.contract import ask, chat, complete, request
from tests.support.adapters import SMOLLM, Draft
from tests.support.bad_adapters import BAD
from tests.support.good_adapters import GOOD
from tests.support.scale import Scale
from workers.engine.base_facts import base_facts
from workers.engine.protocol import AdapterLoadError, Engine, LocalAdapter
from workers.engine.selection import EngineName, build_engine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

_ASKED = chat("Name three fruits.", temperature=0, max_tokens=8)
_FLAGS = ["--max-model-len", "512", "--max-lora-rank", "64", "--max-loras", "4"]
#: vLLM would match this pattern for ages, which is why admission refuses it.
_NEVER_LOADED = "a pattern that takes for ever"


@pytest_asyncio.fixture(scope="module")
async def engine(base_model: Path) -> AsyncIterator[Engine]:
    """An engine with room for rank 64."""
    engine = build_engine(EngineName.VLLM, str(base_model), _FLAGS)
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
def facts(base_model: Path) -> BaseFacts:
    found = base_facts(str(base_model), base_model.name, 64)
    assert found is not None
    return found


def local(folder: Path, number: int) -> LocalAdapter:
    return LocalAdapter(number, f"{number}-{folder.name}", str(folder.absolute()), "x")


def test_the_facts_of_the_base_are_those_of_its_modules(base_model: Path, facts: BaseFacts) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_model))
    built = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    assert facts.modules == built
    assert facts == SMOLLM


@pytest.mark.parametrize(("number", "name"), list(enumerate(GOOD, start=1)), ids=list(GOOD))
async def test_a_good_adapter_loads_and_changes_the_answer(
    engine: Engine, facts: BaseFacts, tmp_path: Path, number: int, name: str, scale: Scale
) -> None:
    if number % 2 and not scale.full:
        pytest.skip("every other one by default")
    package = unpack(GOOD[name](tmp_path / "source"), tmp_path / "scratch", PackageLimits())
    assert check(package.config, package.tensors, facts) == []
    adapter = local(package.folder, number)
    await engine.load_adapter(adapter)
    changed, plain = await ask(engine, [request(_ASKED, adapter=adapter), request(_ASKED)])
    assert changed.choices[0].text != plain.choices[0].text  # type: ignore[union-attr]
    await engine.remove_adapter(number)


async def test_the_engine_lives_after_every_bad_adapter(engine: Engine, tmp_path: Path) -> None:
    """As if admission were not there: what vLLM refuses comes back, and nothing takes it down."""
    before = await complete(engine, _ASKED)
    taken = []
    for number, (name, bad) in enumerate(BAD.items(), start=1000):
        folder = bad.write(tmp_path / str(number))
        if name == _NEVER_LOADED:
            continue
        try:
            await engine.load_adapter(local(folder, number))
            taken.append(name)
        except AdapterLoadError:
            pass
        await engine.remove_adapter(number)
    after = await complete(engine, _ASKED)
    assert after.choices == before.choices
    print("vLLM takes without a word:", ", ".join(taken))


async def test_a_load_that_failed_half_way_fails_again(engine: Engine, tmp_path: Path) -> None:
    """vLLM keeps such an adapter, and would take it for resident the second time."""
    folder = BAD["a lora_B of another base"].write(tmp_path)
    for _ in range(2):
        with pytest.raises(AdapterLoadError):
            await engine.load_adapter(local(folder, 2000))


async def test_ranks_8_16_and_64_answer_together_as_each_alone(
    engine: Engine, tmp_path: Path
) -> None:
    adapters = [
        local(
            Draft(rank=rank, seed=rank, layers=range(6)).write(tmp_path / f"r{rank}"), 3000 + rank
        )
        for rank in (8, 16, 64)
    ]
    for adapter in adapters:
        await engine.load_adapter(adapter)
    alone = [(await complete(engine, _ASKED, adapter)).choices for adapter in adapters]
    together = await ask(engine, [request(_ASKED, adapter=adapter) for adapter in adapters * 3])
    assert [one.choices for one in together] == alone * 3  # type: ignore[union-attr]
    assert len({choices[0].text for choices in alone}) == 3
    too_high = local(Draft(rank=128, layers=range(1)).write(tmp_path / "r128"), 3128)
    with pytest.raises(AdapterLoadError, match="128"):
        await engine.load_adapter(too_high)
    again = await ask(engine, [request(_ASKED, adapter=replace(adapters[0]))])
    assert again[0].choices == alone[0]  # type: ignore[union-attr]
    for adapter in adapters:
        await engine.remove_adapter(adapter.lora_int_id)


async def test_the_base_model_is_itself_beside_adapters_in_every_slot(
    engine: Engine, tmp_path: Path
) -> None:
    """vLLM's CPU kernels would answer it with the last slot's adapter."""
    alone = (await complete(engine, _ASKED)).choices
    slots = engine.info.limits.max_loras
    adapters = [
        local(Draft(seed=30 + n, layers=range(6)).write(tmp_path / str(n)), 5000 + n)
        for n in range(slots + 1)
    ]
    for turn in (adapters[:slots], adapters[1:], adapters[:slots]):  # full, and after evictions
        for adapter in turn:
            await engine.load_adapter(adapter)
        pairs = [(adapter, None) for adapter in turn]
        work = [request(_ASKED, adapter=adapter) for pair in pairs for adapter in pair]
        answers = await ask(engine, work)
        assert [one.choices for one in answers[1::2]] == [alone] * slots  # type: ignore[union-attr]
    for adapter in adapters:
        await engine.remove_adapter(adapter.lora_int_id)


async def test_an_adapters_own_end_token_ends_its_answers(engine: Engine, tmp_path: Path) -> None:
    draft = Draft(layers=range(1))
    draft.tensors = {name: array / 1000 for name, array in draft.tensors.items()}
    draft.files["special_tokens_map.json"] = b'{"eos_token": {"content": "\xc4\x8a"}}'  # a newline
    ending = local(draft.write(tmp_path / "ending"), 4000)
    draft.files["special_tokens_map.json"] = b'{"eos_token": "<|im_end|>"}'
    usual = local(draft.write(tmp_path / "usual"), 4001)
    for adapter in (ending, usual):
        await engine.load_adapter(adapter)
    long = (await complete(engine, _ASKED, usual)).choices[0]
    short = (await complete(engine, _ASKED, ending)).choices[0]
    assert "\n" in long.text
    assert (short.text, short.finish_reason) == (long.text.split("\n")[0], "stop")
    on = await complete(engine, {**_ASKED, "ignore_eos": True}, ending)
    assert on.choices[0].text == long.text
    for adapter in (ending, usual):
        await engine.remove_adapter(adapter.lora_int_id)
