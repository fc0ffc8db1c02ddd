"""Engines, started once per session, and adapters small enough to be made on the spot."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from platformdirs import user_cache_path
from safetensors.numpy import save_file

from cli.demo.base import ensure_base
from workers.engine.protocol import Engine, LocalAdapter
from workers.engine.selection import EngineName, build_engine

_RANK = 8
# SmolLM2-135M: attention's width in, width out
_SHAPES = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)}


@pytest.fixture(scope="session")
def base_model() -> Path:
    """The folder of the demo's base model, where `lorry up` keeps it too."""
    return ensure_base(user_cache_path("lorry"), print)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[LocalAdapter]:
    """Three adapters with random weights, strong enough to change what the model says."""
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(root / f"a{number}", number) for number in (1, 2, 3)]


@pytest_asyncio.fixture(scope="session")
async def vllm_engine(base_model: Path) -> AsyncIterator[Engine]:
    """One real engine for the whole session: it takes half a minute to start."""
    engine = build_engine(EngineName.VLLM, str(base_model), ["--max-model-len", "1024"])
    await engine.start()
    yield engine
    await engine.close()


def write_adapter(
    folder: Path, number: int, *, rank: int = _RANK, layers: int = 30
) -> LocalAdapter:
    """Write a LoRA adapter for the demo's base model, its weights drawn from `number`."""
    random = np.random.default_rng(number)
    weights = {}
    for layer in range(layers):
        for module, (width_in, width_out) in _SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            a = random.normal(0, 0.05, (rank, width_in))
            b = random.normal(0, 0.05, (width_out, rank))
            weights[f"{key}.lora_A.weight"] = a.astype(np.float32)
            weights[f"{key}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "SmolLM2-135M-Instruct",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(_SHAPES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return LocalAdapter(number, f"{number}-test{number}", str(folder), f"test{number}")
