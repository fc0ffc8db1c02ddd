"""A tensor's name taken apart as vLLM does (`parse_fine_tuned_lora_name`)."""

from typing import NamedTuple

PREFIX = "base_model.model."
#: Of a tensor's name. Patterns are matched against it, which takes time that grows with its cube.
LONGEST = 256
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_BASE_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


class Half(NamedTuple):
    """One half of a module's LoRA pair.

    Args:
        module: as PEFT names it, without the prefix.
        side: "A" or "B".
        embedding: whether it is written for an embedding (`lora_embedding_A`).
    """

    module: str
    side: str
    embedding: bool


def parse(name: str) -> Half | None:
    """What a tensor is, or None for a name that vLLM does not take."""
    parts = name.removeprefix(PREFIX).split(".")
    if parts[-1] == "weight" and len(parts) > 2 and parts[-2] in ("lora_A", "lora_B"):
        return Half(".".join(parts[:-2]), parts[-2][-1], embedding=False)
    if len(parts) > 1 and parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        return Half(".".join(parts[:-1]), parts[-1][-1], embedding=True)
    return None


def endings(module: str) -> list[str]:
    """What `target_modules` may say for a module: its name's last parts, up to all of them."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def is_embedding(module: str) -> bool:
    """Whether a module is one that PEFT adapts with `lora_embedding_A`."""
    return module.rsplit(".", 1)[-1] in _EMBEDDINGS


def is_base_copy(name: str) -> bool:
    """Whether a tensor is the base's own embedding, saved along by PEFT; vLLM skips it."""
    return name.endswith(_BASE_COPIES)


def of_vocabulary(name: str) -> bool:
    """Whether a tensor or module has a row for each token."""
    parts = name.split(".")
    return any(part in _EMBEDDINGS or part == "lm_head" for part in parts)


def has_experts(module: str) -> bool:
    """Whether a module is of experts, whose tensors PEFT and vLLM stack in several ways."""
    return ".experts" in module
