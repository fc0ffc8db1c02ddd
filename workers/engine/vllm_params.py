"""From a request's body to vLLM's sampling parameters, with the defaults of `vllm serve`.

Import it only after `prepare_environment`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import vllm.exceptions
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from core.generation import GenerationRequest

# Where the model's generation config may say otherwise than vLLM's neutral values.
_CONFIGURABLE = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_PLAIN = ("n", "stop", "seed", "logit_bias", "min_tokens", "ignore_eos")
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default
_SEED_LIMIT = 2**63
# 0.24 raises ValueErrors for a bad request; later releases have a family of their own.
BAD_REQUEST = (ValueError, getattr(vllm.exceptions, "VLLMClientError", ValueError))


class ContextLengthError(ValueError):
    """A prompt and its answer do not fit the model's context; the message has the numbers."""


Decoding = Literal["vllm", "final", "none"]


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """What the engine adds to a request's own wishes.

    Args:
        max_model_len: the context in tokens, prompt and answer together.
        defaults: of the model's generation config, by vLLM's `--generation-config` rules.
        max_tokens_cap: the operator's bound on every answer, in tokens.
        decoding: who turns tokens into text: vLLM token by token, Lorry once at the end (where
            nothing needs the text earlier), or nobody, for lack of a tokenizer.
    """

    max_model_len: int
    defaults: Mapping[str, Any]
    max_tokens_cap: int | None
    decoding: Decoding


def sampling_params(
    request: GenerationRequest,
    prompt_tokens: int,
    rules: SamplingRules,
    end_token: int | None = None,
) -> Any:
    """The `SamplingParams` for a request.

    Args:
        end_token: the id of a token that ends the answer beside the model's own.

    Raises:
        ContextLengthError: the prompt, or it and the tokens asked for, do not fit.
        ValueError: a field has a value that vLLM refuses.
    """
    body = request.body
    fields = {name: body[name] for name in _PLAIN if body.get(name) is not None}
    fields |= {name: rules.defaults[name] for name in _CONFIGURABLE if name in rules.defaults}
    fields |= {name: body[name] for name in _CONFIGURABLE if body.get(name) is not None}
    _check_seed(fields)
    if body.get("stop") and rules.decoding == "none":
        raise ValueError("stop: needs a tokenizer, and the worker runs with --skip-tokenizer-init")
    logprobs = _logprobs(request)
    max_tokens = _max_tokens(request, prompt_tokens, rules)
    try:
        return SamplingParams.from_optional(
            **fields,
            stop_token_ids=None if end_token is None or body.get("ignore_eos") else [end_token],
            max_tokens=max_tokens,
            logprobs=logprobs,
            structured_outputs=_structured(body.get("response_format")),
            detokenize=_detokenize(rules, early=bool(body.get("stop")) or logprobs is not None),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # made for this request only
        )
    except BAD_REQUEST as error:
        raise ValueError(message_of(error)) from error


def message_of(error: BaseException) -> str:
    """An error's message without the machine-readable part that vLLM's own add to it."""
    return str(error.args[0] if error.args else error)


def _detokenize(rules: SamplingRules, *, early: bool) -> bool:
    return rules.decoding == "vllm" or (rules.decoding == "final" and early)


def _check_seed(fields: Mapping[str, Any]) -> None:
    seed, choices = fields.get("seed"), fields.get("n", 1)
    # Choice i runs with seed + i; a seed that torch refuses would take the engine down.
    if seed is not None and not -_SEED_LIMIT <= seed < _SEED_LIMIT - choices:
        raise ValueError(f"seed: {seed} is not a 64-bit integer")


def _max_tokens(request: GenerationRequest, prompt_tokens: int, rules: SamplingRules) -> int:
    context = rules.max_model_len
    left = context - prompt_tokens
    if left < 1:
        raise ContextLengthError(
            f"The prompt has {prompt_tokens} tokens and the model's context is {context} tokens, "
            "the answer included. Shorten the prompt."
        )
    asked = _asked(request)
    if asked is not None and asked > left:
        raise ContextLengthError(
            f"The prompt's {prompt_tokens} tokens and the {asked} asked for exceed the model's "
            f"context of {context} tokens. Shorten the prompt, or ask for at most {left}."
        )
    if asked is None:
        fallback = rules.defaults.get("max_tokens", left)
        asked = fallback if request.endpoint == "chat" else min(_COMPLETION_MAX_TOKENS, left)
    return min(left, asked, rules.max_tokens_cap or left)


def _asked(request: GenerationRequest) -> int | None:
    newer = request.body.get("max_completion_tokens")
    return newer if newer is not None else request.body.get("max_tokens")


def _logprobs(request: GenerationRequest) -> int | None:
    """How many candidates a step; 0 is only the chosen token, None is nothing."""
    wanted = request.body.get("logprobs")
    if request.endpoint == "completion":
        return None if wanted is None or wanted is False else int(wanted)
    return (request.body.get("top_logprobs") or 0) if wanted else None


def _structured(response_format: Mapping[str, Any] | None) -> Any:
    kind = (response_format or {}).get("type", "text")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "json_schema":
        return StructuredOutputsParams(json=response_format["json_schema"]["schema"])
    raise ValueError(f"response_format: type {kind!r} is not supported")
