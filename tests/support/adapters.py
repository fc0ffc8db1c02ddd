"""Adapters built by code for the demo's base model: right ones to start from, to be spoiled."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import save_file

from core.adapter_rules import BaseFacts

PREFIX = "base_model.model.model"
LAYERS, WIDTH, VOCABULARY = 30, 576, 49152
#: module -> (out, in)
LINEAR = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
ATTENTION = tuple(LINEAR)[:4]
#: What `workers.engine.base_facts` finds of that model (tests/engine compares).
SMOLLM = BaseFacts(
    name="SmolLM2-135M-Instruct",
    modules={
        "model.embed_tokens": (VOCABULARY, WIDTH),
        **{f"model.layers.{n}.{m}": shape for n in range(LAYERS) for m, shape in LINEAR.items()},
        "lm_head": (VOCABULARY, WIDTH),
    },
    vocab_size=VOCABULARY,
    max_lora_rank=64,
    tokenizer_size=VOCABULARY,
)

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Draft:
    """An adapter not yet written. The weights are random and strong enough to change answers."""

    rank: int = 4
    modules: Iterable[str] = ATTENTION
    layers: Iterable[int] = range(LAYERS)
    seed: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    tensors: Arrays = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    ranks: Callable[[str], int | None] = lambda _: None

    def __post_init__(self) -> None:
        self.config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "SmolLM2-135M-Instruct",
            "r": self.rank,
            "lora_alpha": 2 * self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": sorted({name.split(".")[-1] for name in self.modules}),
        } | self.config
        random = np.random.default_rng(self.seed)
        for layer in self.layers:
            for module in self.modules:
                name = f"layers.{layer}.{module}"
                out, into = LINEAR[module]
                rank = self.ranks(name) or self.rank
                self.tensors |= pair(f"{PREFIX}.{name}", random, rank, into, out)

    def having(self, **config: Any) -> Self:
        """Other fields in adapter_config.json."""
        self.config |= config
        return self

    def lacking(self, *fields: str) -> Self:
        """Without fields in adapter_config.json."""
        for name in fields:
            del self.config[name]
        return self

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same tensors under other names."""
        self.tensors = {rename(name): array for name, array in self.tensors.items()}
        return self

    def typed(self, dtype: Any) -> Self:
        """The same tensors in another type."""
        self.tensors = {name: array.astype(dtype) for name, array in self.tensors.items()}
        return self

    def write(self, folder: Path) -> Path:
        """Write the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


def pair(module: str, random: Any, rank: int, into: int, out: int) -> Arrays:
    """A module's two tensors."""
    return {
        f"{module}.lora_A.weight": random.normal(0, 0.05, (rank, into)).astype(np.float32),
        f"{module}.lora_B.weight": random.normal(0, 0.05, (out, rank)).astype(np.float32),
    }


def raw_safetensors(entries: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file as told, right or wrong."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data
