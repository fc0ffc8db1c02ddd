"""`lorry submit`, `lorry jobs` and their kin: what they ask of the API and what they print."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from cli import jobs, main, output
from tests.support.cli import fails


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

        do_POST = do_DELETE = do_GET  # noqa: N815  the names are the base class's

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
        assert said in fails(capsys, "jobs", "cancel", "job_1", code=main.FAILED)


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
    ("command", "asked_for"),
    [
        (["adapters", "remove"], "DELETE /v1/adapters/{}"),
        (["adapters", "versions"], "GET /v1/adapters/{}/versions"),
        (["batch", "cancel"], "POST /v1/batches/{}/cancel"),
        (["jobs", "get"], "GET /v1/jobs/{}"),
        (["schedules", "show"], "GET /v1/schedules/{}"),
        (["tasks", "remove"], "DELETE /v1/tasks/{}"),
        (["webhooks", "delete"], "DELETE /v1/webhooks/{}"),
    ],
)
def test_a_name_stays_a_name(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    asked_for: str,
) -> None:
    """Removing `sql?drain=true` must not remove `sql` and drain it."""
    with _api((404, {"detail": "there is none"})) as (url, asked):
        monkeypatch.setenv("LORRY_URL", url)
        fails(capsys, *command, "../a b/c?drain=true#d", code=main.FAILED)
    (method, path, *_), *more = asked
    sent = f"{method} {path.partition('?')[0]}"
    assert sent == asked_for.format("..%2Fa%20b%2Fc%3Fdrain%3Dtrue%23d")
    assert not more


def test_bytes_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "jobs", "get", "\udcff")
    assert "'\\udcff' cannot be written in utf-8" in said
