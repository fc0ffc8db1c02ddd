"""Answers in OpenAI's shapes, as OpenAI's own client reads them."""

import math
from typing import Any
from uuid import UUID

import orjson
import pytest
from openai.types import Completion as OpenAiCompletion
from openai.types.chat import ChatCompletion

from core.answers import build_response
from core.generation import (
    Choice,
    Completion,
    Endpoint,
    Provenance,
    StepLogprobs,
    TokenLogprob,
)

JOB = UUID("0192f000-0000-7000-8000-000000000001")
VLLM = Provenance("vllm", "0.24.0", "base", "rev1", adapter_sha256="a" * 64, seed=7)


def token(text: str, logprob: float) -> TokenLogprob:
    return TokenLogprob(text, logprob, text.encode("utf-8", "surrogatepass"))


STEPS = [
    StepLogprobs(token("Hel", -0.1), [token("Hel", -0.1), token("Hi", -2.5)]),
    StepLogprobs(token("lo", -math.inf), [token("lo", -math.inf)]),
]


def answer(
    endpoint: Endpoint = "chat", *choices: Choice, provenance: Provenance = VLLM
) -> dict[str, Any]:
    completion = Completion(choices or (Choice("Hello", "stop"),), 11, 5, cached_tokens=8)
    return build_response(JOB, "sql@2", endpoint, completion, provenance, 1_800_000_000)


def test_a_chat_answer_reads_as_openais() -> None:
    found = ChatCompletion.model_validate(answer("chat", Choice("Hello", "length", None, STEPS)))
    assert found.id == f"chatcmpl-{JOB.hex}"
    assert (found.object, found.created, found.model) == ("chat.completion", 1_800_000_000, "sql@2")
    choice = found.choices[0]
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [step.token for step in choice.logprobs.content] == ["Hel", "lo"]
    assert choice.logprobs.content[0].top_logprobs[1].logprob == -2.5
    assert choice.logprobs.content[0].bytes == list(b"Hel")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (11, 5)
    assert found.usage.total_tokens == 16
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 8


def test_a_text_answer_reads_as_openais() -> None:
    choices = (Choice("Hello", "stop", None, STEPS), Choice("Hullo", "length"))
    found = OpenAiCompletion.model_validate(answer("completion", *choices))
    assert (found.id, found.object) == (f"cmpl-{JOB.hex}", "text_completion")
    assert [choice.text for choice in found.choices] == ["Hello", "Hullo"]
    assert [choice.index for choice in found.choices] == [0, 1]
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["Hel", "lo"]
    assert logprobs.text_offset == [0, 3]
    assert logprobs.token_logprobs == [-0.1, -9999.0]
    assert logprobs.top_logprobs == [{"Hel": -0.1, "Hi": -2.5}, {"lo": -9999.0}]
    assert found.choices[1].logprobs is None


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
def test_what_made_an_answer_is_kept_with_it(endpoint: Endpoint) -> None:
    found = answer(endpoint)
    assert found["system_fingerprint"] == "vllm-0.24.0"
    assert found["lorry"] == {
        "engine": "vllm",
        "engine_version": "0.24.0",
        "base_model": "base",
        "base_revision": "rev1",
        "adapter_sha256": "a" * 64,
        "seed": 7,
    }


def test_nobody_can_take_a_simulated_answer_for_a_real_one() -> None:
    found = answer(provenance=Provenance("simulated", "1", "base", ""))
    assert found["system_fingerprint"].startswith("simulated-")
    assert found["lorry"]["engine"] == "simulated"


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
def test_without_a_tokenizer_the_token_ids_are_the_answer(endpoint: Endpoint) -> None:
    choice = answer(endpoint, Choice("", "length", token_ids=(5, 6)))["choices"][0]
    assert choice["token_ids"] == [5, 6]
    assert "token_ids" not in answer(endpoint)["choices"][0]


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
@pytest.mark.parametrize("logprob", [-math.inf, math.inf, math.nan, -1e300])
def test_every_number_is_one_that_json_has(endpoint: Endpoint, logprob: float) -> None:
    step = StepLogprobs(token("a", logprob), [token("a", logprob)])
    text = orjson.dumps(answer(endpoint, Choice("a", "stop", None, [step])))
    assert b"null" not in text.split(b'"logprobs":{')[1].split(b'"refusal"')[0].split(b"}]")[0]
    assert b"-9999.0" in text


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
def test_text_that_postgres_cannot_hold_is_replaced(endpoint: Endpoint) -> None:
    step = StepLogprobs(token("\0\ud83d", -1.0), [token("\udc00", -1.0)])
    text = orjson.dumps(answer(endpoint, Choice("a\0b\ud800c😀", "stop", None, [step]))).decode()
    assert "a\ufffdb\ufffdc😀" in text
    assert "\\u0000" not in text
