"""The command line: usage errors, exit codes, and what passes through to the engine."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli import jobs, main, output
from cli.services import split_model
from cli.up import serving
from cli.up.options import UpOptions, base_url, claim_port, is_loopback, parse_adapters
from core.errors import UsageError
from tests.support.processes import environment
from workers.launcher import WorkerSpec


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = main.USAGE) -> str:
    """The one line that a failing command writes to stderr."""
    assert main.run(list(arguments)) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lorry: ")
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


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
        (["up", "--port", "70000"], "--port"),
        (["steward", "--unknown"], "--unknown"),
        (["up", "--engine", "magic"], "--engine magic"),
        (["up", "--engine", "simulated", "--host", "0.0.0.0"], "--require-keys"),
        (["up", "--engine", "simulated", "--adapter", "x"], "NAME=FOLDER"),
        (["up", "--engine", "simulated", "--adapter", "x=/not/there"], "/not/there"),
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
    assert names in _fails(capsys, *arguments)


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
    message = _fails(capsys, *arguments)
    assert "LORRY_DATABASE_ULR" in message
    assert "did you mean LORRY_DATABASE_URL?" in message


def test_a_model_folder_without_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "config.json" in _fails(capsys, "up", str(tmp_path))


def test_a_taken_port_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = _fails(
            capsys, "up", "m", "--engine", "simulated", "--port", port, "--data-dir", str(data)
        )
    assert f"port {port}" in message
    assert "--port" in message
    assert not (data / "postgres").exists()


@pytest.mark.parametrize("command", [["keys", "list"], ["migrate"], ["top"]])
def test_no_running_stack_is_said(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(tmp_path) in _fails(capsys, *command, "--data-dir", str(tmp_path))


def test_a_stack_that_died_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    stack = {"url": "", "database_url": "", "broker_url": "", "store_url": "", "sockets": ""}
    stack["processes"] = {"lorry": [gone.pid, 1.0]}  # type: ignore[assignment]
    (tmp_path / "stack.json").write_text(json.dumps(stack))
    assert "has died" in _fails(capsys, "keys", "list", "--data-dir", str(tmp_path))


def test_an_unreachable_api_is_a_failure_not_a_usage_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("LORRY_URL", f"http://127.0.0.1:{port}")
    message = _fails(capsys, "jobs", "list", code=main.FAILED)
    assert "cannot be reached" in message
    assert "LORRY_URL" in message


def test_an_unreachable_database_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORRY_DATABASE_URL", f"postgresql://x@/x?host={tmp_path}")
    assert "Postgres" in _fails(capsys, "keys", "list", code=main.FAILED)


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.services.split_model", interrupt)
    assert main.run(["up"]) == main.INTERRUPTED


@contextmanager
def _api(*replies: tuple[int, dict[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """A server that gives fixed replies and remembers what it was asked."""
    left, asked = list(replies), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length) or "null")
            asked.append((self.command, self.path, body, dict(self.headers)))
            status, document = left.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        do_POST = do_GET  # noqa: N815  the name is the base class's

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _job(state: str, **fields: Any) -> dict[str, Any]:
    return {"id": "job_1", "object": "job", "state": state, **fields}


def test_submit_and_wait_prints_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"choices": [{"message": {"content": "Paris."}}]}
    replies = (
        (202, _job("queued")),
        (200, _job("running")),
        (200, _job("succeeded", response=answer)),
    )
    monkeypatch.setenv("LORRY_API_KEY", "k")
    with _api(*replies) as (url, asked):
        monkeypatch.setenv("LORRY_URL", url)
        code = main.run(["jobs", "submit", "Where?", "--model", "m", "--max-tokens", "5", "--wait"])
    assert code == 0
    assert capsys.readouterr().out == "Paris.\n"
    method, path, body, headers = asked[0]
    assert (method, path) == ("POST", "/v1/jobs")
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Where?"}],
        "max_completion_tokens": 5,
    }
    assert headers["Authorization"] == "Bearer k"
    assert asked[1][1] == "/v1/jobs/job_1?wait=30"


def test_a_job_that_failed_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = _job("failed", error={"code": "engine_error", "message": "it broke"})
    with _api((202, failed)) as (url, _):
        monkeypatch.setenv("LORRY_URL", url)
        assert main.run(["jobs", "submit", "Hm", "--model", "m", "--wait"]) == main.FAILED
    assert "it broke" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "document", "said"),
    [
        (404, {"title": "No such model", "detail": "did you mean 'sql'?"}, "did you mean 'sql'?"),
        (401, {"title": "Unauthorized", "detail": "a key is missing"}, "LORRY_API_KEY"),
        (400, {"error": {"message": "of the OpenAI shape"}}, "of the OpenAI shape"),
    ],
)
def test_a_refusal_is_one_line(
    status: int,
    document: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _api((status, document)) as (url, _):
        monkeypatch.setenv("LORRY_URL", url)
        assert said in _fails(capsys, "jobs", "cancel", "job_1", code=main.FAILED)


def test_json_is_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    page = {"object": "list", "data": [_job("queued")], "has_more": False, "last_id": "job_1"}
    with _api((200, page)) as (url, _):
        monkeypatch.setenv("LORRY_URL", url)
        assert main.run(["jobs", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == page


def test_a_table_in_a_pipe_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_rows([{"id": "x" * 300}], ["id"], as_json=False, none="")
    assert "x" * 300 in capsys.readouterr().out


def test_texts_of_both_kinds_of_response() -> None:
    assert jobs.answers({"response": {"choices": [{"text": "a"}, {"text": "b"}]}}) == ["a", "b"]
    assert jobs.answers({"response": None}) == []


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
