"""What every engine must do. Each engine's test file runs this suite over an engine of its own.

A subclass provides the fixtures `engine` (started, shared), `fresh_engine` (closed by the test) and
`adapters` (at least two that load).
"""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from core.errors import ErrorCode
from core.generation import Aborted, Completion, Endpoint, Failure, GenerationRequest, Outcome
from workers.engine.protocol import (
    AdapterLoadError,
    Engine,
    EngineRequest,
    FoldRefused,
    LocalAdapter,
)

_numbers = itertools.count()
_LONG = {"prompt": "Once upon a time", "max_tokens": 600, "ignore_eos": True}


def request(
    body: Mapping[str, Any], *, adapter: LocalAdapter | None = None, salt: str = "tenant"
) -> EngineRequest:
    """A request with an id of its own; the endpoint follows from the body."""
    endpoint: Endpoint = "chat" if "messages" in body else "completion"
    generation = GenerationRequest(endpoint, body)
    return EngineRequest(f"job-{next(_numbers)}:1", generation, adapter, salt)


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat with one message."""
    return {"messages": [{"role": "user", "content": text}], **fields}


class Answers:
    """Collects outcomes and counts how often each request was answered."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.calls: dict[str, int] = {}
        self._changed = asyncio.Event()

    def done(self, request: EngineRequest, outcome: Outcome) -> None:
        self.outcomes[request.request_id] = outcome
        self.calls[request.request_id] = self.calls.get(request.request_id, 0) + 1
        self._changed.set()

    async def wait(self, count: int, seconds: float = 240) -> None:
        async with asyncio.timeout(seconds):
            while len(self.outcomes) < count:
                self._changed.clear()
                await self._changed.wait()


async def ask(engine: Engine, requests: Sequence[EngineRequest]) -> list[Outcome]:
    """The outcomes in the order of the requests."""
    answers = Answers()
    engine.submit(requests, answers.done)
    await answers.wait(len(requests))
    return [answers.outcomes[one.request_id] for one in requests]


async def complete(
    engine: Engine, body: Mapping[str, Any], adapter: LocalAdapter | None = None
) -> Completion:
    """The completion of one request that must succeed."""
    (outcome,) = await ask(engine, [request(body, adapter=adapter)])
    assert isinstance(outcome, Completion), outcome
    return outcome


