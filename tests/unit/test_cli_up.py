"""`lorry up` and `lorry worker`: which options they take, and what passes through to the engine."""

from pathlib import Path
from typing import Any

import pytest

from cli import main
from cli.services import split_model
from cli.up import serving
from cli.up.options import UpOptions, base_url, claim_port, is_loopback, parse_adapters
from cli.up.servers import sized_for
from core.errors import UsageError
from workers.launcher import WorkerSpec


def test_engine_flags_pass_through_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE", "BROKER", "STORE"):
        monkeypatch.setenv(f"LORRY_{name}_URL", "somewhere")
    launched: list[WorkerSpec] = []

    def launch(spec: WorkerSpec) -> int:
        launched.append(spec)
        return 7

    monkeypatch.setattr("workers.launcher.launch", launch)
    flags = [
        "-tp",
        "2",
        "--max-loras=8",
        "--hf-overrides",
        '{"a": -1}',
        "-O3",
        "--no-enable-x",
        "-1",
    ]
    code = main.run(["worker", "org/model", *flags[:4], "--engine", "simulated", *flags[4:]])
    assert code == 7
    assert launched[0].model == "org/model"
    assert launched[0].flags == tuple(flags)
    assert launched[0].engine == "simulated"
    assert (launched[0].pin, launched[0].partitions) == ((), None)
    assert main.run(["worker", "m", "--pin", "a, b", "--partitions", "3,9999"]) == 7
    assert (launched[1].pin, launched[1].partitions) == (("a", "b"), (3, 9999))
    assert main.run(["worker", "m", "--partitions", "10000"]) == main.USAGE


@pytest.mark.parametrize("number", ["ten", "-1", "10000", "٣"])
def test_a_partition_that_is_none_is_refused(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["adapters", "partition", "a", "--", number]) == main.USAGE
    assert f"partition {number}: give a number from 0 to 9999, or auto" in capsys.readouterr().err


def test_postgres_gets_a_quarter_of_the_memory_within_bounds() -> None:
    assert sized_for(16 * 2**30)["shared_buffers"] == "4096MB"
    assert sized_for(16 * 2**30)["effective_cache_size"] == "8192MB"
    assert sized_for(2**40)["shared_buffers"] == "8192MB"
    assert sized_for(2**20)["shared_buffers"] == "128MB"


def _options(**fields: Any) -> UpOptions:
    usual: dict[str, Any] = {"model": "m", "host": "127.0.0.1", "port": 0, "engine": "simulated"}
    usual |= {"data_dir": Path("d"), "cache_dir": Path("c"), "require_keys": False}
    return UpOptions(**{**usual, "adapters": (), "flags": (), **fields})


def test_what_is_served_is_named_as_the_engines_name_it(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 4096}')
    what = serving.choose(_options(model=str(folder), engine="vllm"))
    assert (what.name, what.context) == ("my-model", 4096)
    flags = ("--served_model_name=other", "--max-model-len", "100")
    what = serving.choose(_options(model=str(folder), engine="vllm", flags=flags))
    assert (what.name, what.context, what.flags) == ("other", 100, flags)
    assert serving.choose(_options(model="org/name", engine="vllm")).context is None


def test_without_a_model_the_demo_is_served() -> None:
    simulated = serving.choose(_options(model=None))
    assert (simulated.name, simulated.flags, simulated.makes_base) == (
        "SmolLM2-135M-Instruct",
        (),
        False,
    )
    real = serving.choose(_options(model=None, engine="vllm"))
    assert real.flags == serving.DEMO_FLAGS
    assert real.makes_base
    assert real.context == 2048
    assert {name for name, _ in real.adapters} <= set(serving.DEMO_ADAPTERS)


def test_adapters_need_a_known_context(tmp_path: Path) -> None:
    adapters = parse_adapters([f"a={tmp_path}"])
    with pytest.raises(UsageError, match="--max-model-len"):
        serving.choose(_options(model="org/name", engine="vllm", adapters=adapters))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "", "localhost.example.com"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_a_free_port_is_found_and_addressed() -> None:
    port = claim_port("127.0.0.1", 0)
    assert port > 0
    assert base_url("::1", port) == f"http://[::1]:{port}"
    assert base_url("0.0.0.0", port) == f"http://127.0.0.1:{port}"
    with pytest.raises(UsageError, match="no such address"):
        claim_port("no.such.host.invalid", 1)


@pytest.mark.parametrize(
    ("arguments", "model", "flags"),
    [
        ([], None, ()),
        (["m", "--max-loras", "8"], "m", ("--max-loras", "8")),
        (["--max-loras", "8"], None, ("--max-loras", "8")),
        (["--max-loras", "8", "m"], None, ("--max-loras", "8", "m")),
    ],
)
def test_the_model_comes_first_or_not_at_all(
    arguments: list[str], model: str | None, flags: tuple[str, ...]
) -> None:
    assert split_model(arguments) == (model, flags)
