"""An adapter on its way in: taken from a folder or an archive, checked, cut to what is kept.

What training left beside it (optimizer state, `training_args.bin`, logs, checkpoints) is not read,
let alone unpickled.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from core.adapter_rules import AdapterConfig, Finding, TensorInfo, parse_config
from core.adapter_rules.findings import alike
from core.errors import AdapterRejected
from core.invalid import shown
from db.adapter_bin import convert_bin
from db.adapter_sources import PackageLimits, Source, open_source, refused
from db.safetensors_file import BadSafetensors, TensorPlace, look_at_values, read_header

__all__ = ["CONFIG", "WEIGHTS", "Package", "PackageLimits", "unpack"]

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_BIN: Final = "adapter_model.bin"
_MIB: Final = 1024 * 1024
#: What else is kept, and the most bytes of each.
_BESIDE: Final = {
    CONFIG: 4 * _MIB,
    "chat_template.jinja": _MIB,
    "special_tokens_map.json": _MIB,
    "tokenizer.json": 128 * _MIB,
    "tokenizer_config.json": 4 * _MIB,
}
_ADDED_TOKENS: Final = "added_tokens.json"  # of slow tokenizers: looked at, not kept
_SAVE: Final = "give the folder that PEFT's save_pretrained() wrote"
_MOST_NAMED: Final = 10
_TOKEN_ID: Final = re.compile(rb'"id"\s{0,9}:\s{0,9}(\d{1,9})')


@dataclass(frozen=True, slots=True)
class Package:
    """An unpacked, checked adapter in a scratch folder.

    Args:
        folder: holds only files worth keeping, the weights as safetensors.
        config: of its adapter_config.json.
        tensors: by name, from the header of the weights.
        size_bytes: of all files together.
    """

    folder: Path
    config: AdapterConfig
    tensors: Mapping[str, TensorInfo]
    size_bytes: int


def unpack(source: Path, scratch: Path, limits: PackageLimits) -> Package:
    """Take an adapter out of a folder or an archive (.tar.gz, .tar or .zip). Blocking.

    Args:
        scratch: an empty folder, removed by the caller whatever happens.

    Raises:
        AdapterRejected: the source or the files in it cannot be used. Rules that need the base
            model are not applied here: see `core.adapter_rules.check`.
    """
    folder = scratch / "adapter"
    folder.mkdir(parents=True)
    with open_source(source, limits) as opened:
        weights = _copy_files(opened, folder, limits)
    if weights == _BIN:
        convert_bin(folder / _BIN, folder / WEIGHTS, limits.adapter_bytes)
        (folder / _BIN).unlink()
    config = parse_config((folder / CONFIG).read_bytes())
    config = dataclasses.replace(config, tokenizer_size=_tokenizer_size(folder))
    places = _places(folder / WEIGHTS)
    if findings := [*_bad_values(folder / WEIGHTS, places), *_bad_beside(folder)]:
        raise AdapterRejected(findings)
    (folder / _ADDED_TOKENS).unlink(missing_ok=True)
    return Package(
        folder,
        config,
        {name: place.info for name, place in places.items()},
        sum(path.stat().st_size for path in folder.iterdir()),
    )


def _copy_files(source: Source, folder: Path, limits: PackageLimits) -> str:
    """Copy what is worth keeping; returns the name of the weights' file."""
    sizes = source.sizes()
    root = _root(sizes)
    weights = next((name for name in (WEIGHTS, _BIN) if root + name in sizes), None)
    if weights is None:
        raise refused("no_adapter", _without_weights(root, sizes))
    most = {weights: limits.adapter_bytes, _ADDED_TOKENS: 4 * _MIB, **_BESIDE}
    wanted = {name: root + name for name in most if root + name in sizes}
    for name, path in wanted.items():
        if sizes[path] > most[name]:
            raise refused(
                "file_too_large",
                f"{name} has {sizes[path]} bytes, expected at most {most[name]}: an adapter's is "
                "smaller",
            )
    source.copy({path: folder / name for name, path in wanted.items()})
    return weights


