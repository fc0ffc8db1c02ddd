"""What the drain needs of an engine. The vLLM engine and the simulated one both pass
`tests/engine/contract.py`.

Requests stream in and out: `submit` returns at once, and every submitted request is answered
through `done` exactly once, aborted ones too. There is no call that waits for several requests:
such a call would be a barrier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from core.generation import GenerationRequest, Outcome

#: Where the copy of the base weights is kept that folding needs: as much on the GPU as fits and the
#: rest in the host's memory, or all of it in one of them.
FoldCopy = Literal["auto", "gpu", "host"]


class EngineDead(Exception):
    """The engine has died or was never started; nothing more will come out of it."""


class AdapterLoadError(Exception):
    """The engine refused an adapter; the engine itself lives on. The message says why."""


class FoldRefused(Exception):
    """The engine does not fold this adapter; nothing was changed. The message says why."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine was started with.

    Args:
        max_model_len: the context, in tokens, prompt and answer together.
        max_num_seqs: sequences that compute at once.
        max_loras: slots; 0 means that adapters are off.
        max_lora_rank: the highest rank an adapter may have.
        cache_tokens: tokens that the KV cache holds; 0 where that is not known.
        max_cpu_loras: adapters that the engine keeps in memory beside the slots; 0 where it has
            no such cache.
    """

    max_model_len: int
    max_num_seqs: int
    max_loras: int
    max_lora_rank: int
    cache_tokens: int = 0
    max_cpu_loras: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Who the engine is: kept on the worker's row and in every answer.

    Args:
        fold_refusal: why it folds no adapter; None if it can.
        fold_seconds: what restoring the base took when it was tried at the start; 0 where that
            is not known.
    """

    name: str
    version: str
    base_model: str
    base_revision: str
    limits: EngineLimits
    fold_refusal: str | None = "this engine does not fold"
    fold_seconds: float = 0.0


class FoldTimes(NamedTuple):
    """What one change of the base weights took, in seconds.

    Args:
        restore: making them the base's again.
        fold: adding the adapter.
        pause: all of it, for which the engine stood still.
    """

    restore: float
    fold: float
    pause: float


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """One adapter version whose verified files lie on the local disk.

    Args:
        lora_int_id: the version's id from Postgres, at least 1.
        lora_name: `<lora_int_id>-<sha256>`: vLLM keys its prefix cache by it.
        path: absolute path of the verified folder.
        sha256: the content address.
    """

    lora_int_id: int
    lora_name: str
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What an adapter does to a fixed prompt.

    Args:
        differs: whether the next token's probabilities are other than the base model's, by more
            than two runs of the base differ. None where that cannot be told; `note` says why.
        difference: the largest change of a logarithm of a probability, or None.
        memory_bytes: what its weights take in the engine's memory, or None where not known.
        note: for the operator; empty where there is nothing to add.
    """

    differs: bool | None
    difference: float | None = None
    memory_bytes: int | None = None
    note: str = ""


class EngineRequest(NamedTuple):
    """One request on its way into the engine.

    Args:
        request_id: unique in this process (job and attempt).
        generation: endpoint and body.
        adapter: a loaded adapter, or None for the base model.
        cache_salt: the tenant; prefix-cache entries never cross it.
    """

    request_id: str
    generation: GenerationRequest
    adapter: LocalAdapter | None
    cache_salt: str


Done = Callable[[EngineRequest, Outcome], None]


class Engine(Protocol):
    """One long-lived engine, used from the event loop that started it."""

    @property
    def info(self) -> EngineInfo:
        """Available once started."""
        ...

    async def start(self) -> None:
        """Load the base model. Raises whatever the engine raises; nothing is left running."""
        ...

    async def load_adapter(self, adapter: LocalAdapter) -> None:
        """Make an adapter resident in a slot. Idempotent.

        The caller keeps the adapters with unfinished requests below `max_loras`: loading another
        evicts the least recently used slot, in use or not.

        Raises:
            AdapterLoadError: the adapter cannot be used; the engine lives on.
            EngineDead: the engine has died.
        """
        ...

    def read_ahead(self, adapters: Sequence[LocalAdapter]) -> None:
        """Read these into memory while the engine computes, so that their loads are short.

        Returns at once. What was named before and is not named now is forgotten. An adapter that
        cannot be read is left to its load. An engine may pass over it.
        """
        ...

    async def remove_adapter(self, lora_int_id: int) -> None:
        """Let a resident adapter go; its slot is free again. Unknown ids are ignored."""
        ...

    async def probe_adapter(self, adapter: LocalAdapter) -> ProbeResult:
        """Compare a loaded adapter with the base model on a fixed prompt, beside other requests.

        Raises:
            AdapterLoadError: the engine cannot generate with it; the engine lives on.
            EngineDead: the engine has died.
        """
        ...

    async def pin_adapter(self, lora_int_id: int) -> None:
        """Keep a resident adapter in its slot, whatever else is loaded. Idempotent.

        Raises:
            AdapterLoadError: it is not resident, or every slot would be pinned.
            EngineDead: the engine has died.
        """
        ...

    async def fold(self, lora_int_id: int | None) -> FoldTimes:
        """Add a resident adapter into the base weights, or, with None, restore them.

        While an adapter is folded only its requests compute, at the speed of the base model. All
        others wait in the engine, where they are, and go on afterwards; none is answered
        differently for it. Folding another adapter restores the base in between.

        Raises:
            FoldRefused: this adapter, or this engine, is not folded; nothing was changed.
            EngineDead: the engine has died; also where the change went wrong half-way.
        """
        ...

    def submit(self, requests: Sequence[EngineRequest], done: Done) -> None:
        """Feed requests; `done` is called on the event loop, once for each, in any order."""
        ...

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stop requests; each is answered with `Aborted` (or with what it had just finished)."""
        ...

    def progress(self) -> int:
        """A count that rises whenever the engine's core has done work: tokens made so far."""
        ...

    def made(self) -> int:
        """Tokens of answers made so far; it only rises."""
        ...

    @property
    def running(self) -> int:
        """Submitted requests that are not answered yet."""
        ...

    async def wait_dead(self) -> str:
        """Return, with the reason, when the engine has died."""
        ...

    async def close(self) -> None:
        """Stop the engine and every process of it. Idempotent."""
        ...
