"""vLLM on a CPU with the base weights left as they are, so that a CPU can test folding.

vLLM hands every base weight to oneDNN, which packs it into a form of its own, and has no flag
against it. This module is named as `--worker-extension-cls`, which vLLM's worker process imports
before it loads the model.
"""

from typing import Any

from vllm import _custom_ops

from workers.engine.vllm_worker import WorkerExtension

_custom_ops._supports_onednn = False


class UnpackedFold(WorkerExtension):
    """The fold as it is, imported from here."""


class FailingFold(WorkerExtension):
    """Fails at the fold of adapter 991, half-way; lets adapter 992 be folded as if it were 993."""

    def lorry_fold(self, lora_int_id: int | None) -> dict[str, Any]:
        fold = self._lorry_fold
        if lora_int_id == 991:
            broken = list(fold.weights._modules.values())[40]
            broken.layer.lora_b_stacked = broken.layer.lora_b_stacked[:1] * 9
        made = super().lorry_fold(lora_int_id)
        if lora_int_id == 992:
            fold.only = 993
        return made
