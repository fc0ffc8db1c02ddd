"""The command line: help, usage errors, exit codes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cli import main, webhooks
from tests.support.cli import fails
from tests.support.processes import environment


def test_help_is_quick_and_imports_no_service() -> None:
    probe = (
        "import sys, time; from cli import main; assert main.run(['--help']) == 0;"
        "heavy = {'asyncpg', 'celery', 'fastapi', 'httpx2', 'sqlalchemy', 'torch', 'vllm'};"
        "assert not heavy & set(sys.modules);"
        # processor time, since a busy machine must not fail it
        "assert time.process_time() < 0.5, time.process_time()"
    )
    subprocess.run([sys.executable, "-c", probe], env=environment(), check=True)


@pytest.mark.parametrize(
    "command", [["up"], ["worker"], ["jobs", "submit"], ["keys", "create"], ["top"]]
)
def test_every_command_explains_itself(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run([*command, "--help"]) == 0
    assert "Usage: lorry" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nonsense"], "nonsense"),
        (["jobs"], "command"),
        (["jobs", "submit", "Hello?"], "--model"),
        (["jobs", "get"], "job_id"),
        (["jobs", "list", "--state", "odd"], "odd"),
        (["jobs", "list", "--limit", "0"], "--limit"),
        (["models", "add", "m"], "--max-model-len"),
        (["models", "add", "m", "--max-model-len", "0"], "--max-model-len"),
        (["keys", "create"], "--tenant"),
        (["api", "--port", "x"], "--port"),
        (["webhooks", "update", "webhook_1"], "--enable"),
        (["webhooks", "update", "webhook_1", "--enable", "--disable"], "give one"),
        (["webhooks", "replay"], "--since"),
        (["webhooks", "replay", "--since", "soon"], "--since 'soon'"),
        (["webhooks", "listen", "--secret", "no base64"], "--secret"),
        (["up", "--port", "70000"], "--port"),
        (["steward", "--unknown"], "--unknown"),
        (["up", "--engine", "magic"], "--engine magic"),
        (["up", "--engine", "simulated", "--host", "0.0.0.0"], "--require-keys"),
        (["up", "--engine", "simulated", "--adapter", "x"], "NAME=FOLDER"),
        (["up", "--engine", "simulated", "--adapter", "x=/not/there"], "/not/there"),
        (["up", "--engine", "simulated", "--adapter", "x=hf://org/x"], "download it first"),
        (["up", "/not/there"], "/not/there"),
        (["worker"], "MODEL"),
        (["worker", "--max-loras", "2"], "MODEL"),
        (["worker", "m"], "LORRY_DATABASE_URL"),
        (["api"], "LORRY_DATABASE_URL"),
        (["steward"], "LORRY_DATABASE_URL"),
        (["top", "--every", "0"], "--every"),
    ],
)
def test_usage_errors_are_one_line_that_names_the_fault(
    arguments: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert names in fails(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["up"],
        ["api"],
        ["worker", "m"],
        ["steward"],
        ["migrate"],
        ["keys", "list"],
        ["jobs", "list"],
        ["top"],
    ],
)
def test_an_unknown_setting_is_refused_by_every_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_DATABASE_ULR", "postgresql://somewhere")
    message = fails(capsys, *arguments)
    assert "LORRY_DATABASE_ULR" in message
    assert "did you mean LORRY_DATABASE_URL?" in message


def test_a_model_folder_without_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "config.json" in fails(capsys, "up", str(tmp_path))


def test_a_taken_port_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = fails(
            capsys, "up", "m", "--engine", "simulated", "--port", port, "--data-dir", str(data)
        )
    assert f"port {port}" in message
    assert "--port" in message
    assert not (data / "postgres").exists()


@pytest.mark.parametrize("command", [["keys", "list"], ["migrate"], ["top"]])
def test_no_running_stack_is_said(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(tmp_path) in fails(capsys, *command, "--data-dir", str(tmp_path))


def test_a_stack_that_died_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    stack = {"url": "", "database_url": "", "broker_url": "", "store_url": "", "sockets": ""}
    stack["processes"] = {"lorry": [gone.pid, 1.0]}  # type: ignore[assignment]
    (tmp_path / "stack.json").write_text(json.dumps(stack))
    assert "has died" in fails(capsys, "keys", "list", "--data-dir", str(tmp_path))


def test_an_unreachable_api_is_a_failure_not_a_usage_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("LORRY_URL", f"http://127.0.0.1:{port}")
    message = fails(capsys, "jobs", "list", code=main.FAILED)
    assert "cannot be reached" in message
    assert "LORRY_URL" in message


def test_an_unreachable_database_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORRY_DATABASE_URL", f"postgresql://x@/x?host={tmp_path}")
    assert "Postgres" in fails(capsys, "keys", "list", code=main.FAILED)


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.services.split_model", interrupt)
    assert main.run(["up"]) == main.INTERRUPTED


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30m", 8200),
        ("2h", 2800),
        ("1d", 0),
        ("1234.5", 1234.5),
        ("1970-01-02", 86_400),
        ("1970-01-01T01:00:00+01:00", 0),
    ],
)
def test_times_to_replay_from(text: str, seconds: float) -> None:
    assert webhooks.moment(text, now=10_000) == seconds
