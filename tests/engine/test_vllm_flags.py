"""vLLM's flags: Lorry's defaults under them, and what is refused before anything is loaded."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from core.errors import UsageError
from workers.engine.selection import EngineName, build_engine
from workers.engine.vllm_environment import _ranges
from workers.engine.vllm_revision import revision_of

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def _flags(model: Path, *flags: str) -> Any:
    engine: Any = build_engine(EngineName.VLLM, str(model), flags)
    return engine._flags


def test_adapters_are_on_unless_a_flag_says_otherwise(model: Path) -> None:
    args = _flags(model).args
    assert (args.enable_lora, args.max_loras, args.max_lora_rank) == (True, 8, 16)
    assert args.max_cpu_loras == 16
    assert _flags(model, "--max-loras", "3").args.max_cpu_loras == 6
    assert _flags(model, "--no-enable-lora").args.enable_lora is False


def test_the_outside_name_is_the_served_one_or_the_folders(model: Path) -> None:
    assert _flags(model).base_model == "tiny"
    assert _flags(model, "--served-model-name", "mine", "alias").base_model == "mine"
    assert _flags(model).args.model == str(model)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["--max-lora-rank", "7"], "choose from 1, 8, 16"),
        (["--trust-remote-code"], "run code"),
        (["--max-cpu-loras", "3"], "twice --max-loras"),
        (["--model", "other"], "named before the flags"),
        (["--chat-template", "/nonexistent"], "No such file"),
    ],
)
def test_a_bad_flag_is_refused_with_its_reason(model: Path, flags: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        _flags(model, *flags)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("./nowhere", "no such folder"),
        ("/", "has no config.json"),
        ("some/model", "not in the local Hugging Face cache"),
    ],
)
def test_a_model_that_is_not_there_is_refused(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        build_engine(EngineName.VLLM, name, [])


def test_parallel_ranks_need_gpus(model: Path) -> None:
    build_engine(EngineName.VLLM, str(model), [])  # sets the environment, then imports vLLM
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM runs on a GPU here")
    with pytest.raises(UsageError, match="no GPU found"):
        _flags(model, "--tensor-parallel-size", "2")


def test_the_revision_follows_the_files(model: Path) -> None:
    before = revision_of(model)
    assert revision_of(model) == before
    (model / "config.json").write_text('{"a": 1}')
    assert revision_of(model) != before


def test_cores_are_written_as_ranges() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
