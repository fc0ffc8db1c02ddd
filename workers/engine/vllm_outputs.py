"""From vLLM's final output to a completion: texts, finish reasons, logprobs, counts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from core.errors import ErrorCode
from core.generation import (
    Aborted,
    Choice,
    Completion,
    Failure,
    Outcome,
    StepLogprobs,
    TokenLogprob,
)

_UNKNOWN = "\ufffd"
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # Postgres takes neither
_LEAST_LOGPROB = -9999.0  # JSON has no -inf
# Enough of the prompt for a tokenizer to know whether the answer starts with a space.
_TAIL = 8


def outcome_of(output: Any, params: Any, backend: Any) -> Outcome:
    """What a finished `RequestOutput` means for the job.

    Args:
        output: vLLM's output.
        params: the `SamplingParams` it ran with.
        backend: the fast tokenizer, for outputs that vLLM left undecoded; None without one.
    """
    reasons = {choice.finish_reason for choice in output.outputs}
    if "abort" in reasons:
        return Aborted()
    if odd := sorted(str(reason) for reason in reasons - {"stop", "length"}):
        return Failure(
            ErrorCode.ENGINE_ERROR, f"The engine ended the generation with {', '.join(odd)}."
        )
    prompt = output.prompt_token_ids or ()
    return Completion(
        choices=[_choice(choice, prompt, params, backend) for choice in output.outputs],
        prompt_tokens=len(prompt),
        completion_tokens=sum(len(choice.token_ids) for choice in output.outputs),
        cached_tokens=output.num_cached_tokens or 0,
    )


def decode(backend: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text of `answer` after `prompt`, exactly as vLLM's token-by-token decoder gives it.

    It drops a character that the answer's end cut in two, and keeps the space at the answer's
    start that many tokenizers drop from a text of its own.
    """
    tail = list(prompt[-_TAIL:])
    head = backend.decode(tail, skip_special_tokens=True)
    whole = backend.decode([*tail, *answer], skip_special_tokens=True)
    # Where a character is broken, how much is lost depends on the order of the steps.
    if head and _UNKNOWN not in whole and whole.startswith(head):
        return str(whole[len(head) :])
    return _decode_stepwise(backend, prompt, answer)


def _decode_stepwise(backend: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
    pieces = []
    for token in answer:
        try:
            piece = stream.step(backend, token)
        except Exception as error:  # tokenizers raises nothing more special
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            stream = DecodeStream(skip_special_tokens=True)
            piece = stream.step(backend, token)
        pieces.append(piece or "")
    return "".join(pieces)


def _choice(choice: Any, prompt: Sequence[int], params: Any, backend: Any) -> Choice:
    text, token_ids = choice.text, None
    if not params.detokenize and backend is None:
        token_ids = list(choice.token_ids)
    elif not params.detokenize:
        # Without stop strings "stop" is always a stop token, which is no part of the text.
        ended = choice.finish_reason == "stop"
        text = decode(backend, prompt, choice.token_ids[:-1] if ended else choice.token_ids)
    return Choice(
        text=_storable(text),
        finish_reason=choice.finish_reason,
        token_ids=token_ids,
        logprobs=_steps(choice, params.logprobs),
    )


def _steps(choice: Any, top: int | None) -> list[StepLogprobs] | None:
    if top is None or choice.logprobs is None:
        return None
    pairs = zip(choice.token_ids, choice.logprobs, strict=False)
    return [_step(token, candidates, top) for token, candidates in pairs]


def _step(token: int, candidates: Mapping[int, Any], top: int) -> StepLogprobs:
    # The chosen token is listed too, whatever its rank: by rank it falls into its place.
    ranked = sorted(candidates.items(), key=lambda item: -item[1].logprob)
    return StepLogprobs(
        chosen=_token_logprob(token, candidates[token]),
        top=[_token_logprob(*item) for item in ranked[:top]],
    )


def _token_logprob(token_id: int, candidate: Any) -> TokenLogprob:
    token = candidate.decoded_token
    if token is None:  # no tokenizer: named as vLLM's own server names it
        token = f"token_id:{token_id}"
    return TokenLogprob(
        token=_storable(token),
        logprob=max(candidate.logprob, _LEAST_LOGPROB),
        raw=token.encode("utf-8", errors="replace"),
    )


def _storable(text: str) -> str:
    return _UNSTORABLE.sub(_UNKNOWN, text)
