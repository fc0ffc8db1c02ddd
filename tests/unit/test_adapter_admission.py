"""Every bad adapter is refused with what its owner must know; every good one is taken."""

import json
from pathlib import Path

import pytest

from core.adapter_rules import BaseFacts, TensorInfo, check, hints, parse_config
from core.errors import AdapterRejected
from db.adapter_package import Package, PackageLimits, unpack
from tests.support.adapters import SMOLLM, Draft
from tests.support.bad_adapters import BAD, Bad
from tests.support.good_adapters import GOOD

LIMITS = PackageLimits(adapter_bytes=256 * 1024**2, unpacked_bytes=1024**3)


def admit(source: Path, scratch: Path, base: BaseFacts | None = SMOLLM) -> Package:
    """Unpack and check, as the registry does."""
    package = unpack(source, scratch, LIMITS)
    if findings := check(package.config, package.tensors, base):
        raise AdapterRejected(findings)
    return package


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_adapter_is_refused_with_its_finding(bad: Bad, tmp_path: Path) -> None:
    source = bad.write(tmp_path / "source")
    with pytest.raises(AdapterRejected) as refusal:
        admit(source, tmp_path / "scratch")
    messages = [one.message for one in refusal.value.findings if one.code == bad.code]
    assert messages, refusal.value.findings
    assert bad.word in messages[0]
    assert refusal.value.status == 422


def test_the_table_is_long_enough() -> None:
    assert len(BAD) >= 40
    assert len(GOOD) >= 12


@pytest.mark.parametrize("name", GOOD)
def test_a_good_adapter_is_taken(name: str, tmp_path: Path) -> None:
    package = admit(GOOD[name](tmp_path / "source"), tmp_path / "scratch")
    kept = {path.name for path in package.folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= kept
    assert kept <= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert package.size_bytes == sum(path.stat().st_size for path in package.folder.iterdir())
    assert package.tensors


@pytest.mark.parametrize("name", ["PEFT 0.21", "embed_tokens", "rank_pattern and alpha_pattern"])
def test_without_facts_the_rules_that_need_none_still_hold(name: str, tmp_path: Path) -> None:
    admit(GOOD[name](tmp_path / "good"), tmp_path / "scratch", None)
    for number, still in enumerate(["DoRA", "a lora_A alone", "another rank than the config's"]):
        with pytest.raises(AdapterRejected):
            admit(BAD[still].write(tmp_path / f"bad{number}"), tmp_path / f"s{number}", None)


def test_every_finding_is_told_at_once(tmp_path: Path) -> None:
    draft = Draft(layers=range(2), rank=128, config={"use_dora": True, "bias": "all"})
    with pytest.raises(AdapterRejected, match="2 more") as refusal:
        admit(draft.write(tmp_path / "source"), tmp_path / "scratch")
    assert {one.code for one in refusal.value.findings} == {"dora", "bias", "rank_too_high"}
    assert refusal.value.details["findings"] == [
        {"code": one.code, "message": one.message} for one in refusal.value.findings
    ]


def test_many_tensors_wrong_alike_are_one_finding(tmp_path: Path) -> None:
    package = admit(Draft().write(tmp_path / "source"), tmp_path / "scratch")
    wider = {name: (out, 2 * into) for name, (out, into) in (SMOLLM.modules or {}).items()}
    (finding,) = check(package.config, package.tensors, BaseFacts("other", wider, None, 64))
    assert finding.code == "tensor_shape"
    assert "(119 more tensors likewise)" in finding.message


def test_patterns_that_would_hold_up_the_engine_are_refused_unmatched() -> None:
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    fields["rank_pattern"] = {f".*a.*{number}": 4 for number in range(100)}
    names = [f"model.{'a.' * 100}{n}.lora_{side}.weight" for n in range(1000) for side in "AB"]
    shapes = dict.fromkeys(names, TensorInfo("F32", (4, 4)))
    config = parse_config(json.dumps(fields).encode())
    assert [one.code for one in check(config, shapes, None)] == ["pattern"]
    # what EVA writes for 80 layers is not
    modules = [f"model.layers.{n}.mlp.{part}" for n in range(80) for part in ("up", "gate", "down")]
    fields["rank_pattern"] = dict.fromkeys(modules, 5)
    names = [f"{module}.lora_A.weight" for module in modules]
    shapes = dict.fromkeys(names, TensorInfo("F32", (5, 4)))
    shapes |= {n.replace("lora_A", "lora_B"): TensorInfo("F32", (4, 5)) for n in names}
    assert check(parse_config(json.dumps(fields).encode()), shapes, None) == []


@pytest.mark.parametrize(
    ("trained_on", "hinted"),
    [
        ("SmolLM2-135M-Instruct", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", False),
        ("/home/ann/models/smollm2-135m-instruct/", False),
        ("unsloth/SmolLM2-135M-Instruct-bnb-4bit", True),
        (None, False),
    ],
)
def test_another_name_of_the_base_is_only_a_hint(
    trained_on: str | None, hinted: bool, tmp_path: Path
) -> None:
    draft = Draft(layers=range(2), config={"base_model_name_or_path": trained_on})
    package = admit(draft.write(tmp_path / "source"), tmp_path / "scratch")
    assert [one.code for one in hints(package.config, SMOLLM)] == ["base_name"] * hinted


def test_facts_survive_json() -> None:
    assert BaseFacts.from_json(SMOLLM.as_json()) == SMOLLM
    unknown = BaseFacts("gguf", None, None, 16)
    assert BaseFacts.from_json(unknown.as_json()) == unknown
