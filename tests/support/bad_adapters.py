"""Adapters that must be refused: each with the finding's code and a word of its message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support.adapters import PREFIX, VOCABULARY, WIDTH, Draft, pair, raw_safetensors

_Q0 = f"{PREFIX}.layers.0.self_attn.q_proj"
_A0, _B0 = f"{_Q0}.lora_A.weight", f"{_Q0}.lora_B.weight"


class Bad(NamedTuple):
    """A way to write one into a folder; and what the refusal says."""

    write: Callable[[Path], Path]
    code: str
    word: str


def _draft(
    code: str, word: str, spoil: Callable[[Draft], object] = lambda _: None, **k: Any
) -> Bad:
    def write(folder: Path) -> Path:
        draft = Draft(layers=range(2), **k)
        spoil(draft)
        return draft.write(folder)

    return Bad(write, code, word)


def _config(code: str, word: str, **fields: Any) -> Bad:
    return _draft(code, word, config=fields)


def _file(name: str, content: bytes | None, code: str, word: str) -> Bad:
    """A right adapter with one file replaced, or left out."""

    def write(folder: Path) -> Path:
        Draft(layers=range(2)).write(folder)
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
        return folder

    return Bad(write, code, word)


def _weights(content: bytes, word: str) -> Bad:
    return _file("adapter_model.safetensors", content, "safetensors_invalid", word)


def _spoilt(change: Callable[[bytes], bytes], word: str) -> Bad:
    def write(folder: Path) -> Path:
        path = Draft(layers=range(2)).write(folder) / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return folder

    return Bad(write, "safetensors_invalid", word)


def _with(name: str, array: Any) -> Callable[[Draft], object]:
    return lambda draft: draft.tensors.update({name: np.asarray(array, np.float32)})


def _value(value: float, dtype: Any = np.float32) -> Callable[[Draft], object]:
    def spoil(draft: Draft) -> None:
        draft.typed(dtype)
        draft.tensors[_B0][-1, -1] = value

    return spoil


def _grown(side: str) -> Callable[[Draft], object]:
    def spoil(draft: Draft) -> None:
        random = np.random.default_rng(1)
        if side == "lm_head":
            draft.tensors |= pair("base_model.model.lm_head", random, 4, WIDTH, VOCABULARY + 3)
        else:
            into = np.ones((4, VOCABULARY + 3), np.float32)
            draft.tensors[f"{PREFIX}.embed_tokens.lora_embedding_A"] = into
            draft.tensors[f"{PREFIX}.embed_tokens.lora_embedding_B"] = np.ones(
                (WIDTH, 4), np.float32
            )

    return spoil


def _zero_lora_b(draft: Draft) -> None:
    for name, array in draft.tensors.items():
        if "lora_B" in name:
            array[:] = 0


def _entry(dtype: str, shape: list[Any], offsets: list[int]) -> dict[str, Any]:
    return {_A0: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def _checkpoints(folder: Path) -> Path:
    for step in (50, 100):
        Draft(layers=range(1)).write(folder / f"checkpoint-{step}")
    return folder


def _tokenizer(tokens: int) -> bytes:
    added = [{"id": tokens - 1, "content": "<new>"}]
    return json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}).encode()


FIELDS = {
    "config is not JSON": _file("adapter_config.json", b"{'r': 8}", "config_not_json", "not JSON"),
    "config has a byte order mark": _file(
        "adapter_config.json", b"\xef\xbb\xbf{}", "config_not_json", "BOM"
    ),
    "config is UTF-16": _file(
        "adapter_config.json", "{}".encode("utf-16"), "config_not_json", "not JSON"
    ),
    "config is a list": _file("adapter_config.json", b"[]", "config_not_json", "object"),
    "config nests too deep": _file(
        "adapter_config.json", b'{"a":' + b"[" * 200_000, "config_not_json", "not JSON"
    ),
    "config says NaN": _config("config_not_json", "NaN", lora_alpha=float("nan")),
    "no r": _draft("config_field", "r: missing", lambda d: d.lacking("r")),
    "no target_modules": _draft(
        "config_field", "target_modules", lambda d: d.lacking("target_modules")
    ),
    "no peft_type": _draft("config_field", "peft_type", lambda d: d.lacking("peft_type")),
    "another method": _config("not_lora", "IA3", peft_type="IA3"),
    "r is a boolean": _config("config_field", "r is true", r=True),
    "r is a float": _config("config_field", "r is 4.0", r=4.0),
    "r is a text": _config("config_field", "r is '4'", r="4"),
    "r is 0": _config("config_field", "r is 0", r=0),
    "r is negative": _config("config_field", "r is -4", r=-4),
    "r is huge": _config("config_field", "huge", r=10**90),
    "alpha is 0": _config("config_field", "lora_alpha is 0", lora_alpha=0),
    "alpha is negative": _config("config_field", "lora_alpha is -8", lora_alpha=-8),
    "alpha is a boolean": _config("config_field", "lora_alpha is true", lora_alpha=True),
    "alpha is beyond measure": _config("config_field", "lora_alpha", lora_alpha=1e300),
    "use_dora is a text": _config("config_field", "use_dora", use_dora="no"),
    "target_modules is a number": _config("config_field", "target_modules", target_modules=3),
    "rank_pattern is a list": _config("config_field", "rank_pattern", rank_pattern=["q_proj"]),
    "rank_pattern has a 0": _config("config_field", "rank_pattern", rank_pattern={"q_proj": 0}),
    "alpha_pattern has a text": _config("config_field", "alpha", alpha_pattern={"q_proj": "8"}),
    "a pattern that takes for ever": _config("pattern", "plain", rank_pattern={"(.*a)*b": 4}),
    "a pattern that is none": _config("pattern", "plain", alpha_pattern={"q_proj)(": 8}),
}
METHODS = {
    "DoRA": _config("dora", "use_dora", use_dora=True),
    "bias": _config("bias", "lora_only", bias="lora_only"),
    "bias is null": _config("bias", "null", bias=None),
    "lora_bias": _config("lora_bias", "lora_bias", lora_bias=True),
    "modules_to_save": _config("modules_to_save", "lm_head", modules_to_save=["lm_head"]),
    "a classifier": _config("modules_to_save", "score", modules_to_save=["score"]),
    "PiSSA": _config("init_unconverted", "pissa", init_lora_weights="pissa"),
    "fast PiSSA": _config("init_unconverted", "pissa", init_lora_weights="pissa_niter_4"),
    "OLoRA": _config("init_unconverted", "olora", init_lora_weights="olora"),
    "LoftQ": _config("init_unconverted", "loftq", init_lora_weights="loftq"),
    "CorDA": _config("init_unconverted", "corda", init_lora_weights="corda"),
    "LoRA-GA": _config("init_unconverted", "lora_ga", init_lora_weights="lora_ga"),
    "aLoRA": _config("alora", "alora", alora_invocation_tokens=[1, 2]),
    "layer_replication": _config("layer_replication", "layer", layer_replication=[[0, 2], [1, 3]]),
    "Megatron": _config("megatron", "Megatron", megatron_config={"tensor": 2}),
    "trained tokens": _config("trainable_tokens", "token", trainable_token_indices=[5]),
    "QALoRA": _config("qalora", "QALoRA", use_qalora=True),
    "BD-LoRA": _config("bdlora", "block", use_bdlora={"nblocks": 2}),
    "KaSA": _config("variant", "KaSA", kasa_config={"beta": 0.1}),
    "Arrow": _config("variant", "Arrow", arrow_config={"top_k": 3}),
    "a classifier's task": _config("task_type", "SEQ_CLS", task_type="SEQ_CLS"),
    "a method from the future": _config("unknown_option", "use_zora", use_zora=True),
    "rank 128": _draft(
        "rank_too_high",
        "retrain with r ≤ 64, or start workers with `--max-lora-rank 128`",
        rank=128,
    ),
    "rank 1000": _draft("rank_too_high", "retrain with r ≤ 64", rank=1000),
    "a rank in rank_pattern": _config(
        "rank_too_high", "--max-lora-rank 128", rank_pattern={"nothing": 100}
    ),
}
TENSORS = {
    "no tensors": _draft("no_tensors", "no tensor", lambda d: d.tensors.clear()),
    "a lora_A alone": _draft("tensor_unpaired", _A0, lambda d: d.tensors.pop(_B0)),
    "a lora_B alone": _draft("tensor_unpaired", _B0, lambda d: d.tensors.pop(_A0)),
    "names with .default": _draft(
        "tensor_name",
        "default",
        lambda d: d.renamed(lambda n: n.replace(".weight", ".default.weight")),
    ),
    # the pattern alone is fine: on this name it would be matched for minutes
    "a name of 9,000 characters": _draft(
        "tensor_name",
        "at most 256",
        lambda d: d.having(rank_pattern={".*x.*y": 4}).renamed(
            lambda n: n.replace("model.layers", "x.y" * 3000)
        ),
    ),
    "the same twice": _draft(
        "tensor_name", "also", _with(_A0.removeprefix("base_model.model."), np.ones((4, 576)))
    ),
    "names of another model": _draft(
        "no_module_matched",
        "do nothing",
        lambda d: d.renamed(lambda n: n.replace("model.layers", "transformer.h")),
    ),
    "a layer too many": _draft(
        "module_unknown",
        "layers.30",
        lambda d: d.renamed(lambda n: n.replace("layers.1.", "layers.30.")),
    ),
    "modules that the config does not name": _config(
        "module_untargeted", "k_proj", target_modules=["q_proj", "v_proj", "o_proj"]
    ),
    "shapes of another base": _draft(
        "tensor_shape",
        "(rank, 576)",
        _with(f"{PREFIX}.layers.0.self_attn.k_proj.lora_A.weight", np.ones((4, 2048))),
    ),
    "a lora_B of another base": _draft(
        "tensor_shape", "(576, rank)", _with(_B0, np.ones((999, 4)))
    ),
    "transposed": _draft(
        "tensor_rank",
        "rank 576",
        lambda d: d.tensors.update({n: np.ascontiguousarray(a.T) for n, a in d.tensors.items()}),
    ),
    "another rank than the config's": _config("tensor_rank", "expected 8", r=8),
    "another rank than rank_pattern's": _config(
        "tensor_rank", "expected 2", rank_pattern={"layers.0.self_attn.q_proj": 2}
    ),
    "three dimensions": _draft("tensor_shape", "two dimensions", _with(_A0, np.ones((2, 2, 576)))),
    "an empty dimension": _draft("tensor_shape", "above 0", _with(_A0, np.ones((0, 576)))),
    "whole numbers": _draft("tensor_dtype", "I8", lambda d: d.typed(np.int8)),
    "double precision": _draft("tensor_dtype", "F64", lambda d: d.typed(np.float64)),
    "a grown embedding saved along": _draft(
        "vocabulary_growth",
        "49155",
        _with(f"{PREFIX}.embed_tokens.base_layer.weight", np.zeros((VOCABULARY + 3, 2))),
    ),
    "a grown embedding in full": _draft(
        "vocabulary_growth",
        "49155",
        _with(f"{PREFIX}.embed_tokens.weight", np.zeros((VOCABULARY + 3, 2))),
    ),
    "a whole embedding": _draft(
        "base_weights",
        "save_embedding_layers",
        _with("base_model.model.lm_head.weight", np.zeros((VOCABULARY, 2))),
    ),
    "a grown embedding's LoRA": _draft("vocabulary_growth", "49155", _grown("embed_tokens")),
    "a grown head's LoRA": _draft("vocabulary_growth", "49155", _grown("lm_head")),
    "DoRA's magnitudes": _draft(
        "tensor_name", "magnitude", _with(f"{_Q0}.lora_magnitude_vector", np.ones(576))
    ),
    "a bias": _draft("tensor_name", "bias", _with(f"{_Q0}.lora_B.bias", np.ones(576))),
    "trained tokens' values": _draft(
        "tensor_name",
        "trainable_tokens_delta",
        _with(f"{PREFIX}.embed_tokens.token_adapter.trainable_tokens_delta", np.ones((1, WIDTH))),
    ),
    "a linear LoRA on the embedding": _draft(
        "tensor_name",
        "embedding",
        lambda d: d.tensors.update(
            pair(f"{PREFIX}.embed_tokens", np.random.default_rng(1), 4, WIDTH, VOCABULARY)
        ),
    ),
    "an embedding's LoRA on a linear layer": _draft(
        "tensor_name",
        "an embedding",
        lambda d: d.renamed(
            lambda n: n.replace("lora_A.weight", "lora_embedding_A").replace(
                "lora_B.weight", "lora_embedding_B"
            )
        ),
    ),
    "no number": _draft("not_finite", _B0, _value(float("nan"))),
    "infinity": _draft("not_finite", _B0, _value(float("-inf"))),
    "infinity in float16": _draft("not_finite", _B0, _value(float("inf"), np.float16)),
    "never trained": _draft("no_effect", "every lora_B", _zero_lora_b),
}
FILES = {
    "no config": _file("adapter_config.json", None, "no_adapter", "adapter_config.json"),
    "no weights": _file("adapter_model.safetensors", None, "no_adapter", "save_pretrained"),
    "weights of no format": _weights(b"not weights", "header"),
    "an empty file": _weights(b"", "header"),
    "a header beyond the file": _weights((2**40).to_bytes(8, "little") + b"{}" * 9, "header"),
    "a header of no JSON": _weights(raw_safetensors(b"{nothing}    "), "JSON"),
    "a header of a list": _weights(raw_safetensors(b"[1, 2, 3, 4]"), "object"),
    "an unknown type": _weights(raw_safetensors(_entry("Q4", [1], [0, 1]), b"1"), "unknown"),
    "negative offsets": _weights(raw_safetensors(_entry("F32", [1], [-4, 0]), b"1234"), "sizes"),
    "a hole": _weights(raw_safetensors(_entry("F32", [1], [4, 8]), b"12345678"), "hole"),
    "more shape than bytes": _weights(
        raw_safetensors(_entry("F32", [2**40, 576], [0, 4]), b"1234"), "bytes"
    ),
    "cut off": _spoilt(lambda content: content[:-100], "cut off"),
    "bytes too many": _spoilt(lambda content: content + b"more", "cut off"),
    "checkpoints only": Bad(_checkpoints, "several_adapters", "checkpoint-100"),
    "a tokenizer that grew": _file(
        "tokenizer.json", _tokenizer(VOCABULARY + 1), "vocabulary_growth", "49153"
    ),
    "added tokens": _file(
        "added_tokens.json", b'{"<new>": 49152}', "vocabulary_growth", "tokenizer"
    ),
    "chat templates without names": _file(
        "tokenizer_config.json",
        b'{"chat_template": ["{{ messages }}"]}',
        "tokenizer_invalid",
        "a list of 1, expected a text",
    ),
    "a chat template of a number": _file(
        "tokenizer_config.json", b'{"chat_template": 3}', "tokenizer_invalid", "is 3"
    ),
    "a tokenizer config of no JSON": _file(
        "tokenizer_config.json", b"{", "tokenizer_invalid", "tokenizer_config.json"
    ),
}
BAD: dict[str, Bad] = FIELDS | METHODS | TENSORS | FILES