class EngineContract:
    """The suite; see the module."""

    async def test_info_says_what_was_started(self, engine: Engine) -> None:
        info = engine.info
        assert info.name and info.version and info.base_model and info.base_revision
        assert info.limits.max_model_len > 0
        assert info.limits.max_num_seqs > 0
        assert info.limits.max_loras >= 2

    async def test_every_request_is_answered_exactly_once(self, engine: Engine) -> None:
        answers = Answers()
        good = [request(chat(f"Say {i}", max_tokens=4)) for i in range(6)]
        long = request({"prompt": "word " * engine.info.limits.max_model_len, "max_tokens": 4})
        engine.submit([*good[:3], long], answers.done)
        engine.submit(good[3:], answers.done)
        assert engine.running == 7
        await answers.wait(7)
        await asyncio.sleep(0.05)
        assert set(answers.calls.values()) == {1}
        assert engine.running == 0
        assert all(isinstance(answers.outcomes[r.request_id], Completion) for r in good)

    async def test_submit_returns_before_any_answer(self, engine: Engine) -> None:
        answers = Answers()
        engine.submit([request(chat("Hi", max_tokens=2))], answers.done)
        assert not answers.outcomes
        await answers.wait(1)

    async def test_an_empty_chunk_is_fine(self, engine: Engine) -> None:
        engine.submit([], Answers().done)
        assert engine.running == 0

    async def test_max_tokens_ends_with_length(self, engine: Engine) -> None:
        completion = await complete(
            engine, {"prompt": "One two three", "max_tokens": 5, "ignore_eos": True}
        )
        assert completion.choices[0].finish_reason == "length"
        assert completion.completion_tokens == 5
        assert completion.prompt_tokens > 0
        assert completion.choices[0].text

    async def test_n_choices_are_summed_up(self, engine: Engine) -> None:
        body = {"prompt": "One two", "n": 3, "max_tokens": 4, "ignore_eos": True}
        completion = await complete(engine, body)
        assert len(completion.choices) == 3
        assert completion.completion_tokens == 12
        single = await complete(engine, {**body, "n": 1})
        assert completion.prompt_tokens == single.prompt_tokens

    async def test_the_same_seed_gives_the_same_answer(self, engine: Engine) -> None:
        body = chat("Tell me a story", seed=7, temperature=1.0, max_tokens=12)
        first, second = await complete(engine, body), await complete(engine, body)
        other = await complete(engine, {**body, "seed": 8})
        assert first.choices == second.choices
        assert first.choices != other.choices

    async def test_a_prompt_too_long_fails_alone(self, engine: Engine) -> None:
        limit = engine.info.limits.max_model_len
        long, good, greedy = await ask(
            engine,
            [
                request({"prompt": "word " * (limit + 1), "max_tokens": 1}),
                request({"prompt": "word", "max_tokens": 1}),
                request({"prompt": "word", "max_tokens": limit}),
            ],
        )
        for outcome in (long, greedy):
            assert isinstance(outcome, Failure)
            assert outcome.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
            assert str(limit) in outcome.message
        assert isinstance(good, Completion)

    async def test_abort_answers_aborted(self, engine: Engine) -> None:
        answers = Answers()
        running, kept = request(_LONG), request({"prompt": "a", "max_tokens": 3})
        engine.submit([running, kept], answers.done)
        await answers.wait(1)  # the short one: the long one computes by now
        await engine.abort([running.request_id])
        await answers.wait(2, seconds=60)
        assert isinstance(answers.outcomes[running.request_id], Aborted)
        assert isinstance(answers.outcomes[kept.request_id], Completion)
        assert engine.running == 0

    async def test_abort_right_after_submit(self, engine: Engine) -> None:
        answers = Answers()
        requests = [request(_LONG) for _ in range(5)]
        engine.submit(requests, answers.done)
        await engine.abort([one.request_id for one in requests])
        await answers.wait(5, seconds=60)
        await asyncio.sleep(0.05)
        assert set(answers.calls.values()) == {1}
        assert all(isinstance(outcome, Aborted) for outcome in answers.outcomes.values())

    async def test_abort_ignores_what_it_does_not_know(self, engine: Engine) -> None:
        await engine.abort(["never-submitted"])
        await complete(engine, {"prompt": "still here", "max_tokens": 2})

    async def test_progress_rises_while_it_works(self, engine: Engine) -> None:
        before = engine.progress()
        await complete(engine, {"prompt": "One", "max_tokens": 8, "ignore_eos": True})
        assert engine.progress() >= before + 8

    async def test_a_bad_adapter_is_refused_and_the_engine_lives(self, engine: Engine) -> None:
        missing = LocalAdapter(990, "990-missing", "/nonexistent/adapter", "missing")
        with pytest.raises(AdapterLoadError, match="adapter"):
            await engine.load_adapter(missing)
        await complete(engine, {"prompt": "still here", "max_tokens": 2})

    async def test_an_adapter_is_loaded_removed_and_loaded_again(
        self, engine: Engine, adapters: Sequence[LocalAdapter]
    ) -> None:
        body = {"prompt": "The meaning of", "max_tokens": 8, "temperature": 0}
        texts = []
        for _ in range(2):
            await engine.load_adapter(adapters[0])
            await engine.load_adapter(adapters[0])  # idempotent
            texts.append((await complete(engine, body, adapters[0])).choices[0].text)
            await engine.remove_adapter(adapters[0].lora_int_id)
        assert texts[0] == texts[1]
        assert texts[0] != (await complete(engine, body)).choices[0].text

    async def test_reading_ahead_changes_no_answer(
        self, engine: Engine, adapters: Sequence[LocalAdapter]
    ) -> None:
        body = {"prompt": "The meaning of", "max_tokens": 8, "temperature": 0}
        missing = LocalAdapter(992, "992-missing", "/nonexistent/adapter", "missing")
        texts = []
        for ahead in ((), (missing, *adapters), adapters[1:]):
            engine.read_ahead(ahead)
            await engine.load_adapter(adapters[0])
            texts.append((await complete(engine, body, adapters[0])).choices[0].text)
            await engine.remove_adapter(adapters[0].lora_int_id)
        engine.read_ahead([])
        assert texts[1:] == texts[:1] * 2

    async def test_removing_an_unknown_adapter_is_ignored(self, engine: Engine) -> None:
        await engine.remove_adapter(991)

    async def test_close_is_idempotent(self, fresh_engine: Engine) -> None:
        await asyncio.gather(fresh_engine.close(), fresh_engine.close())
        await fresh_engine.close()


