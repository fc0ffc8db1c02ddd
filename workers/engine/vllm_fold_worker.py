"""The fold inside vLLM's worker processes, one on each rank: `--worker-extension-cls`.

While an adapter X is folded, its requests stay what they are, requests with LoRA X. The model
runner is told that no adapter is active, so that it takes the base model's kernels and CUDA graphs;
and a step that holds any other request than X's raises, which ends the engine.
"""

import time
from typing import Any

import torch

from workers.engine.vllm_fold_weights import CannotFold, Copy, FoldWeights, gpu_bytes_left


class FoldExtension:
    """Methods that `collective_rpc` finds on a worker. vLLM mixes them into its own class."""

    def lorry_fold_prepare(self, copy: Copy) -> dict[str, Any]:
        """Make ready to fold, while nothing runs and nothing is folded.

        Returns:
            `refused`, why this engine does not fold, or `gpu_bytes` and `host_bytes` of the copy
            and the `seconds` it took, and `restore_seconds`, what restoring all of it takes.
        """
        try:
            fold: _Fold = getattr(self, "_lorry_fold", None) or _Fold(self)
            made: dict[str, Any] = fold.weights.copy(copy, lambda: gpu_bytes_left(self))
            made["restore_seconds"] = fold.weights.rehearse()
        except CannotFold as error:
            return {"refused": str(error)}
        self._lorry_fold = fold
        return made

    def lorry_fold(self, lora_int_id: int | None) -> dict[str, Any]:
        """Fold an adapter, or None: the base model's own weights.

        Returns:
            `refused`, why the adapter is not folded (nothing was changed), or the seconds spent:
            `restore` and `fold`.
        """
        fold: _Fold | None = getattr(self, "_lorry_fold", None)
        if fold is None:
            return {"refused": "folding was not prepared"}
        return fold.switch(lora_int_id)

    def lorry_fold_digest(self) -> str:
        """A fingerprint of the weights that folding touches, as they are now."""
        fold: _Fold = self._lorry_fold
        return str(fold.weights.digest())


class _Fold:
    """One rank's state. Raises CannotFold where the runner or the model is of an unknown kind."""

    def __init__(self, worker: Any) -> None:
        runner = worker.model_runner
        manager = getattr(getattr(runner, "lora_manager", None), "_adapter_manager", None)
        if manager is None:
            raise CannotFold("adapters are off (--no-enable-lora)")
        needed = ("modules", "lora_index_to_id", "get_adapter")
        if lacking := [name for name in needed if not hasattr(manager, name)]:
            raise CannotFold(f"this release of vLLM keeps adapters without {lacking[0]}")
        self.weights = FoldWeights(manager)
        #: the adapter that alone may compute
        self.only: int | None = None
        #: why nothing may compute any more
        self.broken: str | None = None
        _hide_adapters(runner, self)

    def switch(self, lora_int_id: int | None) -> dict[str, Any]:
        """Restore what is folded, then fold another. Raises what it fails of; then it is broken."""
        if self.broken:
            raise RuntimeError(self.broken)
        if lora_int_id is not None and (reason := self.weights.refusal(lora_int_id)):
            return {"refused": reason}
        self.broken = "the weights are between two adapters"
        started = time.perf_counter()
        self._settle()  # the steps issued before this one are not what is measured
        waited = time.perf_counter() - started
        restore = self.weights.restore()
        fold = 0.0 if lora_int_id is None else self.weights.fold(lora_int_id)
        self.only, self.broken = lora_int_id, None
        return {"restore": restore, "fold": fold, "waited": waited}

    def check(self, adapters: set[int]) -> None:
        """Raise if a step may not compute: no answer is better than a wrong one."""
        if self.broken:
            raise RuntimeError(f"folding went wrong: {self.broken}")
        if self.only is not None and adapters != {self.only}:
            raise RuntimeError(
                f"adapter {self.only} is folded into the base model, and a step came with "
                f"requests of {sorted(adapters)}"
            )

    @staticmethod
    def _settle() -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()


def _hide_adapters(runner: Any, fold: _Fold) -> None:
    """Tell a model runner that no adapter is active while one is folded.

    Both of vLLM's runners go through `_set_active_loras` in every step; they differ in where they
    count adapters to choose a CUDA graph.
    """
    activate = getattr(runner, "_set_active_loras", None)
    if activate is None:
        raise CannotFold(f"this release's {type(runner).__name__} has no _set_active_loras")
    if hasattr(runner, "lora_state"):
        _hide_in_lora_state(runner.lora_state, fold)
    elif hasattr(runner, "_determine_batch_execution_and_padding"):
        _hide_in_dispatch(runner, fold)
    else:
        raise CannotFold(f"this release's {type(runner).__name__} is not known")

    def set_active_loras(prompts: Any, tokens: Any, requests: Any, *rest: Any, **named: Any) -> Any:
        if fold.only is not None or fold.broken:
            fold.check({int(i) for i in set(prompts) | set(tokens)})
            # the requests stay, so that the folded adapter remains the last used one
            prompts, tokens = (0,) * len(prompts), (0,) * len(tokens)
        return activate(prompts, tokens, requests, *rest, **named)

    runner._set_active_loras = set_active_loras  # noqa: SLF001 - vLLM has no other place


def _hide_in_dispatch(runner: Any, fold: _Fold) -> None:
    """The first model runner counts adapters where it chooses a graph."""
    determine = runner._determine_batch_execution_and_padding  # noqa: SLF001
    code = determine.__func__.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if not {"force_has_lora", "force_num_active_loras"} <= set(names):
        raise CannotFold("this release's model runner cannot be told that no adapter is active")

    def without(*args: Any, **named: Any) -> Any:
        if fold.only is not None and named.get("force_num_active_loras") is None:
            named |= {"force_has_lora": False, "force_num_active_loras": 0}
        return determine(*args, **named)

    runner._determine_batch_execution_and_padding = without  # noqa: SLF001


def _hide_in_lora_state(state: Any, fold: _Fold) -> None:
    """The second model runner counts adapters in its `LoraState`."""
    count: Any = getattr(state, "get_activate_loras", None)
    make: Any = getattr(state, "make_lora_inputs", None)
    if not count or not make:
        raise CannotFold("this release's model runner cannot be told that no adapter is active")

    def get_activate_loras(req_ids: Any) -> Any:
        return set() if fold.only is not None else count(req_ids)

    def make_lora_inputs(req_ids: Any, *rest: Any) -> Any:
        prompts, tokens, _ = make(req_ids, *rest)
        return prompts, tokens, count(req_ids)

    state.get_activate_loras = get_activate_loras
    state.make_lora_inputs = make_lora_inputs