def _root(sizes: Mapping[str, int]) -> str:
    """The folder of the adapter, as a prefix: the top, or the one folder there is at the top."""
    shown_paths = [path for path in sizes if not _is_litter(path)]
    candidates = [path.removesuffix(CONFIG) for path in shown_paths if _is_config(path)]
    if "" in candidates:
        return ""
    tops = {path.split("/", 1)[0] + "/" for path in shown_paths}
    if len(tops) == 1 and tops <= set(candidates):
        return tops.pop()
    if not candidates:
        raise refused("no_adapter", f"no {CONFIG} at the top or in the one folder there: {_SAVE}")
    some = ", ".join(sorted(candidates)[:_MOST_NAMED])
    raise refused(
        "several_adapters",
        f"no {CONFIG} at the top, but in {some}: give one of these folders",
    )


def _is_config(path: str) -> bool:
    return path == CONFIG or path.endswith(f"/{CONFIG}")


def _is_litter(path: str) -> bool:
    """What a Mac adds to archives, and hidden files."""
    return path.startswith("__MACOSX/") or any(part.startswith(".") for part in path.split("/"))


def _without_weights(root: str, sizes: Mapping[str, int]) -> str:
    inside = [path.removeprefix(root) for path in sizes if path.startswith(root)]
    sharded = any(path.startswith("adapter_model-") for path in inside)
    full = any(path.startswith(("model", "pytorch_model")) for path in inside)
    if sharded:
        return f"the weights are in several files, expected one {WEIGHTS}: {_SAVE}"
    if full:
        return (
            f"there are a whole model's weights, expected {WEIGHTS}: a merged model is a base "
            "model; start a worker on it"
        )
    return f"no {WEIGHTS} beside {CONFIG}: {_SAVE}"


def _places(path: Path) -> dict[str, TensorPlace]:
    try:
        places = read_header(path)
        with safe_open(path, framework="numpy"):  # what the engine will open it with agrees
            return places
    except (BadSafetensors, SafetensorError) as error:
        raise refused(
            "safetensors_invalid",
            f"{WEIGHTS} is no safetensors file: {str(error)[:300]}. Copy it again, or {_SAVE}",
        ) from None


def _bad_values(path: Path, places: Mapping[str, TensorPlace]) -> Iterator[Finding]:
    infinite, zero = look_at_values(path, places)
    yield from alike(
        "not_finite",
        [
            f"{name}: holds NaN or infinity, expected finite numbers; training diverged, take an "
            "earlier checkpoint"
            for name in infinite
        ],
        "tensors",
    )
    ups = [name for name in places if "lora_B" in name or "lora_embedding_B" in name]
    if ups and all(name in zero for name in ups):
        yield Finding(
            "no_effect",
            f"every lora_B is zero ({len(ups)} tensors), expected trained weights: the adapter "
            "would do nothing. It was saved before training",
        )


def _bad_beside(folder: Path) -> Iterator[Finding]:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = _read_json(folder / name, {})
        if not isinstance(values, dict):
            yield Finding(
                "tokenizer_invalid", f"{name}: not a JSON object; {_SAVE}, or leave it out"
            )
        elif not _is_template(values.get("chat_template")):
            yield Finding(
                "tokenizer_invalid",
                f"{name}: chat_template is {shown(values['chat_template'])}, expected a text, or a "
                f"list of objects with name and template; {_SAVE}, or leave it out",
            )
    template = folder / "chat_template.jinja"
    try:
        template.exists() and template.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        yield Finding("tokenizer_invalid", "chat_template.jinja: not UTF-8; save it again")


def _is_template(value: Any) -> bool:
    """Whether `chat_template` is one text, several with names, or nothing."""
    if not isinstance(value, list):
        return value is None or isinstance(value, str)
    return all(
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("template"), str)
        for one in value
    )


def _tokenizer_size(folder: Path) -> int | None:
    """One more than the highest id of an added token, by the tokenizer's files."""
    added = _read_json(folder / _ADDED_TOKENS, {})
    ids = list(added.values()) if isinstance(added, dict) else []
    whole = folder / "tokenizer.json"
    if whole.exists() and whole.stat().st_size:
        # not parsed: a stranger's 100 MB of JSON can take gigabytes
        with whole.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
            ids += [int(match[1]) for match in _TOKEN_ID.finditer(text)]
    numbers = [one for one in ids if isinstance(one, int) and one >= 0]
    return 1 + max(numbers) if numbers else None


def _read_json(path: Path, missing: Any) -> Any:
    if not path.exists():
        return missing
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
