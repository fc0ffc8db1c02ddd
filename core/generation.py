"""What a request to the engine and its outcome are, whatever engine runs them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from core.errors import ErrorCode

Endpoint = Literal["chat", "completion"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate token with its natural-log probability."""

    token: str
    logprob: float
    raw: bytes = b""


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """The chosen token of one step and the likeliest candidates, best first."""

    chosen: TokenLogprob
    top: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a job's `n` answers. `token_ids` stands in where no tokenizer gave a text."""

    text: str
    finish_reason: FinishReason
    token_ids: Sequence[int] | None = None
    logprobs: Sequence[StepLogprobs] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation; token counts are summed over the choices."""

    choices: Sequence[Choice]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that the engine could not answer, through its own doing or not.

    Args:
        code: what the job's `error.code` becomes.
        message: for the user: what was wrong and what to do.
    """

    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """A request that ended because it was aborted: nothing is to be recorded for it."""


Outcome = Completion | Failure | Aborted


@dataclass(frozen=True, slots=True)
class Provenance:
    """What an answer was made by, kept with it so that it can be made again."""

    engine: str
    engine_version: str
    base_model: str
    base_revision: str
    adapter_sha256: str | None = None
    seed: int | None = None


class GenerationRequest(NamedTuple):
    """The part of a job that the engine needs.

    Args:
        endpoint: which OpenAI endpoint's body `body` is.
        body: the validated body, JSON values only, without Lorry's own fields.
    """

    endpoint: Endpoint
    body: Mapping[str, Any] = MappingProxyType({})
