"""Which engine a worker runs, by name. vLLM is imported only when it is the one."""

from collections.abc import Sequence
from enum import StrEnum

from workers.engine.protocol import Engine, FoldCopy


class EngineName(StrEnum):
    """The engines a worker can hold. The simulated one is for queue and fault tests only."""

    VLLM = "vllm"
    SIMULATED = "simulated"


def build_engine(
    name: EngineName,
    model: str,
    flags: Sequence[str],
    *,
    fold: bool = False,
    fold_copy: FoldCopy = "auto",
) -> Engine:
    """An engine that is not started yet.

    Args:
        name: which engine.
        model: a local folder or a model name, as `vllm serve` takes it.
        flags: the engine's own command-line flags.
        fold: whether it may fold adapters into the base's weights.
        fold_copy: where the copy of the base's weights is kept that folding needs.

    Raises:
        UsageError: a flag or the model is not usable; the message says which and why.
    """
    if name is EngineName.SIMULATED:
        from workers.engine.simulated import SimulatedEngine

        return SimulatedEngine.from_flags(model, flags, fold=fold)
    from workers.engine.vllm_engine import VllmEngine

    return VllmEngine.from_flags(model, flags, fold=fold, fold_copy=fold_copy)
