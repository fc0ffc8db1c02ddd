"""Requests that are taken: what is kept of them, their fingerprints, deadlines and tokens."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidRequest
from core.request import parse_job_request
from tests.support.requests import CHAT, PROMPT, message, parse, with_schema

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5, "n": 3},
        {"temperature": None, "stop": None, "prompt": None, "webhook_url": None, "tools": None},
        {"max_completion_tokens": 5},
        {"max_tokens": 5, "max_completion_tokens": 5, "min_tokens": 5},
        {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1.1, "seed": -(2**63)},
        {"presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {"50256": -100}},
        {"stop": ["a", "b"], "ignore_eos": True, "user": "u", "stream": False},
        {"logprobs": True, "top_logprobs": 20, "chat_template_kwargs": {"enable_thinking": False}},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        with_schema({"$defs": {"a/b": {"type": "string"}}, "$ref": "#/$defs/a~1b"}),
        with_schema({"properties": {"$ref": {"type": "string"}}}),
        {"priority": -100, "metadata": {"k" * 64: "v" * 512}, "deadline": 2e9},
        message([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "developer"),
        message("x", "assistant", refusal=None, tool_calls=None),
    ],
)
def test_what_openai_and_vllm_take_is_taken(fields: dict[str, Any]) -> None:
    assert parse({**CHAT, **fields}).model == "m"


@pytest.mark.parametrize("prompt", ["Hi", [0], [1, 2, 3]])
def test_a_prompt_is_text_or_token_ids(prompt: Any) -> None:
    request = parse({**PROMPT, "prompt": prompt, "logprobs": 5})
    assert request.endpoint == "completion"
    assert json.loads(request.body_json()) == {"prompt": prompt, "logprobs": 5}


def test_the_kept_body_is_what_the_engine_needs_and_nothing_else() -> None:
    request = parse(
        {
            **message("x", "assistant", refusal=None),
            "model": "m",
            "max_completion_tokens": 9,
            "temperature": 1,
            "stop": None,
            "stream": False,
            "user": "u",
            "priority": 3,
            "deadline": 2e9,
            "metadata": {"b": "1", "a": "2"},
        }
    )
    assert request.body_json() == (
        '{"max_tokens":9,"messages":[{"content":"x","role":"assistant"}],'
        '"temperature":1.0,"user":"u"}'
    )
    assert (request.endpoint, request.model, request.priority) == ("chat", "m", 3)
    assert request.metadata_json() == '{"b":"1","a":"2"}'


def test_fingerprints_agree_for_what_means_the_same() -> None:
    same = [
        {**CHAT, "temperature": 1, "max_tokens": 5},
        {"max_completion_tokens": 5, "temperature": 1.0, **CHAT, "stream": False, "stop": None},
        {**CHAT, "temperature": 1, "max_tokens": 5, "priority": 0},
    ]
    assert len({parse(body).fingerprint() for body in same}) == 1


def test_fingerprints_differ_for_what_does_not() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"model": "other"},
        {"priority": 1},
        {"deadline": 2e9},
        {"metadata": {"a": "b"}},
        {"user": "u"},
        {"seed": 1},
        message("Ho"),
    ]
    assert len({parse({**CHAT, **fields}).fingerprint() for fields in variants}) == len(variants)


@pytest.mark.parametrize("deadline", [NOW - 1, NOW, NOW * 1000, 0])
def test_a_deadline_lies_in_the_future_and_in_seconds(deadline: float) -> None:
    request = parse({**CHAT, "deadline": deadline})
    with pytest.raises(InvalidRequest, match=r"^deadline .*; give"):
        request.deadline_at(NOW)


def test_a_deadline_to_come_is_an_aware_time() -> None:
    moment = parse({**CHAT, "deadline": NOW + 60}).deadline_at(NOW)
    assert moment is not None
    assert moment.timestamp() == NOW + 60
    assert moment.tzinfo is not None
    assert parse(CHAT).deadline_at(NOW) is None


@pytest.mark.parametrize("most", [4096, 5000, 10**9])
def test_more_tokens_than_the_context_are_refused_with_both_numbers(most: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse({**CHAT, "max_tokens": most}).check_context(4096)
    assert str(most) in caught.value.message
    assert "4096 tokens" in caught.value.message
    parse({**CHAT, "max_tokens": 4095}).check_context(4096)
    parse(CHAT).check_context(4096)


def test_token_ids_and_answer_must_fit_together() -> None:
    parse({**PROMPT, "prompt": [1] * 90, "max_tokens": 10}).check_context(100)
    with pytest.raises(InvalidRequest, match=r"91 token ids and 10 to answer .* 100 tokens"):
        parse({**PROMPT, "prompt": [1] * 91, "max_tokens": 10}).check_context(100)
    with pytest.raises(InvalidRequest, match="100 tokens"):
        parse({**PROMPT, "prompt": [1] * 100}).check_context(100)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({**PROMPT, "prompt": [1] * 40, "max_tokens": 10}, 50),
        ({**PROMPT, "prompt": [1] * 40}, 56),
        ({**PROMPT, "prompt": [1] * 40, "max_tokens": 10, "n": 3}, 70),
        ({**PROMPT, "prompt": "abcd" * 10, "max_tokens": 10}, 21),
        ({**CHAT, **message("abcd" * 10)}, 11 + 512),
        ({**CHAT, **message([{"type": "text", "text": "abcd" * 10}]), "max_tokens": 1}, 12),
    ],
)
def test_expected_tokens(body: dict[str, Any], tokens: int) -> None:
    assert parse(body).expected_tokens(4096) == tokens


def test_expected_tokens_fit_their_column() -> None:
    request = parse({**CHAT, "max_tokens": 2**31 - 1, "n": 128})
    assert request.expected_tokens(2**31 - 1) == 2**31 - 1
    assert parse(CHAT).expected_tokens(100) == 1 + 100


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4)
    ),
    max_leaves=12,
)
_FIELDS = st.sampled_from(
    [
        "messages",
        "prompt",
        "stop",
        "response_format",
        "metadata",
        "logit_bias",
        "n",
        "seed",
        "tools",
    ]
)


@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(_FIELDS, _JSON, max_size=4), schema=_JSON)
def test_whatever_comes_is_a_request_or_an_invalid_one(fields: Any, schema: Any) -> None:
    body = {"model": "m", **with_schema(schema), **fields}
    try:
        parse_job_request(json.dumps(body).encode()).body_json()
    except InvalidRequest as error:
        json.dumps(error.details, ensure_ascii=False).encode()


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=60))
def test_whatever_bytes_come_are_an_invalid_request(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_job_request(raw)
