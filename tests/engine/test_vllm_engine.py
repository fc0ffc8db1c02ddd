"""The real engine on the demo's base model: the contract, and what only vLLM can get wrong."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from core.errors import ErrorCode
from core.generation import Aborted, Completion, Failure
from tests.engine.conftest import write_adapter
from tests.engine.contract import Answers, EngineContract, ask, chat, complete, request
from tests.support.waiting import eventually
from workers.engine.protocol import AdapterLoadError, Engine, EngineDead, LocalAdapter
from workers.engine.selection import EngineName, build_engine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

_NEVER = "\u2603never\u2603"  # a stop string that no answer holds
_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class TestVllmEngine(EngineContract):
    @pytest.fixture
    def engine(self, vllm_engine: Engine) -> Engine:
        return vllm_engine

    @pytest.fixture
    def fresh_engine(self, base_model: Path) -> Engine:
        return build_engine(EngineName.VLLM, str(base_model), [])


def _json_schema(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


async def test_it_knows_what_it_runs(vllm_engine: Engine, base_model: Path) -> None:
    info = vllm_engine.info
    assert (info.name, info.base_model) == ("vllm", base_model.name)
    assert info.base_revision.startswith("files-")
    assert info.limits.max_model_len == 1024
    assert info.limits.max_loras == 8


async def test_a_chat_is_answered_sensibly(vllm_engine: Engine) -> None:
    body = chat("What is the capital of France?", temperature=0, max_tokens=20)
    completion = await complete(vllm_engine, body)
    assert "Paris" in completion.choices[0].text
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].token_ids is None


async def test_content_parts_and_the_developer_role_render_like_plain_text(
    vllm_engine: Engine,
) -> None:
    plain = chat("Be brief.\nName a colour.", temperature=0, max_tokens=8)
    parts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Name a colour."}]
    split = {**plain, "messages": [{"role": "user", "name": "ann", "content": parts}]}
    first, second = await complete(vllm_engine, plain), await complete(vllm_engine, split)
    assert (first.choices, first.prompt_tokens) == (second.choices, second.prompt_tokens)

    told = [{"role": "developer", "content": "Speak Latin."}, *plain["messages"]]
    as_system = [{"role": "system", "content": "Speak Latin."}, *plain["messages"]]
    developer = await complete(vllm_engine, {**plain, "messages": told})
    system = await complete(vllm_engine, {**plain, "messages": as_system})
    assert (developer.choices, developer.prompt_tokens) == (system.choices, system.prompt_tokens)


@pytest.mark.parametrize("text", ["Write a haiku about the sea.", "Count in emoji: 🙂 🙃"])
async def test_our_decoding_equals_vllms(vllm_engine: Engine, text: str) -> None:
    body = chat(text, temperature=0, max_tokens=40)
    raw = {"prompt": text, "temperature": 0, "max_tokens": 40, "ignore_eos": True}
    for one in (body, raw):
        ours = await complete(vllm_engine, one)
        theirs = await complete(vllm_engine, {**one, "stop": [_NEVER]})  # makes vLLM decode
        assert ours.choices == theirs.choices


async def test_a_prompt_of_token_ids_is_the_same_prompt(
    vllm_engine: Engine, base_model: Path
) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(base_model).encode("The sky is")
    body = {"temperature": 0, "max_tokens": 8}
    as_text = await complete(vllm_engine, {**body, "prompt": "The sky is"})
    as_ids = await complete(vllm_engine, {**body, "prompt": ids})
    assert (as_text.choices, as_text.prompt_tokens) == (as_ids.choices, len(ids))


async def test_completions_default_to_16_tokens(vllm_engine: Engine) -> None:
    completion = await complete(vllm_engine, {"prompt": "Once", "ignore_eos": True})
    assert completion.completion_tokens == 16


async def test_a_json_schema_gives_valid_json(vllm_engine: Engine) -> None:
    body = chat("Describe a person.", max_tokens=200, response_format=_json_schema(_PERSON))
    completion = await complete(vllm_engine, {**body, "temperature": 0})
    person = json.loads(completion.choices[0].text)
    assert isinstance(person["name"], str)
    assert isinstance(person["age"], int)


async def test_a_stop_string_ends_the_text(vllm_engine: Engine) -> None:
    body = chat("What is the capital of France?", temperature=0, max_tokens=20, stop=[" is"])
    completion = await complete(vllm_engine, body)
    assert completion.choices[0].finish_reason == "stop"
    assert " is" not in completion.choices[0].text


async def test_logprobs_of_a_chat(vllm_engine: Engine) -> None:
    body = chat("Hi", temperature=0, max_tokens=3, logprobs=True, top_logprobs=2)
    choice = (await complete(vllm_engine, body)).choices[0]
    assert choice.logprobs is not None
    assert "".join(step.chosen.token for step in choice.logprobs) == choice.text
    for step in choice.logprobs:
        assert len(step.top) == 2
        assert step.top[0] == step.chosen  # greedy takes the likeliest
        assert 0 >= step.top[0].logprob >= step.top[1].logprob
        assert step.chosen.raw == step.chosen.token.encode()


async def test_logprobs_without_candidates(vllm_engine: Engine) -> None:
    choice = (await complete(vllm_engine, chat("Hi", max_tokens=2, logprobs=True))).choices[0]
    assert choice.logprobs is not None
    assert [len(step.top) for step in choice.logprobs] == [0, 0]
    plain = (await complete(vllm_engine, chat("Hi", max_tokens=2, logprobs=False))).choices[0]
    assert plain.logprobs is None


async def test_bad_requests_fail_alone(vllm_engine: Engine) -> None:
    bad = {
        "nonsense": chat("a", response_format=_json_schema({"type": "nonsense"})),
        "pointer": chat("a", response_format=_json_schema({"$ref": "#/nowhere"})),
        "regex": chat("a", response_format=_json_schema({"type": "string", "pattern": "((("})),
        "logit_bias": {"prompt": "a", "logit_bias": {"x": 1}},
        "vocab": {"prompt": "a", "logit_bias": {"99999999": 1}},
        "token id 99999999": {"prompt": [1, 99999999]},
        "temperature": {"prompt": "a", "temperature": -1},
        "seed": {"prompt": "a", "seed": 2**70},
        "empty": {"prompt": ""},
        "min_tokens": {"prompt": "a", "min_tokens": 5, "max_tokens": 2},
        "image_url": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "tokenize": chat("a", chat_template_kwargs={"tokenize": False}),
    }
    good = {"prompt": "The sky is", "temperature": 0, "max_tokens": 4}
    bodies = [body for one in bad.values() for body in (one, good)]
    outcomes = await ask(vllm_engine, [request(body) for body in bodies])
    for word, outcome in zip(bad, outcomes[::2], strict=True):
        assert isinstance(outcome, Failure), word
        assert outcome.code is ErrorCode.INVALID_REQUEST, word
        assert word in outcome.message or word in ("nonsense", "pointer", "vocab"), outcome
    assert all(isinstance(outcome, Completion) for outcome in outcomes[1::2])
    assert len({str(outcome) for outcome in outcomes[1::2]}) <= 2  # cached tokens may differ


async def test_mixed_adapters_answer_as_each_alone(
    vllm_engine: Engine, adapters: Sequence[LocalAdapter]
) -> None:
    for adapter in adapters:
        await vllm_engine.load_adapter(adapter)
    body = {"prompt": "The meaning of", "temperature": 0, "max_tokens": 8}
    models = [None, *adapters]
    alone = [(await complete(vllm_engine, body, model)).choices for model in models]
    mixed = await ask(vllm_engine, [request(body, adapter=model) for model in models * 3])
    for number, outcome in enumerate(mixed):
        assert isinstance(outcome, Completion)
        assert outcome.choices == alone[number % len(models)]
    assert len({choices[0].text for choices in alone}) == len(models)


async def test_an_adapter_brings_its_own_chat_template(vllm_engine: Engine, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, 21)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    await vllm_engine.load_adapter(adapter)
    chatted = await complete(vllm_engine, chat("One two", max_tokens=2), adapter)
    raw = await complete(vllm_engine, {"prompt": "One two", "max_tokens": 2}, adapter)
    assert chatted.prompt_tokens == raw.prompt_tokens
    await vllm_engine.remove_adapter(adapter.lora_int_id)


async def test_broken_adapters_are_refused(vllm_engine: Engine, tmp_path: Path) -> None:
    too_high = write_adapter(tmp_path / "rank", 31, rank=32)
    corrupt = write_adapter(tmp_path / "corrupt", 32)
    (tmp_path / "corrupt" / "adapter_model.safetensors").write_bytes(b"not weights")
    relative = replace(too_high, lora_int_id=33, path="some/adapter")
    for adapter, why in [(too_high, "rank"), (corrupt, "."), (relative, "absolute")]:
        with pytest.raises(AdapterLoadError, match=why):
            await vllm_engine.load_adapter(adapter)
    await complete(vllm_engine, {"prompt": "still here", "max_tokens": 2})


async def test_an_adapter_that_was_not_loaded_fails_its_request(vllm_engine: Engine) -> None:
    stranger = LocalAdapter(77, "77-x", "/nonexistent", "x")
    (outcome,) = await ask(vllm_engine, [request({"prompt": "a"}, adapter=stranger)])
    assert isinstance(outcome, Failure)
    assert outcome.code is ErrorCode.ENGINE_ERROR


@pytest_asyncio.fixture
async def own_engine(base_model: Path) -> AsyncIterator[Engine]:
    engine = build_engine(EngineName.VLLM, str(base_model), ["--max-model-len", "256"])
    yield engine
    await engine.close()


def _alive() -> set[psutil.Process]:
    """Every process below this one; Python's own bookkeeper for shared memory may stay."""
    return {
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
        and "resource_tracker" not in " ".join(process.cmdline())
    }


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def _gone(processes: set[psutil.Process]) -> None:
    """Return once none of them lives: a worker of a killed core needs a moment to notice."""

    async def none() -> bool:
        return not any(_lives(process) for process in processes)

    await eventually(none, "the engine's processes have ended")


