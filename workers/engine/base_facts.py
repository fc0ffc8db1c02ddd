"""What a base model's files say an adapter may be, read from headers alone: no torch, no weights.

PEFT names modules as transformers builds them, which for text-only models is how the checkpoint
names them too. Where that is not sure (experts, several modalities, packed weights, GGUF) the
modules are left out, and the worker's probe decides.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.adapter_rules import BaseFacts
from db.safetensors_file import BadSafetensors, read_header

_WEIGHT = ".weight"
_WHOLE_NUMBERS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
#: Weights that keep one number for each of the base's.
_UNPACKED = ("fp8", "fbgemm_fp8")
#: Their linear layers are transposed (transformers' Conv1D).
_TRANSPOSED = ("gpt2", "gpt_bigcode", "openai-gpt", "imagegpt", "decision_transformer")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def base_facts(
    model: str, name: str, max_lora_rank: int | None, revision: str | None = None
) -> BaseFacts | None:
    """The facts of a base model. Blocking, for milliseconds.

    Args:
        model: a local folder, or the name of a model in the local Hugging Face cache.
        name: what jobs call it.
        max_lora_rank: of the worker, or None where adapters are off.
        revision: of a model from a hub.

    Returns:
        None where not even its config.json can be read.
    """
    folder = _folder(model, revision)
    config = _read(folder / "config.json") if folder else None
    if folder is None or config is None:
        return None
    vocab_size = config.get("vocab_size")
    return BaseFacts(
        name=name,
        modules=_modules(folder, config),
        vocab_size=vocab_size if isinstance(vocab_size, int) else None,
        max_lora_rank=max_lora_rank,
        tokenizer_size=_tokenizer_size(folder),
    )


def _folder(model: str, revision: str | None) -> Path | None:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except (ImportError, ValueError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _modules(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, int]] | None:
    if not _is_plain(config):
        return None
    modules: dict[str, tuple[int, int]] = {}
    try:
        for file in _files(folder):
            for name, place in read_header(folder / file).items():
                dtype, shape = place.info
                if not name.endswith(_WEIGHT) or len(shape) != 2:
                    continue
                if dtype not in _WHOLE_NUMBERS or ".experts" in name:
                    return None
                modules[name.removesuffix(_WEIGHT)] = (shape[0], shape[1])
    except (OSError, BadSafetensors):
        return None
    if not modules or not all(name.startswith(("model.", "lm_head")) for name in modules):
        return None
    embedding = modules.get("model.embed_tokens")
    if config.get("tie_word_embeddings") and embedding:
        modules.setdefault("lm_head", embedding)
    return modules


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint's names and shapes are those of the modules that PEFT sees."""
    architectures = config.get("architectures") or [""]
    if not str(architectures[0]).endswith("ForCausalLM") or config.get("auto_map"):
        return False
    if any(config.get(part) for part in ("text_config", "vision_config", "audio_config")):
        return False
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else "?"
    return method in (None, *_UNPACKED) and config.get("model_type") not in _TRANSPOSED


def _files(folder: Path) -> Iterator[str]:
    index = _read(folder / _INDEX)
    places = index.get("weight_map") if index else None
    yield from sorted(set(places.values())) if isinstance(places, dict) else [_SINGLE]


def _tokenizer_size(folder: Path) -> int | None:
    tokenizer = _read(folder / "tokenizer.json")
    if tokenizer is None:
        return None
    added = [token["id"] for token in tokenizer.get("added_tokens") or ()]
    vocab = (tokenizer.get("model") or {}).get("vocab") or ()
    ids = [*added, *(vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1])]
    return 1 + max(ids) if ids else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
