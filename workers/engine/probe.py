"""The probe of a loaded adapter: does it do anything?

An adapter whose weights meet no module loads without a word and answers as the base model does. So
the base model, the adapter and the base model once more look at one fixed prompt, and the
probabilities of the next token are compared. What the two runs of the base differ by is noise.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Final

from core.generation import Aborted, Completion, Failure, GenerationRequest, Outcome
from db.safetensors_file import read_header
from workers.engine.protocol import (
    AdapterLoadError,
    Done,
    EngineDead,
    EngineRequest,
    LocalAdapter,
    ProbeResult,
)

#: Token ids, so that no tokenizer is needed; which ones does not matter.
PROMPT: Final = list(range(100, 132))
#: Candidates whose probabilities are compared. OpenAI's most, and so every engine's least.
_TOP: Final = 5
#: How many times the noise a difference must be.
_CLEAR: Final = 2.0

_numbers = itertools.count(1)
Submit = Callable[[Sequence[EngineRequest], Done], None]


async def probe(submit: Submit, adapter: LocalAdapter) -> ProbeResult:
    """Compare an adapter with its base model; three tokens are made.

    Args:
        submit: the engine's.

    Raises:
        AdapterLoadError: the engine answers for the base model, and not with the adapter.
        EngineDead: the engine ended meanwhile.
    """
    number = next(_numbers)
    # of one step as far as can be: the same kernels on the same batch
    requests = [
        _request(f"probe-{number}-{place}", who) for place, who in enumerate((None, adapter, None))
    ]
    base, adapted, again = await _ask(submit, requests)
    if isinstance(base, Failure) or isinstance(again, Failure):
        failure = base if isinstance(base, Failure) else again
        assert isinstance(failure, Failure)
        return ProbeResult(None, note=f"not compared with the base model: {failure.message}")
    if isinstance(adapted, Failure):
        raise AdapterLoadError(f"the engine cannot generate with it: {adapted.message}")
    assert isinstance(adapted, Completion)
    noise, difference = distance(base, again), distance(base, adapted)
    return ProbeResult(difference > _CLEAR * noise, difference)


def distance(one: Completion, other: Completion) -> float:
    """The largest difference of a candidate's log probability in the first step.

    A candidate that one of them lacks counts as the least likely that it lists.
    """
    first, second = _candidates(one), _candidates(other)
    least = min([*first.values(), *second.values()], default=0.0)
    names = first.keys() | second.keys()
    gaps = [abs(first.get(name, least) - second.get(name, least)) for name in names]
    return max(gaps, default=0.0)


def memory_bytes(adapter: LocalAdapter, dtype_bytes: int) -> int:
    """What an adapter's weights take in memory, in the model's own number type. Blocking."""
    places = read_header(Path(adapter.path) / "adapter_model.safetensors")
    return sum(prod(place.info.shape) for place in places.values()) * dtype_bytes


def _candidates(completion: Completion) -> dict[bytes | str, float]:
    steps = completion.choices[0].logprobs or ()
    if not steps:
        return {}
    step = steps[0]
    return {(one.raw or one.token): one.logprob for one in (*step.top, step.chosen)}


def _request(request_id: str, adapter: LocalAdapter | None) -> EngineRequest:
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": _TOP, "seed": 1}
    generation = GenerationRequest("completion", body)
    # a salt of its own: a prompt out of the prefix cache would be computed differently
    return EngineRequest(request_id, generation, adapter, request_id)


async def _ask(submit: Submit, requests: Sequence[EngineRequest]) -> list[Completion | Failure]:
    outcomes: dict[str, Outcome] = {}
    answered = asyncio.get_running_loop().create_future()

    def done(request: EngineRequest, outcome: Outcome) -> None:
        outcomes[request.request_id] = outcome
        if len(outcomes) == len(requests) and not answered.done():
            answered.set_result(None)

    submit(requests, done)
    await answered
    found = [outcomes[request.request_id] for request in requests]
    for outcome in found:
        if isinstance(outcome, Aborted):
            raise EngineDead("the engine ended during the probe")
    return [outcome for outcome in found if not isinstance(outcome, Aborted)]
