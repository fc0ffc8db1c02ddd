"""adapter_config.json as PEFT 0.10 to the newest, LLaMA-Factory and others write it."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from core.adapter_rules.findings import Finding
from core.errors import AdapterRejected
from core.invalid import shown

_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_HIGHEST_RANK: Final = 65_536
_HIGHEST_ALPHA: Final = 1e6
_MOST_PATTERNS: Final = 10_000
_LONGEST_KEY: Final = 200
#: A group that is repeated, or a third repetition, can hold a regex engine up for hours.
_REPEATED_GROUP: Final = re.compile(r"\)[*+?{]")
_REPETITION: Final = re.compile(r"(?<!\\)[*+?{]")
_MOST_REPETITIONS: Final = 2
#: About 10 s of matching, here and again in the engine; a simple match counts as the least.
_MOST_WORK: Final = 10**11
_LEAST_WORK: Final = 10**4


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an adapter says of itself.

    Args:
        rank: `r`.
        alpha: `lora_alpha`; an adapter's strength is alpha / rank.
        rank_pattern: other ranks, by a pattern that ends a module's name; the first match counts.
        alpha_pattern: the same of alpha.
        base_model: `base_model_name_or_path`, a name or somebody's path, or None.
        fields: the whole file.
        tokenizer_size: one more than the highest id of an added token in the tokenizer that came
            beside it, or None where none came.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str | None
    fields: Mapping[str, Any]
    tokenizer_size: int | None = None

    @property
    def highest_rank(self) -> int:
        """The rank that a worker must have room for; vLLM counts patterns that match nothing."""
        return max(self.rank, *self.rank_pattern.values(), 0)

    def ranks_of(self, modules: Iterable[str]) -> dict[str, int]:
        """The rank of each module, by PEFT's rule (and vLLM's) for `rank_pattern`."""
        # compiled once: there may be more of them than `re` remembers
        patterns = [(re.compile(rf"(.*\.)?({k})$"), rank) for k, rank in self.rank_pattern.items()]
        return {
            module: next((rank for one, rank in patterns if one.match(module)), self.rank)
            for module in modules
        }

    def takes_too_long(self, modules: Collection[str]) -> bool:
        """Whether matching every pattern against every module could take minutes."""
        powers = Counter(
            len(_REPETITION.findall(key)) + 1 for key in (*self.rank_pattern, *self.alpha_pattern)
        )
        lengths = Counter(map(len, modules))
        work: int = sum(
            max(length**power, _LEAST_WORK) * keys * count
            for power, keys in powers.items()
            for length, count in lengths.items()
        )
        return work > _MOST_WORK


def parse_config(text: bytes) -> AdapterConfig:
    """Read adapter_config.json.

    Raises:
        AdapterRejected: it is not JSON, or a field that everything rests on is missing or has a
            value that it cannot have. Every such field is named.
    """
    try:
        # vLLM reads UTF-8 alone, and no byte order mark
        fields = json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(
            [
                Finding(
                    "config_not_json",
                    f"adapter_config.json is not JSON ({_first_line(error)}): give the file that "
                    "PEFT's save_pretrained() wrote",
                )
            ]
        ) from None
    if not isinstance(fields, dict):
        raise AdapterRejected(
            [
                Finding(
                    "config_not_json", f"adapter_config.json holds {shown(fields)}, not an object"
                )
            ]
        )
    if findings := list(_wrong_fields(fields)):
        raise AdapterRejected(findings)
    return AdapterConfig(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        rank_pattern=dict(fields.get("rank_pattern") or {}),
        alpha_pattern=dict(fields.get("alpha_pattern") or {}),
        base_model=fields.get("base_model_name_or_path") or None,
        fields=fields,
    )


def _wrong_fields(fields: Mapping[str, Any]) -> Iterator[Finding]:
    missing = [name for name in _REQUIRED if name not in fields]
    if missing:
        yield _field(
            f"{', '.join(missing)}: missing; give the file that PEFT's save_pretrained() wrote"
        )
    if fields.get("peft_type", "LORA") != "LORA":
        yield Finding(
            "not_lora",
            f"peft_type is {shown(fields['peft_type'])}, expected 'LORA': vLLM serves LoRA "
            "adapters only; retrain with LoraConfig",
        )
    if "r" in fields and not _is_rank(fields["r"]):
        yield _field(f"r is {shown(fields['r'])}, expected a whole number from 1 up")
    if "lora_alpha" in fields and not _is_alpha(fields["lora_alpha"]):
        yield _field(
            f"lora_alpha is {shown(fields['lora_alpha'])}, expected a number above 0 and up to a "
            "million"
        )
    yield from _wrong_types(fields)
    yield from _wrong_pattern(fields, "rank_pattern", _is_rank, "a whole number from 1 up")
    yield from _wrong_pattern(fields, "alpha_pattern", _is_alpha, "a number above 0")


def _wrong_types(fields: Mapping[str, Any]) -> Iterator[Finding]:
    targets = fields.get("target_modules")
    if not (targets is None or isinstance(targets, str) or _is_texts(targets)):
        yield _field(f"target_modules is {shown(targets)}, expected names or one pattern")
    base = fields.get("base_model_name_or_path")
    if not (base is None or isinstance(base, str)):
        yield _field(f"base_model_name_or_path is {shown(base)}, expected a name")
    for name in ("inference_mode", "use_rslora", "use_dora", "lora_bias", "use_qalora"):
        if not isinstance(fields.get(name, False), bool | None):
            yield _field(f"{name} is {shown(fields[name])}, expected true or false")


def _wrong_pattern(
    fields: Mapping[str, Any], name: str, is_value: Any, expected: str
) -> Iterator[Finding]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict) or len(pattern) > _MOST_PATTERNS:
        yield _field(
            f"{name} is {shown(pattern)}, expected an object of at most {_MOST_PATTERNS} modules"
        )
        return
    for key, value in pattern.items():
        if not is_value(value):
            yield _field(f"{name}[{shown(key)}] is {shown(value)}, expected {expected}")
            return
        if not _is_safe_key(key):
            yield Finding(
                "pattern",
                f"{name}: the key {shown(key)} is not a plain pattern of a module's name (up to "
                f"{_LONGEST_KEY} characters, {_MOST_REPETITIONS} repetitions, none of a group): "
                "name the modules themselves",
            )
            return


def _is_safe_key(key: str) -> bool:
    """Whether vLLM's engine, which matches these against every module, is done in good time."""
    if not 0 < len(key) <= _LONGEST_KEY or _REPEATED_GROUP.search(key) or "(?" in key:
        return False
    if len(_REPETITION.findall(key)) > _MOST_REPETITIONS:
        return False
    try:
        re.compile(key)  # alone: it must not close the group that it is put into
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _HIGHEST_RANK


def _is_alpha(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and 0 < value <= _HIGHEST_ALPHA


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _field(message: str) -> Finding:
    return Finding("config_field", f"adapter_config.json: {message}")
