"""Batches on real processes: by OpenAI's own client, and by `lorry batch`."""

import asyncio
import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from db.database import Database
from tests.support.batches import (
    CHAT_URL,
    Counts,
    jsonl,
    line,
    openai_client,
    results,
    settled,
    submit,
)
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench
from tests.support.processes import environment, lorry, until
from tests.support.servers import PostgresServer, ValkeyServer

pytestmark = pytest.mark.processes

ADAPTERS = 5


@pytest.fixture(scope="module")
def running(
    postgres: PostgresServer,
    valkey: ValkeyServer,
    template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("batches")
    postgres.create_database("batches_openai", template)
    url = postgres.url("batches_openai")
    valkey.flush()

    async def prepare() -> None:
        async with Database.connect(url) as database:
            await make_bench(database, folder, ADAPTERS)

    asyncio.run(prepare())
    with Deployment(folder, url, valkey.url) as deployment:
        deployment.start_api()
        deployment.start_steward()
        deployment.start_worker(BASE, "--sim-step-ms=0.2")
        yield deployment
    postgres.drop_database("batches_openai")


@pytest.fixture
def client(running: Deployment) -> openai.OpenAI:
    return openai_client(running)


def test_a_batch_over_several_adapters(client: openai.OpenAI) -> None:
    content = jsonl(line(f"r{n}", f"a{n % ADAPTERS}", f"Say {n}") for n in range(2000))
    uploaded = client.files.create(file=("prompts.jsonl", content), purpose="batch")
    assert uploaded.bytes == len(content)
    batch = client.batches.create(
        input_file_id=uploaded.id,
        endpoint=CHAT_URL,
        completion_window="24h",
        metadata={"project": "demo"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert batch.status == "validating"
    assert batch.metadata == {"project": "demo"}
    counts = Counts()
    done = settled(client, batch, each=counts)
    assert done.status == "completed", done
    assert counts.seen[-1] == (2000, 2000, 0)
    assert done.error_file_id is None
    assert done.errors is None
    assert done.model is None
    answers = results(client, done.output_file_id)
    assert set(answers) == {f"r{n}" for n in range(2000)}
    answer = answers["r7"]
    assert answer["id"].startswith("batch_req_")
    assert answer["error"] is None
    assert answer["response"]["status_code"] == 200
    assert answer["response"]["body"]["object"] == "chat.completion"
    assert answer["response"]["body"]["model"] == "a2"
    assert done.usage is not None
    assert done.usage.output_tokens == 4 * 2000
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    output = client.files.retrieve(str(done.output_file_id))
    assert output.purpose == "batch_output"
    assert output.expires_at == output.created_at + 3600
    assert done.id in [each.id for each in client.batches.list(limit=100)]


def test_the_list_pages(client: openai.OpenAI) -> None:
    made = [submit(client, jsonl([line("a", "a0")])).id for _ in range(3)]
    page = client.batches.list(limit=2)
    assert [each.id for each in page.data] == made[:0:-1]
    assert page.has_more
    assert next(each.id for each in page.get_next_page().data) == made[0]


def test_the_example_of_vllm_run_batch_is_taken_as_it_is(
    client: openai.OpenAI, running: Deployment
) -> None:
    model = "meta-llama/Meta-Llama-3-8B-Instruct"
    running.start_worker("/nowhere/llama", "--served-model-name", model, "--sim-step-ms=0.1")
    content = (Path(__file__).parents[1] / "support/openai_example_batch.jsonl").read_bytes()
    done = settled(client, submit(client, content))
    assert done.status == "completed"
    assert done.model == model
    answers = results(client, done.output_file_id)
    assert set(answers) == {"request-1", "request-2"}
    # what a reader of vllm run-batch's output reads
    for answer in answers.values():
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["choices"][0]["message"]["content"]


def test_lines_that_fail_stand_in_the_error_file(client: openai.OpenAI) -> None:
    lines = [line(f"r{n}", "a0", "word " * (9000 if n % 3 == 0 else 1)) for n in range(30)]
    counts = Counts()
    done = settled(client, submit(client, jsonl(lines)), each=counts)
    assert done.status == "completed"
    assert counts.seen[-1] == (30, 20, 10)
    failed = results(client, done.error_file_id)
    assert set(failed) == {f"r{n}" for n in range(0, 30, 3)}
    assert failed["r0"]["response"] is None
    assert failed["r0"]["error"]["code"] == "context_length_exceeded"
    assert len(results(client, done.output_file_id)) == 20


def test_a_cancelled_batch_keeps_what_was_finished(client: openai.OpenAI) -> None:
    lines = [line(f"r{n}", "a0", max_tokens=2000, ignore_eos=True) for n in range(3000)]
    quick = [line(f"q{n}", "a1") for n in range(20)]
    batch = submit(client, jsonl(quick + lines))
    counts = Counts()

    def cancel_when_some_are_done(seen: Any) -> None:
        counts(seen)
        if seen.request_counts.completed >= 20 and seen.status == "in_progress":
            assert client.batches.cancel(seen.id).status == "cancelling"

    done = settled(client, batch, each=cancel_when_some_are_done)
    assert done.status == "cancelled"
    total, completed, failed = counts.seen[-1]
    assert total == 3020
    answers, errors = results(client, done.output_file_id), results(client, done.error_file_id)
    assert len(answers) == completed >= 20
    assert len(errors) == failed
    assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
    assert set(answers) | set(errors) == {each["custom_id"] for each in quick + lines}
    assert client.batches.cancel(done.id).status == "cancelled"


def test_a_batch_whose_window_ends_keeps_what_was_finished(client: openai.OpenAI) -> None:
    slow = [line(f"s{n}", "a0", max_tokens=8000, ignore_eos=True) for n in range(2000)]
    quick = [line(f"q{n}", "a1") for n in range(20)]
    counts = Counts()
    done = settled(client, submit(client, jsonl(quick + slow), "4s"), each=counts)
    assert done.status == "expired"
    answers, errors = results(client, done.output_file_id), results(client, done.error_file_id)
    assert {f"q{n}" for n in range(20)} <= set(answers)
    assert {each["error"]["code"] for each in errors.values()} == {"batch_expired"}
    assert len(answers) + len(errors) == 2020


def test_bad_lines_may_be_skipped(client: openai.OpenAI) -> None:
    lines = jsonl([line("good", "a0")]) + b"no json\n" + jsonl([line("lost", "nothing")])
    done = settled(client, submit(client, lines, skip_invalid=True))
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.total == 3
    assert done.request_counts.failed == 2
    assert set(results(client, done.output_file_id)) == {"good"}
    text = client.files.content(str(done.error_file_id)).text
    assert "line 2: This line is not parseable" in text
    assert '"model_not_found"' in text


def test_a_batch_of_bad_lines_alone(client: openai.OpenAI) -> None:
    done = settled(client, submit(client, b"no json\n" * 1500, skip_invalid=True))
    assert done.status == "completed"
    assert done.output_file_id is None
    assert len(client.files.content(str(done.error_file_id)).text.splitlines()) == 1500


def test_results_can_be_read_while_they_come(client: openai.OpenAI, running: Deployment) -> None:
    lines = [line(f"r{n}", f"a{n % ADAPTERS}", max_tokens=40) for n in range(3000)]
    batch = submit(client, jsonl(lines))
    read: list[str] = []

    def read_on(_: Any) -> None:
        path = f"/v1/batches/{batch.id}/results"
        response = running.client.get(path, params={"after": len(read)})
        assert response.status_code == 200, response.text
        read.extend(response.text.splitlines())

    done = settled(client, batch, each=read_on)
    read_on(None)
    files = [done.output_file_id, done.error_file_id]
    written = [text for id_ in files if id_ for text in client.files.content(id_).text.splitlines()]
    assert sorted(read) == sorted(written)
    assert len(read) == 3000


def test_a_repeat_under_a_key_makes_no_second_batch(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", jsonl([line("a", "a0")])), purpose="batch")
    asked: Any = {"input_file_id": file.id, "endpoint": CHAT_URL, "completion_window": "24h"}
    key = {"Idempotency-Key": "nightly-1"}
    first = client.batches.create(**asked, extra_headers=key)
    assert client.batches.create(**asked, extra_headers=key).id == first.id
    with pytest.raises(openai.BadRequestError, match="another body"):
        client.batches.create(**{**asked, "completion_window": "1h"}, extra_headers=key)


def test_what_was_used_is_summed_by_adapter_and_day(
    client: openai.OpenAI, running: Deployment
) -> None:
    def used() -> dict[Any, int]:
        rows = running.client.get("/v1/usage").json()["data"]
        return {row["adapter"]: row["output_tokens"] for row in rows}

    before = used().get("a4", 0)
    settled(client, submit(client, jsonl(line(f"r{n}", "a4") for n in range(50))))
    assert used()["a4"] == before + 200


# --- the command line -----------------------------------------------------------------------------


def command(running: Deployment, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return lorry(*arguments, LORRY_URL=f"http://127.0.0.1:{running.port}")


def test_a_text_file_becomes_answers_in_its_order(running: Deployment, tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    source.write_text("".join(f"Question {n}\n" for n in range(700)))
    done = command(running, "batch", "run", str(source), "--model", "a1", "-o", str(target))
    assert done.returncode == 0, done.stderr
    assert "700 done, 0 failed" in done.stderr
    found = [json.loads(text) for text in target.read_text().splitlines()]
    assert [each["custom_id"] for each in found] == [f"line-{n}" for n in range(1, 701)]
    assert {each["response"]["body"]["model"] for each in found} == {"a1"}


def test_a_table_with_a_template_and_failures_in_their_places(
    running: Deployment, tmp_path: Path
) -> None:
    source, target = tmp_path / "rows.csv", tmp_path / "answers.csv"
    long = "word " * 9000
    source.write_text(f"text,kind\nfirst,x\n{long},y\n" + '"third, with\na line feed",z\n')
    done = command(
        running,
        *("batch", "run", str(source), "--model", "a0", "-o", str(target)),
        *("--template", "As {kind}: {text}", "--max-tokens", "3"),
    )
    assert done.returncode == 1, done.stderr
    assert "2 done, 1 failed" in done.stderr
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["custom_id"] for row in rows] == ["line-2", "line-3", "line-5"]
    assert [bool(row["answer"]) for row in rows] == [True, False, True]
    assert "context" in rows[1]["error"]


def test_a_detached_batch_can_be_attached_to(running: Deployment, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.txt"
    source.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    made = command(running, "batch", "run", str(source), "--model", "a0", "--detach")
    batch_id = made.stdout.strip()
    done = command(running, "batch", "attach", batch_id, "-o", str(target))
    assert done.returncode == 0, done.stderr
    assert len(target.read_text().splitlines()) == 2
    shown = json.loads(command(running, "batch", "show", batch_id, "--json").stdout)
    assert shown["status"] == "completed"
    assert batch_id in command(running, "batch", "list").stdout
    read = command(running, "batch", "results", batch_id, "--after", "1").stdout
    assert len(read.splitlines()) == 1
    assert command(running, "batch", "cancel", batch_id).stdout == "completed\n"


def test_bad_lines_are_told_with_their_numbers(running: Deployment, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "one"}\n\n\n{"prompt": "two", "model": "nothing"}\n')
    done = command(running, "batch", "run", str(source), "--model", "a0")
    assert done.returncode == 1
    assert "line 4: model 'nothing' does not exist" in done.stderr
    source.write_bytes(source.read_bytes() + b'no json\n\xff\xfe\n"a fine one"\n')
    target = tmp_path / "out.jsonl"
    options = ("--model", "a0", "--skip-invalid", "-o", str(target))
    skipped = command(running, "batch", "run", str(source), *options)
    assert skipped.returncode == 1
    assert "2 done, 3 failed" in skipped.stderr
    found = [json.loads(text) for text in target.read_text().splitlines()]
    said = [(each["error"] or {}).get("message", "")[:8] for each in found]
    assert said == ["", "line 4: ", "line 5: ", "line 6: ", ""]


def test_ctrl_c_leaves_the_batch_running_and_says_how_to_come_back(
    running: Deployment, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    bodies = [{"prompt": f"p{n}", "max_tokens": 8000, "ignore_eos": True} for n in range(600)]
    source.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "batch", "run", str(source), "--model", "a0"],
        env=environment(LORRY_URL=f"http://127.0.0.1:{running.port}"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    client = openai_client(running)
    until(lambda: client.batches.list(limit=1).data[0].status == "in_progress", 30, "its start")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    batch = client.batches.list(limit=1).data[0]
    assert f"lorry batch attach {batch.id}" in said
    assert client.batches.retrieve(batch.id).status == "in_progress"
    client.batches.cancel(batch.id)
