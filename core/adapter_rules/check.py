"""The admission rules together."""

from collections.abc import Mapping

from core.adapter_rules.base import BaseFacts, TensorInfo
from core.adapter_rules.config import AdapterConfig
from core.adapter_rules.findings import Finding
from core.adapter_rules.methods import unsupported
from core.adapter_rules.tensors import wrong_tensors

#: What vLLM's `--max-lora-rank` takes.
RANK_STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def check(
    config: AdapterConfig, tensors: Mapping[str, TensorInfo], base: BaseFacts | None
) -> list[Finding]:
    """Everything that keeps an adapter from being served.

    Args:
        tensors: by name, as the safetensors header has them.
        base: None where nothing is known of the base; then the rules that need it do not apply.
    """
    return [
        *unsupported(config.fields),
        *_rank(config, base),
        *_tokenizer(config, base),
        *wrong_tensors(config, tensors, base),
    ]


def hints(config: AdapterConfig, base: BaseFacts) -> list[Finding]:
    """What its owner may want to know and what stops nothing.

    A base is named by a hub's name, a path on the trainer's disk or a quantised copy's name, so
    shapes decide and the name only hints.
    """
    trained, served = _last_part(config.base_model or ""), _last_part(base.name)
    if not trained or trained == served:
        return []
    return [
        Finding(
            "base_name",
            f"base_model_name_or_path is {config.base_model!r}, and the base here is "
            f"{base.name!r}: the shapes fit, so it is taken; make sure that it is the same model",
        )
    ]


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].casefold()


def rank_step(rank: int) -> int | None:
    """The least that `--max-lora-rank` takes for a rank, or None where nothing does."""
    return next((step for step in RANK_STEPS if step >= rank), None)


def _rank(config: AdapterConfig, base: BaseFacts | None) -> list[Finding]:
    limit, rank = (base.max_lora_rank if base else None), config.highest_rank
    if limit is None or rank <= limit:
        return []
    enough = rank_step(rank)
    remedy = f"retrain with r ≤ {limit}"
    remedy += f", or start workers with `--max-lora-rank {enough}`" if enough else ""
    where = "r" if rank == config.rank else "rank_pattern's highest rank"
    return [
        Finding(
            "rank_too_high",
            f"{where} is {rank}, and the workers of this base take ranks up to {limit}: {remedy}",
        )
    ]


def _tokenizer(config: AdapterConfig, base: BaseFacts | None) -> list[Finding]:
    known = (base.tokenizer_size or base.vocab_size) if base else None
    found = config.tokenizer_size
    if known is None or found is None or found <= known:
        return []
    return [
        Finding(
            "vocabulary_growth",
            f"the adapter's tokenizer has {found} tokens, expected at most the base's {known}: "
            "prompts are split by the base's tokenizer, which knows no added tokens. Retrain "
            "without adding tokens, or leave the tokenizer files out if training never used them",
        )
    ]
