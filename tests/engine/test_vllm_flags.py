"""vLLM's flags: Lorry's defaults under them, and what is refused before anything is loaded."""

from importlib.util import find_spec
from itertools import pairwise
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


def test_graphs_are_captured_for_full_steps_that_take_in_prompts(model: Path) -> None:
    gpu = "--no-enforce-eager"  # as where there is a GPU
    assert _flags(model).args.cudagraph_capture_sizes is None  # eager: none to capture
    sizes = _flags(model, gpu).args.cudagraph_capture_sizes
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1 and sizes[-1] == 2048
    gaps = pairwise(sizes[3:])
    assert all(after - size <= max(8, size // 8) for size, after in gaps)  # little padding


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-cudagraph-capture-size", "64"],
        ["--compilation-config", '{"max_cudagraph_capture_size": 64}'],
        ["--compilation-config", '{"cudagraph_capture_sizes": [1, 64]}'],
    ],
)
def test_graphs_of_the_operators_own_stay(model: Path, flags: list[str]) -> None:
    assert _flags(model, "--no-enforce-eager", *flags).args.cudagraph_capture_sizes is None
    own = _flags(model, "--no-enforce-eager", "--cudagraph-capture-sizes", "1", "64")
    assert own.args.cudagraph_capture_sizes == [1, 64]


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
        (["--lora-extra-vocab-size", "256"], "cannot grow a vocabulary"),
        (["--lora_extra_vocab_size=0"], "dropped it"),
        (["--lora-target-modules", "q_proj"], "without a word"),
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


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--no-enable-lora", "adapters are off"),
        ("--quantization=fp8", "quantised"),
        ("--fully-sharded-loras", "sharded by their rank"),
        ("--scheduler-cls=some.Scheduler", "the scheduler is another one"),
        ("--max-loras=4", "packs the base weights away"),
    ],
)
def test_flags_with_which_nothing_is_folded_are_named(model: Path, flag: str, why: str) -> None:
    build_engine(EngineName.VLLM, str(model), [])  # sets the environment, then imports vLLM
    from workers.engine.vllm_flags import parse_flags

    found = parse_flags(str(model), [flag], fold=True)
    assert why in (found.fold_refusal or "")
    ours = "" if flag == "--no-enable-lora" else "workers.engine.vllm_worker.WorkerExtension"
    assert found.args.worker_extension_cls == ours


def test_an_engine_that_may_fold_gets_a_scheduler_and_a_worker_of_ours(model: Path) -> None:
    build_engine(EngineName.VLLM, str(model), [])
    from workers.engine.vllm_flags import parse_flags

    mine = ["--worker-extension-cls", "tests.support.unpacked_cpu.UnpackedFold"]
    found = parse_flags(str(model), mine, fold=True)
    assert found.fold_refusal is None
    assert found.args.scheduler_cls.endswith(".fold_scheduler")
    off = parse_flags(str(model), mine)
    assert (off.args.scheduler_cls, off.fold_refusal) == (None, "folding is off (--fold off)")
