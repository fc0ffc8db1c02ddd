"""Requests that are refused: each mistake is named with its remedy."""

import json
from typing import Any

import pytest

from core.errors import InvalidRequest
from core.request import parse_job_request
from tests.support.requests import CHAT, PROMPT, message, refusal, with_schema


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        # numbers: types are strict, ranges are OpenAI's and vLLM's
        ({"temperature": "1"}, "temperature", "'1'"),
        ({"temperature": True}, "temperature", "true"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2, not 2.1"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.01}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"presence_penalty": 3}, "presence_penalty", "2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "-2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, not 0"),
        ({"max_tokens": -1}, "max_tokens", "not -1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": 10**12}, "max_tokens", "1000000000000"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "only one"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "more than max_tokens (3)"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"n": 0}, "n", "1"),
        ({"n": 2, "temperature": 0}, "n", "temperature 0"),
        ({"n": 129}, "n", "128"),
        ({"seed": 2**63}, "seed", "9223372036854775808"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"top_logprobs": 5}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logprobs": 5}, "logprobs", "boolean"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x (the key)", "pattern"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
        ({"priority": 101}, "priority", "100"),
        ({"priority": 1.5}, "priority", "integer"),
        ({"deadline": "tomorrow"}, "deadline", "number"),
        # texts
        ({"model": ""}, "model", "at least 1"),
        ({"model": None}, "model", "string"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1"),
        ({"stop": 5}, "stop", "a string or a list"),
        ({"user": "a\0"}, "user", "NUL"),
        ({"model": "a\0"}, "model", "NUL"),
        ({"metadata": {"a\0": "b"}}, "metadata.a\0 (the key)", "NUL"),
        ({"metadata": {"a": "\0"}}, "metadata.a", "NUL"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"metadata": {"a" * 65: ""}}, f"metadata.{'a' * 65} (the key)", "64"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a", "512"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "16"),
        ({"chat_template_kwargs": {"a": ["\0"]}}, "chat_template_kwargs", "NUL"),
        ({"chat_template_kwargs": {"a": 2**64}}, "chat_template_kwargs", "64 bits"),
        ({"chat_template_kwargs": {"chat_template": "{{1}}"}}, "chat_template_kwargs", "must not"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "'tokenize'"),
        # messages
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "list"),
        ({"messages": None}, "messages", "is required"),
        ({"prompt": "Hi"}, "messages", "both given"),
        (message(None), "messages[0].content", "a string or a list"),
        (message(None, "assistant"), "messages[0].content", "a string or a list"),
        (message([]), "messages[0].content", "at least 1"),
        (message("x", "tool"), "messages[0].role", "'user'"),
        (message("a\0b"), "messages[0].content", "NUL"),
        (message([{"type": "text", "text": "\0"}]), "messages[0].content[0].text", "NUL"),
        (message([{"type": "image_url"}]), "messages[0].content[0]", "'image_url'"),
        (message("x", tool_calls=[{}]), "messages[0].tool_calls", "not supported"),
        (message("x", mood="glad"), "messages[0].mood", "not a known field"),
        # what is refused by name, each with what to do instead
        ({"stream": True}, "stream", "?wait=30"),
        ({"tools": []}, "tools", "response_format"),
        ({"tool_choice": "auto"}, "tool_choice", "response_format"),
        ({"webhook_url": "ftp://x"}, "webhook_url", "is not a URL that can be used"),
        ({"best_of": 2}, "best_of", "use n"),
        ({"chat_template": "{{1}}"}, "chat_template", "own template"),
        ({"tempurature": 1}, "tempurature", "did you mean 'temperature'?"),
        ({"zzz": 1}, "zzz", "remove it"),
        # schemas
        ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
        ({"response_format": "json"}, "response_format", "'json_schema'"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "is required",
        ),
    ],
)
def test_each_mistake_is_named_with_its_remedy(
    fields: dict[str, Any], field: str, says: str
) -> None:
    error = refusal({**CHAT, **fields})
    assert error.details["field"] == field
    assert says in error.message
    assert field in error.message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": ["a", "b"]}, "one job for each"),
        ({"prompt": [[1], [2]]}, "one job for each"),
        ({"prompt": []}, "at least 1"),
        ({"prompt": ""}, "at least 1"),
        ({"prompt": 5}, "a string or a list"),
        ({"prompt": None}, "is required"),
        ({"prompt": [1, -1]}, "greater than or equal to 0"),
        ({"prompt": [1, True]}, "integer"),
        ({"prompt": [2**31]}, "less than"),
        ({"prompt": "a\0"}, "NUL"),
        ({"logprobs": True}, "integer"),
        ({"min_tokens": 17}, "max_tokens (16)"),
        ({"chat_template_kwargs": {}}, "not a known field"),
        ({"echo": True}, "not a known field"),
    ],
)
def test_mistakes_of_completions(fields: dict[str, Any], says: str) -> None:
    assert says in refusal({**PROMPT, **fields}).message


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "strin"}, "'strin'"),
        ({"type": 5}, "$.type"),
        ({"pattern": "("}, "not a valid JSON schema"),
        ({"pattern": "a{99999999999}"}, "not a valid JSON schema"),
        ({"pattern": "(" * 20_000}, "not a valid JSON schema|too deeply"),
        ({"$schema": 5}, "$schema"),
        ({"$ref": "https://example.org/schema"}, "nothing is fetched"),
        ({"items": {"$ref": "other.json"}}, "nothing is fetched"),
        ({"$ref": "#/$defs/missing"}, "not in the schema"),
        ({"description": "\0"}, "NUL"),
        ({"enum": [2**70]}, "64 bits"),
        ({"description": "x" * 70_000}, "at most 65536"),
        (True, "dictionary"),
    ],
)
def test_a_schema_that_no_engine_could_use_is_refused(schema: Any, says: str) -> None:
    error = refusal({**CHAT, **with_schema(schema)})
    assert error.details["field"] == "response_format.json_schema.schema"
    assert any(part in error.message for part in says.split("|"))


