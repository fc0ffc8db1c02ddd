"""What a started vLLM has settled: what it holds, how it samples, and what its model is."""

from dataclasses import dataclass
from typing import Any, Self

from workers.engine.protocol import EngineLimits
from workers.engine.vllm_params import Decoding, SamplingRules


@dataclass(frozen=True, slots=True)
class VllmFacts:
    """What does not change while an engine lives.

    Args:
        limits: what it can hold.
        rules: how requests are sampled, by the rules of `vllm serve`.
        vocab_size: tokens of the model.
        dtype_bytes: bytes of one number of the model, and so of an adapter in memory.
        hub_revision: the commit that a model from a hub was loaded at.
        fold_refusal: why a model of this kind is not folded; None if that is not known.
    """

    limits: EngineLimits
    rules: SamplingRules
    vocab_size: int
    dtype_bytes: int
    hub_revision: str | None
    fold_refusal: str | None

    @classmethod
    def of(cls, config: Any, decoding: Decoding, extra_slots: int) -> Self:
        """Read them off a `VllmConfig`.

        Args:
            decoding: as `SamplingRules` has it.
            extra_slots: slots that are not for adapters.
        """
        model = config.model_config
        return cls(
            limits=_limits(config, extra_slots),
            rules=_rules(model, decoding),
            vocab_size=model.get_vocab_size(),
            dtype_bytes=int(model.dtype.itemsize),
            hub_revision=getattr(model.hf_config, "_commit_hash", None),
            fold_refusal=_fold_refusal(model),
        )


def _limits(config: Any, extra_slots: int) -> EngineLimits:
    lora, cache = config.lora_config, config.cache_config
    return EngineLimits(
        max_model_len=config.model_config.max_model_len,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_loras=lora.max_loras - extra_slots if lora else 0,
        max_lora_rank=lora.max_lora_rank if lora else 0,
        cache_tokens=(cache.num_gpu_blocks or 0) * (cache.block_size or 0),
        max_cpu_loras=(lora.max_cpu_loras or 0) - extra_slots if lora else 0,
    )


def _rules(model: Any, decoding: Decoding) -> SamplingRules:
    defaults = model.get_diff_sampling_param()
    # A cap is only what the operator set, not what the model's own config suggests.
    if model.generation_config in ("auto", "vllm"):
        cap = (model.override_generation_config or {}).get("max_new_tokens")
    else:
        cap = defaults.get("max_tokens")
    return SamplingRules(
        max_model_len=model.max_model_len,
        defaults=defaults,
        max_tokens_cap=cap,
        decoding=decoding,
    )


def _fold_refusal(model: Any) -> str | None:
    if getattr(model, "use_mla", False):
        return "the model computes with weights that are derived from its own (MLA)"
    if getattr(model, "has_inner_state", False):
        return "the model keeps a state beside its KV cache"
    if getattr(model, "is_encoder_decoder", False):
        return "the model has an encoder of its own"
    return None
