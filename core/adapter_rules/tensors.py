"""The tensors against the configuration and the base: pairs, ranks, names, shapes, vocabulary."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from core.adapter_rules import names
from core.adapter_rules.base import BaseFacts, TensorInfo
from core.adapter_rules.config import AdapterConfig
from core.adapter_rules.findings import Finding, alike

_DTYPES = ("F32", "F16", "BF16")
_SAVE = "save the adapter with PEFT's save_pretrained()"
_MOST_NAMED = 3
_SHOWN_OF_LONG = 80


class _Tensor(NamedTuple):
    name: str
    info: TensorInfo


#: Each module's halves; the key says which of the two kinds of LoRA it is.
_Pairs = dict[tuple[str, bool], dict[str, _Tensor]]


def wrong_tensors(
    config: AdapterConfig, tensors: Mapping[str, TensorInfo], base: BaseFacts | None
) -> list[Finding]:
    """Everything that is wrong with the tensors."""
    if not tensors:
        return [Finding("no_tensors", f"adapter_model.safetensors holds no tensor: {_SAVE}")]
    modules = base.modules if base else None
    pairs, findings = _paired(tensors, base)
    findings += _dtypes(tensors)
    if config.takes_too_long({module for module, _ in pairs}):
        return [*findings, _slow_patterns(len(pairs))]
    findings += _ranks(config, pairs, experts=modules is not None)
    findings += _places(pairs)
    findings += _untargeted(config, pairs)
    findings += _vocabulary(pairs, base)
    if modules is not None:
        findings += _unknown_modules(pairs, modules, base.name if base else "")
        findings += _shapes(pairs, modules)
    return findings


def _paired(
    tensors: Mapping[str, TensorInfo], base: BaseFacts | None
) -> tuple[_Pairs, list[Finding]]:
    pairs: _Pairs = {}
    strange, whole, grown, twice = [], [], [], []
    for name, info in tensors.items():
        half = names.parse(name)
        if len(name) > names.LONGEST:
            strange.append(
                f"{name[:_SHOWN_OF_LONG]}…: a name of {len(name)} characters, expected at most "
                f"{names.LONGEST}; {_SAVE}"
            )
        elif half is not None:
            pair = pairs.setdefault((half.module, half.embedding), {})
            if half.side in pair:
                twice.append(f"{name}: also there as {pair[half.side].name}; {_SAVE}")
            pair[half.side] = _Tensor(name, info)
        elif names.of_vocabulary(name) and name.endswith(".weight"):
            if _is_grown(info, base):
                grown.append(_grown(name, info.shape[0], base))
            elif not names.is_base_copy(name):
                whole.append(
                    f"{name}: the whole weights of the embedding, expected only lora_A and lora_B; "
                    "save with save_pretrained(…, save_embedding_layers=False)"
                )
        else:
            strange.append(
                f"{name}: no LoRA tensor, expected names that end in lora_A.weight or "
                f"lora_B.weight; {_SAVE} (not with torch.save of a state dict)"
            )
    return pairs, [
        *alike("tensor_name", strange, "tensors"),
        *alike("tensor_name", twice, "tensors"),
        *alike("base_weights", whole, "tensors"),
        *alike("vocabulary_growth", grown, "tensors"),
        *alike("tensor_unpaired", list(_unpaired(pairs)), "modules"),
    ]


def _unpaired(pairs: _Pairs) -> Iterator[str]:
    for pair in pairs.values():
        if len(pair) == 1:
            ((side, tensor),) = pair.items()
            lone, other = ("lora_A", "lora_B") if side == "A" else ("lora_B", "lora_A")
            yield f"{tensor.name}: a {lone} without its {other}; the file is incomplete: {_SAVE}"


def _dtypes(tensors: Mapping[str, TensorInfo]) -> list[Finding]:
    wrong = [
        f"{name}: is {info.dtype}, expected one of {', '.join(_DTYPES)}; convert the tensors and "
        "save again"
        for name, info in tensors.items()
        if info.dtype not in _DTYPES
    ]
    return alike("tensor_dtype", wrong, "tensors")


def _ranks(config: AdapterConfig, pairs: _Pairs, *, experts: bool) -> list[Finding]:
    """Ranks by the config, since vLLM takes the strength from there and never compares.

    Args:
        experts: whether experts' tensors, which may be stacked, are compared too.
    """
    flat, wrong = [], []
    expected = config.ranks_of({module for module, _ in pairs})
    for (module, _), pair in pairs.items():
        for side, (name, info) in pair.items():
            if len(info.shape) != 2 or 0 in info.shape:
                flat.append(f"{name}: has shape {info.shape}, expected two dimensions above 0")
                continue
            rank = info.shape[0] if side == "A" else info.shape[1]
            if rank != expected[module] and (experts or not names.has_experts(module)):
                wrong.append(
                    f"{name}: has rank {rank} (shape {info.shape}), expected "
                    f"{expected[module]} by adapter_config.json's r and rank_pattern; "
                    "configuration and weights are of different runs"
                )
    return alike("tensor_shape", flat, "tensors") + alike("tensor_rank", wrong, "tensors")


def _slow_patterns(modules: int) -> Finding:
    return Finding(
        "pattern",
        f"rank_pattern and alpha_pattern would take too long to match against {modules} modules, "
        "here and in the engine: name the modules themselves, or give fewer patterns",
    )


def _places(pairs: _Pairs) -> list[Finding]:
    wrong = [
        f"{tensor.name}: a LoRA {'of an embedding' if embedding else 'of a linear layer'} on a "
        f"module that is {'none' if embedding else 'an embedding'}; {_SAVE}"
        for (module, embedding), pair in pairs.items()
        for tensor in pair.values()
        if embedding != names.is_embedding(module)
    ]
    return alike("tensor_name", wrong, "tensors")


def _untargeted(config: AdapterConfig, pairs: _Pairs) -> list[Finding]:
    """Modules that PEFT would pass over, since target_modules does not name them; vLLM would not.

    A pattern is not run: it is a stranger's. Tied embeddings may come without being named.
    """
    targets = config.fields.get("target_modules")
    if not isinstance(targets, list) or config.fields.get("target_parameters"):
        return []
    named = set(targets)
    wrong = [
        f"{next(iter(pair.values())).name}: target_modules ({', '.join(targets[:_MOST_NAMED])}, …) "
        "does not name its module, so PEFT would leave it out and vLLM would not; configuration "
        "and weights are of different runs"
        for (module, _), pair in pairs.items()
        if named.isdisjoint(names.endings(module)) and not names.of_vocabulary(module)
    ]
    return alike("module_untargeted", wrong, "modules")


def _unknown_modules(
    pairs: _Pairs, modules: Mapping[str, tuple[int, int]], base: str
) -> list[Finding]:
    unknown = [module for module, _ in pairs if module not in modules]
    if not unknown:
        return []
    some = ", ".join(unknown[:_MOST_NAMED]) + (", …" if len(unknown) > _MOST_NAMED else "")
    like = ", ".join(list(modules)[1 : 1 + _MOST_NAMED])
    if len(unknown) == len(pairs):
        return [
            Finding(
                "no_module_matched",
                f"none of the {len(unknown)} modules ({some}) is one of {base} ({like}, …): the "
                "adapter would load and do nothing. Name the base that it was trained on, or "
                f"{_SAVE}",
            )
        ]
    return [
        Finding(
            "module_unknown",
            f"{len(unknown)} of {len(pairs)} modules ({some}) are none of {base} ({like}, …), and "
            "would do nothing. Name the base that the adapter was trained on",
        )
    ]


def _shapes(pairs: _Pairs, modules: Mapping[str, tuple[int, int]]) -> list[Finding]:
    wrong = []
    for (module, embedding), pair in pairs.items():
        if module not in modules:
            continue
        out, into = modules[module]
        if embedding:
            out, into = into, out
        for side, (name, info) in pair.items():
            width, expected = (info.shape[-1:], into) if side == "A" else (info.shape[:1], out)
            if len(info.shape) == 2 and width != (expected,) and not names.of_vocabulary(module):
                wrong.append(
                    f"{name}: has shape {info.shape}, expected "
                    f"{f'(rank, {into})' if side == 'A' else f'({out}, rank)'} for the base's "
                    f"{module} of {out} × {into}; the adapter was trained on another base"
                )
    return alike("tensor_shape", wrong, "tensors")


def _vocabulary(pairs: _Pairs, base: BaseFacts | None) -> list[Finding]:
    """Embedding and head: the side with a number for each token, and the other side."""
    grown, wrong = [], []
    size = base.vocab_size if base else None
    for (module, embedding), pair in pairs.items():
        if size is None or not names.of_vocabulary(module):
            continue
        width = _width(module, base)
        for side, (name, info) in pair.items():
            if len(info.shape) != 2:
                continue
            found = info.shape[1] if side == "A" else info.shape[0]
            per_token = (side == "A") == embedding
            if per_token and found != size:
                grown.append(_grown(name, found, base))
            elif not per_token and width and found != width:
                wrong.append(
                    f"{name}: has shape {info.shape}, expected {width} in place of {found}; the "
                    "adapter was trained on another base"
                )
    return alike("vocabulary_growth", grown, "tensors") + alike("tensor_shape", wrong, "tensors")


def _width(module: str, base: BaseFacts | None) -> int | None:
    shape = (base.modules or {}).get(module) if base else None
    return shape[1] if shape else None


def _is_grown(info: TensorInfo, base: BaseFacts | None) -> bool:
    size = base.vocab_size if base else None
    return size is not None and info.shape[:1] != (size,)


def _grown(name: str, found: int, base: BaseFacts | None) -> str:
    return (
        f"{name}: has {found} tokens, expected the base's {base.vocab_size if base else 0}: vLLM "
        "cannot grow a vocabulary for an adapter. Retrain without added tokens (reuse reserved "
        "ones), or merge the adapter and serve the result as a base model"
    )