class FoldContract:
    """What every engine that folds must do. Fixtures: `folding`, an engine that can, started, and
    `adapters` (at least two that load and can be folded)."""

    async def test_only_the_folded_adapter_computes(
        self, folding: Engine, adapters: Sequence[LocalAdapter]
    ) -> None:
        one, other = adapters[:2]
        body = {"prompt": "The meaning of", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        for adapter in (one, other):
            await folding.load_adapter(adapter)
        apart = [await complete(folding, body, who) for who in (one, other, None)]
        times = await folding.fold(one.lora_int_id)
        assert times.pause >= times.fold >= 0
        answers = Answers()
        waiting = [request(body, adapter=other), request(body)]
        folding.submit(waiting, answers.done)
        assert (await complete(folding, body, one)).choices == apart[0].choices
        await asyncio.sleep(0.2)
        before = folding.progress()
        await asyncio.sleep(0.2)
        assert not answers.outcomes
        assert folding.progress() == before  # nothing spins either
        await folding.fold(other.lora_int_id)  # straight to another
        await answers.wait(1)
        await folding.fold(None)
        await answers.wait(2)
        for sent, alone in zip(waiting, apart[1:], strict=True):
            outcome = answers.outcomes[sent.request_id]
            assert isinstance(outcome, Completion)
            assert outcome.choices == alone.choices

    async def test_what_computes_is_parked_and_goes_on(
        self, folding: Engine, adapters: Sequence[LocalAdapter]
    ) -> None:
        one, other = adapters[:2]
        body = {"prompt": "Once", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
        for adapter in (one, other):
            await folding.load_adapter(adapter)
        alone = await complete(folding, body, other)
        answers, started = Answers(), folding.progress()
        folding.submit([request(body, adapter=other)], answers.done)
        async with asyncio.timeout(60):
            while folding.progress() < started + 20:
                await asyncio.sleep(0.005)
        await folding.fold(one.lora_int_id)
        assert not answers.outcomes
        await complete(folding, {"prompt": "a", "max_tokens": 3}, one)
        assert not answers.outcomes
        await folding.fold(None)
        await answers.wait(1)
        (outcome,) = answers.outcomes.values()
        assert isinstance(outcome, Completion)
        assert outcome.choices == alone.choices

    async def test_a_parked_request_can_be_aborted(
        self, folding: Engine, adapters: Sequence[LocalAdapter]
    ) -> None:
        one, other = adapters[:2]
        for adapter in (one, other):
            await folding.load_adapter(adapter)
        answers, started = Answers(), folding.progress()
        body = {**_LONG, "max_tokens": 400}  # an engine's context may be 512
        long = [request(body, adapter=other), request(body)]
        folding.submit(long, answers.done)
        async with asyncio.timeout(60):
            while folding.progress() < started + 8:
                await asyncio.sleep(0.005)
        await folding.fold(one.lora_int_id)
        await folding.abort([sent.request_id for sent in long])
        await answers.wait(2, seconds=60)
        assert all(isinstance(outcome, Aborted) for outcome in answers.outcomes.values())
        await folding.fold(None)
        await complete(folding, {"prompt": "still here", "max_tokens": 2}, other)

    async def test_an_adapter_that_is_not_resident_is_refused(self, folding: Engine) -> None:
        with pytest.raises(FoldRefused, match="not resident"):
            await folding.fold(12345)
        await complete(folding, {"prompt": "still here", "max_tokens": 2})

    async def test_restoring_what_is_not_folded_is_fine(self, folding: Engine) -> None:
        await folding.fold(None)
        await folding.fold(None)
