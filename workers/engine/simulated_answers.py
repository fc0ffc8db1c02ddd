"""What the simulated engine answers: made-up words, the same ones for the same request."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from core.errors import ErrorCode
from core.generation import Choice, Completion, Failure, FinishReason, Outcome
from workers.engine.protocol import EngineInfo, EngineRequest

#: An answer's length in tokens (here: words) where nothing asks for another.
NATURAL_TOKENS = 12
_WORDS = ("amber", "brook", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "knoll")


def answer(request: EngineRequest, info: EngineInfo) -> tuple[Outcome, int]:
    """The outcome that a request will have, and how many steps it takes."""
    body = request.generation.body
    prompt_tokens = _prompt_tokens(body)
    limit = body.get("max_tokens")
    room = info.limits.max_model_len - prompt_tokens
    if room < (limit or 1):
        message = (
            f"the prompt has {prompt_tokens} tokens and max_tokens is {limit or 1}; together they "
            f"exceed the context of {info.limits.max_model_len}"
        )
        return Failure(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message), 1
    natural = room if body.get("ignore_eos") else NATURAL_TOKENS
    tokens = min(natural, limit or natural)
    reason: FinishReason = "length" if limit is not None and tokens == limit else "stop"
    choices = [
        Choice(" ".join(itertools.islice(_words(request, index), tokens)), reason)
        for index in range(body.get("n") or 1)
    ]
    return Completion(choices, prompt_tokens, tokens * len(choices)), tokens


def _prompt_tokens(body: Mapping[str, Any]) -> int:
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    return max(1, len(str(prompt if prompt is not None else body.get("messages")).split()))


def _words(request: EngineRequest, index: int) -> Iterator[str]:
    """Words that depend on the prompt, the adapter, the seed and the choice alone."""
    body = request.generation.body
    adapter = request.adapter.sha256 if request.adapter else "base"
    asked = str(body.get("prompt", body.get("messages")))
    key = f"{adapter}/{body.get('seed')}/{index}/{asked}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(key, digest_size=16).digest()
    yield "simulated"
    yield request.adapter.lora_name[:12] if request.adapter else "base"
    for byte in itertools.cycle(digest):
        yield _WORDS[byte % len(_WORDS)]