@pytest.mark.parametrize("levels", [30, 70, 150, 5_000, 100_000])
@pytest.mark.parametrize("place", ["schema", "chat_template_kwargs", "metadata"])
def test_nesting_bombs_are_an_answer_and_not_a_crash(place: str, levels: int) -> None:
    bomb = '{"items":' * levels + "{}" + "}" * levels
    if place == "schema":
        text = json.dumps({**CHAT, **with_schema("BOMB")})
    else:
        text = json.dumps({**CHAT, place: "BOMB"})
    raw = text.replace('"BOMB"', bomb).encode()
    if place != "metadata" and levels == 30:
        assert parse_job_request(raw).model == "m"
    else:
        with pytest.raises(InvalidRequest):
            parse_job_request(raw)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "at byte 0 of 0"),
        (b"{", "not valid JSON"),
        (b'{"model": "m",}', "at byte 15 of 15"),
        (b'{"a": 1,\n "b": }', "at byte 16 of 16"),
        (b"[]", "must be a JSON object, not a list of 0"),
        (b"null", "must be a JSON object, not null"),
        (b'{"model": "\xff"}', "at byte 11 of 14"),
        (b'{"model": "m", "prompt": "x", "temperature": NaN}', "not valid JSON"),
        (b'{"model": "m", "prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"model": "m", "prompt": "\\ud800"}', "prompt must not contain the lone surrogate"),
        (b'{"model": "m", "prompt": "x", "metadata": {"\\udc00": "y"}}', "metadata"),
        (b'{"\\ud800": 1}', "lone surrogate"),
        (b'{"model": "m", "prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"n": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"n": ' + b"9" * 4000 + b', "model": "m", "prompt": "x"}', "n must be"),
    ],
)
def test_what_is_no_json_object_is_told_by_place(raw: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_job_request(raw)
    assert says in caught.value.message
    json.dumps(caught.value.details, ensure_ascii=False).encode()  # it can be sent


def test_every_mistake_is_listed_at_once() -> None:
    error = refusal({"prompt": "x", "tools": [1], "n": 0, "temperature": 9})
    assert "(and 3 more: see errors)" in error.message
    errors = error.details["errors"]
    assert isinstance(errors, list)
    assert {found["field"] for found in errors} == {"tools", "n", "temperature", "model"}
    of_n = next(found for found in errors if found["field"] == "n")
    assert of_n == {"field": "n", "message": of_n["message"], "value": "0"}
    assert "greater than or equal to 1" in of_n["message"]


def test_a_long_list_of_mistakes_stays_short() -> None:
    errors = refusal({**PROMPT, "prompt": [-1] * 100_000}).details["errors"]
    assert isinstance(errors, list)
    assert len(errors) == 20


def test_a_secret_sized_value_is_shown_shortened() -> None:
    assert len(refusal({**CHAT, "temperature": "x" * 100_000}).message) < 300
