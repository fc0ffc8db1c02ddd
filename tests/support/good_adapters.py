"""Adapters as people bring them: every one is accepted, loads and changes the answer."""

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.adapters import LINEAR, PREFIX, VOCABULARY, WIDTH, Draft, pair, raw_safetensors

#: What PEFT 0.10 wrote beside the fields of every draft.
_PEFT_0_10: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "rank_pattern": {},
    "revision": None,
    "use_dora": False,
    "use_rslora": False,
}
_PEFT_0_21 = _PEFT_0_10 | {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "kasa_config": None,
    "lora_bias": False,
    "lora_ga_config": None,
    "monteclora_config": None,
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def _llama_factory(folder: Path) -> Path:
    draft = Draft(modules=LINEAR, config=_PEFT_0_10)
    draft.files = {
        "README.md": b"---\nlibrary_name: peft\n---\n",
        "all_results.json": b'{"train_loss": 0.4}',
        "training_args.bin": b"\x80\x02never read",
        "trainer_log.jsonl": b"{}\n",
        "training_loss.png": b"\x89PNG",
        "checkpoint-50/adapter_config.json": b"{}",
        "checkpoint-50/optimizer.pt": b"\x80\x02never read either",
        "tokenizer_config.json": json.dumps({"chat_template": _TEMPLATE}).encode(),
        "special_tokens_map.json": b'{"eos_token": "<|im_end|>"}',
    }
    return draft.write(folder)


def _patterns(folder: Path) -> Path:
    ranks = {"q_proj": 8, r"layers\.[0-9]+\.self_attn\.v_proj": 2}

    def rank_of(name: str) -> int | None:
        return 8 if name.endswith("q_proj") else 2 if name.endswith("v_proj") else None

    patterns = {"rank_pattern": ranks, "alpha_pattern": {"q_proj": 24.5}}
    return Draft(config=_PEFT_0_21 | patterns, ranks=rank_of).write(folder)


def _eva(folder: Path) -> Path:
    """EVA names each module whose rank it changed."""
    changed = {f"model.layers.{n}.self_attn.q_proj": 3 for n in range(10)}
    draft = Draft(ranks=lambda name: changed.get(f"model.{name}"))
    draft.having(init_lora_weights="eva", eva_config={"rho": 2.0}, rank_pattern=changed)
    return draft.write(folder)


def _bfloat16(folder: Path) -> Path:
    draft = Draft()
    header, data = {}, b""
    for name, array in draft.tensors.items():
        upper = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        offsets = [len(data), len(data) + len(upper)]
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": offsets}
        data += upper
    draft.write(folder)
    (folder / "adapter_model.safetensors").write_bytes(raw_safetensors(header, data))
    return folder


def _pickled(folder: Path) -> Path:
    import torch

    draft = Draft()
    draft.write(folder)
    (folder / "adapter_model.safetensors").unlink()
    tensors = {name: torch.from_numpy(array) for name, array in draft.tensors.items()}
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


def _head(folder: Path) -> Path:
    draft = Draft(layers=range(4), modules=["self_attn.q_proj"])
    draft.tensors |= pair("base_model.model.lm_head", np.random.default_rng(5), 4, 576, VOCABULARY)
    return draft.having(target_modules=["q_proj", "lm_head"]).write(folder)


def _embedding() -> Draft:
    draft = Draft(layers=range(4), modules=["self_attn.q_proj"])
    random = np.random.default_rng(6)
    embedding = f"{PREFIX}.embed_tokens"
    draft.tensors |= {
        f"{embedding}.lora_embedding_A": random.normal(0, 0.2, (4, VOCABULARY)).astype(np.float32),
        f"{embedding}.lora_embedding_B": random.normal(0, 0.2, (WIDTH, 4)).astype(np.float32),
    }
    return draft.having(target_modules=["q_proj", "embed_tokens"])


def _embedding_copied(folder: Path) -> Path:
    """PEFT saves the base's own embedding along where that is a target; vLLM passes over it."""
    draft = _embedding()
    copied = np.zeros((VOCABULARY, WIDTH), np.float16)
    draft.tensors[f"{PREFIX}.embed_tokens.base_layer.weight"] = copied
    return draft.write(folder)


def _tarred(folder: Path) -> Path:
    inside = Draft(config=_PEFT_0_21, files={"README.md": b"#"}).write(folder / "my-run")
    with tarfile.open(folder / "adapter.tar.gz", "w:gz") as archive:
        archive.add(inside, "my-run")
    shutil.rmtree(inside)
    return folder / "adapter.tar.gz"


def _zipped_on_a_mac(folder: Path) -> Path:
    inside = Draft(config=_PEFT_0_21).write(folder / "my run")
    with zipfile.ZipFile(folder / "adapter.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("my run/", b"")
        archive.writestr("__MACOSX/my run/._adapter_config.json", b"\0\5\x16\7")
        archive.writestr("my run/.DS_Store", b"\0\0\0\1Bud1")
        for path in inside.iterdir():
            archive.write(path, f"my run/{path.name}")
    shutil.rmtree(inside)
    return folder / "adapter.zip"


def _drafted(config: dict[str, Any] | None = None, **draft: Any) -> Callable[[Path], Path]:
    return lambda folder: Draft(config=config or {}, **draft).write(folder)


GOOD: dict[str, Callable[[Path], Path]] = {
    "PEFT 0.10": _drafted(_PEFT_0_10),
    "PEFT 0.21": _drafted(_PEFT_0_21),
    "LLaMA-Factory": _llama_factory,
    "rsLoRA": _drafted({"use_rslora": True, "lora_alpha": 8}),
    "target_modules as a regex": _drafted(
        {"target_modules": r".*layers\.\d+\.self_attn\.[qkvo]_.*"}
    ),
    "all-linear": _drafted({"target_modules": "all-linear"}, modules=LINEAR),
    "rank_pattern and alpha_pattern": _patterns,
    "EVA": _eva,
    "some layers": _drafted({"layers_to_transform": [3, 4, 5]}, layers=range(3, 6), rank=8),
    "one module": _drafted({"exclude_modules": ["k_proj"]}, modules=["self_attn.v_proj"], rank=8),
    "a checkpoint": _drafted(
        {"inference_mode": False, "task_type": None, "auto_mapping": {"parent_library": "x"}}
    ),
    "a path as its base": _drafted({"base_model_name_or_path": "/data/models/SmolLM2-Instruct/"}),
    "float16": lambda folder: Draft().typed(np.float16).write(folder),
    "bfloat16": _bfloat16,
    "a float alpha": _drafted({"lora_alpha": 6.5}),
    "an own chat template": _drafted(files={"chat_template.jinja": _TEMPLATE.encode()}),
    "names without PEFT's prefix": lambda folder: (
        Draft().renamed(lambda name: name.removeprefix("base_model.model.")).write(folder)
    ),
    "lm_head": _head,
    "embed_tokens": lambda folder: _embedding().write(folder),
    "embed_tokens with a copy": _embedding_copied,
    "rank 64": _drafted(rank=64, layers=range(4)),
    "adapter_model.bin": _pickled,
    ".tar.gz": _tarred,
    ".zip": _zipped_on_a_mac,
}
