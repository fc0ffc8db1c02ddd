"""What the GPU benchmarks run: an 8B-shaped model with random weights, random rank-16 adapters,
and requests whose lengths are spread as real ones are.

Random weights measure speed and never quality.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

RANK = 16
LAYERS = 32
HIDDEN, KEY_VALUE, INTERMEDIATE, VOCABULARY = 4096, 1024, 14336, 128256
CONTEXT = 2048

#: Flags of the engine, the same for the bare engine and for Lorry.
ENGINE_FLAGS = (
    "--load-format", "dummy",
    "--skip-tokenizer-init",
    "--max-model-len", str(CONTEXT),
    "--max-num-seqs", "256",
    "--gpu-memory-utilization", "0.85",
    "--no-enable-prefix-caching",
    "--max-lora-rank", str(RANK),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """One request: prompt token ids, and how many tokens to make."""

    prompt: list[int]
    output_tokens: int


def requests(count: int, seed: int = 1) -> list[Work]:
    """Prompts of 64 to 383 tokens, outputs log-normal with median ~120 and a tail to 768."""
    rng = random.Random(seed)
    work = []
    for _ in range(count):
        output = max(16, min(768, int(rng.lognormvariate(4.8, 0.7))))
        prompt = [rng.randrange(10, 120_000) for _ in range(rng.randrange(64, 384))]
        work.append(Work(prompt, output))
    return work


def make_model(folder: Path) -> Path:
    """Write the configuration of an 8B-shaped Llama; its weights are made up at load."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapters(folder: Path, count: int) -> list[Path]:
    """Write random adapters on every linear layer, 84 MB each; those that are there stay."""
    import torch
    from safetensors.torch import save_file

    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, KEY_VALUE),
        "self_attn.v_proj": (HIDDEN, KEY_VALUE),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
        "mlp.up_proj": (HIDDEN, INTERMEDIATE),
        "mlp.down_proj": (INTERMEDIATE, HIDDEN),
    }
    generator = torch.Generator().manual_seed(0)
    folders = [folder / f"a{number}" for number in range(count)]
    for target in folders:
        if (target / "adapter_model.safetensors").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for layer in range(LAYERS):
            for name, (inputs, outputs) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{name}"
                a = torch.randn(RANK, inputs, generator=generator) * 0.01
                b = torch.randn(outputs, RANK, generator=generator) * 0.01
                tensors[f"{key}.lora_A.weight"] = a.bfloat16()
                tensors[f"{key}.lora_B.weight"] = b.bfloat16()
        save_file(tensors, target / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "bias": "none",
            "task_type": "CAUSAL_LM",
            "target_modules": sorted(name.split(".")[1] for name in shapes),
            "base_model_name_or_path": "random",
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
        }
        (target / "adapter_config.json").write_text(json.dumps(config))
    return folders
