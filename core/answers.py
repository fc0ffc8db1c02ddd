"""OpenAI's response objects, made from what an engine gave back."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final
from uuid import UUID

from core.generation import (
    Choice,
    Completion,
    Endpoint,
    Provenance,
    StepLogprobs,
    TokenLogprob,
)
from core.json_values import replace_unstorable

#: What OpenAI and vLLM write for a probability of zero, whose logarithm is no JSON number.
LOWEST_LOGPROB: Final = -9999.0


def build_response(
    job_id: UUID,
    model: str,
    endpoint: Endpoint,
    completion: Completion,
    provenance: Provenance,
    created: int,
) -> dict[str, Any]:
    """The `chat.completion` or `text_completion` object of a finished job, ready for JSON.

    Args:
        model: as the user wrote it.
        created: when the answer was made, in unix seconds.

    Returns:
        OpenAI's object, and under `lorry` what it was made by. Text that Postgres cannot hold is
        replaced by U+FFFD; every number is finite.
    """
    chat = endpoint == "chat"
    choice_of = _chat_choice if chat else _text_choice
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{job_id.hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [choice_of(index, choice) for index, choice in enumerate(completion.choices)],
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "total_tokens": completion.prompt_tokens + completion.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": completion.cached_tokens},
        },
        # "simulated-…" here tells every client that no model answered
        "system_fingerprint": f"{provenance.engine}-{provenance.engine_version}",
        "lorry": _made_by(provenance),
    }


@functools.lru_cache(maxsize=256)
def _made_by(provenance: Provenance) -> Mapping[str, Any]:
    """One for all answers that were made alike: `asdict` per job was a sixth of the drain."""
    return asdict(provenance)


def _chat_choice(index: int, choice: Choice) -> dict[str, Any]:
    return _with_token_ids(
        choice,
        {
            "index": index,
            "message": {
                "role": "assistant",
                "content": replace_unstorable(choice.text),
                "refusal": None,
            },
            "logprobs": None if choice.logprobs is None else _chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        },
    )


def _text_choice(index: int, choice: Choice) -> dict[str, Any]:
    return _with_token_ids(
        choice,
        {
            "index": index,
            "text": replace_unstorable(choice.text),
            "logprobs": None if choice.logprobs is None else _text_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        },
    )


def _with_token_ids(choice: Choice, answer: dict[str, Any]) -> dict[str, Any]:
    if choice.token_ids is not None:
        answer["token_ids"] = list(choice.token_ids)
    return answer


def _chat_logprobs(steps: Sequence[StepLogprobs]) -> dict[str, Any]:
    content = [
        {**_chat_token(step.chosen), "top_logprobs": [_chat_token(token) for token in step.top]}
        for step in steps
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": replace_unstorable(token.token),
        "logprob": _finite(token.logprob),
        "bytes": list(token.raw),
    }


def _text_logprobs(steps: Sequence[StepLogprobs]) -> dict[str, Any]:
    tokens = [replace_unstorable(step.chosen.token) for step in steps]
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(step.chosen.logprob) for step in steps],
        "top_logprobs": [_by_token(step.top or [step.chosen]) for step in steps],
        "text_offset": offsets[:-1],
    }


def _by_token(candidates: Sequence[TokenLogprob]) -> Mapping[str, float]:
    by_token: dict[str, float] = {}
    for candidate in candidates:
        # best first: of two tokens with the same text the likelier one is kept
        by_token.setdefault(replace_unstorable(candidate.token), _finite(candidate.logprob))
    return by_token


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB) if math.isfinite(logprob) else LOWEST_LOGPROB
