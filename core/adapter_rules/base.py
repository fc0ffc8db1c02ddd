"""What is known of a base model and of an adapter's tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self


class TensorInfo(NamedTuple):
    """A tensor as the header of its safetensors file tells it, such as `("BF16", (8, 576))`."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What a base model can take.

    Args:
        name: outside, as jobs say it.
        modules: name as PEFT writes it (`model.layers.0.self_attn.q_proj`) to its weight's shape,
            (out, in); of an embedding, (vocabulary, width). None where it is not known (GGUF,
            packed quantisation, experts): then the worker's probe decides.
        vocab_size: rows of the embedding, or None.
        max_lora_rank: the highest rank that a worker of this base takes, or None.
        tokenizer_size: one more than the highest token id of the base's tokenizer, or None.
    """

    name: str
    modules: Mapping[str, tuple[int, int]] | None
    vocab_size: int | None
    max_lora_rank: int | None
    tokenizer_size: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The facts as values that JSON has."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The facts out of what `as_json` gave."""
        modules = values["modules"]
        if modules is not None:
            modules = {name: (out, into) for name, (out, into) in modules.items()}
        return cls(**{**values, "modules": modules})