async def test_a_killed_engine_is_noticed_and_everything_is_answered(own_engine: Engine) -> None:
    before = _alive()
    await own_engine.start()
    started = _alive() - before
    answers = Answers()
    long = {"prompt": "a", "ignore_eos": True, "max_tokens": 200}
    own_engine.submit([request(long)], answers.done)
    (core,) = {process for process in started if process.ppid() == os.getpid()}
    core.kill()
    async with asyncio.timeout(60):
        reason = await own_engine.wait_dead()
    assert "died" in reason
    assert [type(outcome) for outcome in answers.outcomes.values()] == [Aborted]
    with pytest.raises(EngineDead):
        await own_engine.load_adapter(LocalAdapter(1, "1-a", "/nonexistent", "a"))
    own_engine.submit([request({"prompt": "a"})], answers.done)
    await answers.wait(2, seconds=60)
    await own_engine.close()
    await own_engine.close()
    await _gone(started)


@pytest.mark.parametrize("processes", [0, 1, 2], ids=["early", "core", "worker"])
async def test_closing_half_way_through_the_start_leaves_nothing(
    own_engine: Engine, processes: int
) -> None:
    """Before it has a process, when its core has just come, and when the core's worker has."""
    before = _alive()
    starting = asyncio.create_task(own_engine.start())

    async def so_far() -> bool:
        return len(_alive() - before) >= processes

    await eventually(so_far, f"{processes} processes of the engine", seconds=60)
    started = _alive() - before
    await own_engine.close()
    with pytest.raises(EngineDead):
        await starting
    await _gone(started)
    assert _alive() <= before
