"""What is settled about an adapter before vLLM reads it.

Import it only after `prepare_environment`.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm.lora.peft_helper import PEFTHelper

from workers.engine.protocol import AdapterLoadError, LocalAdapter

_PATTERNS = ("rank_pattern", "alpha_pattern")


def preflight(adapter: LocalAdapter) -> Path:
    """The adapter's folder, if vLLM can be trusted with it.

    Raises:
        AdapterLoadError: it is not there, or asks for what this release of vLLM leaves out.
    """
    folder = Path(adapter.path)
    # vLLM takes a path that is not there for a hub's name.
    if not folder.is_absolute():
        raise AdapterLoadError(f"adapter path {adapter.path} is not absolute")
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
    except FileNotFoundError:
        raise AdapterLoadError(f"no adapter_config.json in {adapter.path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterLoadError(f"{adapter.path}/adapter_config.json: {error}") from error
    known = {field.name for field in fields(PEFTHelper)}
    for name in _PATTERNS:
        # Older releases read past it and answer with the wrong strength.
        if isinstance(config, dict) and config.get(name) and name not in known:
            raise AdapterLoadError(
                f"{name} is set, and this release of vLLM ignores it: upgrade vLLM, or retrain "
                "with one rank and one alpha"
            )
    return folder


def end_token(folder: Path, tokenizer: Any) -> int | None:
    """The id of the token that ends this adapter's answers, if it came with one of its own.

    A base model trained on "<|endoftext|>" gets adapters that end with "<|im_end|>".
    """
    if tokenizer is None:
        return None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            said = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        token = said.get("eos_token") if isinstance(said, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return _id_of(token, tokenizer)
    return None


def _id_of(token: str, tokenizer: Any) -> int | None:
    found = tokenizer.get_vocab().get(token)
    return found if isinstance(found, int) and found != tokenizer.eos_token_id else None
