"""Schedules on real processes: by `lorry schedules`, and with the real engine every minute."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from platformdirs import user_cache_path

from cli.demo.base import DEMO_BASE, ensure_base
from db import adapters, registry
from db.database import Database
from db.store import Store
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench
from tests.support.listener import Listener
from tests.support.processes import REPOSITORY, lorry, until
from tests.support.scale import Scale
from tests.support.servers import PostgresServer, ValkeyServer, in_thread

pytestmark = pytest.mark.processes

START_SECONDS = 240


@pytest.fixture(scope="module")
def running(
    postgres: PostgresServer,
    valkey: ValkeyServer,
    template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("schedules")
    postgres.create_database("schedules_cli", template)
    url = postgres.url("schedules_cli")

    async def prepare() -> None:
        async with Database.connect(url) as database:
            await make_bench(database, folder, 2)

    asyncio.run(prepare())
    # a broker that nobody answers at: schedules do without
    with Deployment(folder, url, "redis://127.0.0.1:1/0") as deployment:
        deployment.start_api()
        deployment.start_steward()
        deployment.start_worker(BASE, "--sim-step-ms=0.2")
        yield deployment
    postgres.drop_database("schedules_cli")


def command(running: Deployment, *arguments: str, fails: int = 0) -> str:
    done = lorry("schedules", *arguments, LORRY_URL=f"http://127.0.0.1:{running.port}")
    assert done.returncode == fails, done.stderr
    return done.stderr if fails else done.stdout


def runs(running: Deployment, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(command(running, "runs", name, "--json"))["data"]
    return found


def ended(running: Deployment, name: str, count: int = 1, seconds: float = 60) -> Any:
    """The runs, once so many have finished."""

    def look() -> Any:
        found = [run for run in runs(running, name) if run["state"] == "finished"]
        return found if len(found) >= count else None

    return until(look, seconds, f"{count} finished runs of {name}")


def answers(running: Deployment, run: dict[str, Any]) -> list[Any]:
    batch = running.client.get(f"/v1/batches/{run['batch']['id']}").json()
    text = running.client.get(f"/v1/files/{batch['output_file_id']}/content").text
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_of_prompts_every_second(running: Deployment, tmp_path: Path) -> None:
    source = tmp_path / "prompts.txt"
    source.write_text("One?\nTwo?\n")
    made = command(
        running, "create", "seconds", "--every", "1s", "--prompts", str(source), "--model", "a0",
        "--max-tokens", "3", "--metadata", "team=x",
    )  # fmt: skip
    assert "every 1 s" in made
    for run in ended(running, "seconds", 3)[-3:]:
        assert run["batch"]["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
        assert run["lateness_seconds"] < 30
        assert {each["response"]["body"]["model"] for each in answers(running, run)} == {"a0"}
    table = command(running, "runs", "seconds")
    assert "completed" in table
    assert " s " in table
    assert command(running, "pause", "seconds") == "paused\n"
    assert "paused" in command(running, "list")
    assert command(running, "change", "seconds", "--every", "2h", "--model", "a1")
    shown = json.loads(command(running, "show", "seconds", "--json"))
    assert (shown["every_seconds"], shown["model"]) == (7200, "a1")
    assert "a1" in command(running, "show", "seconds")
    assert command(running, "resume", "seconds") == "active\n"
    before = len(runs(running, "seconds"))
    run, state = command(running, "run-now", "seconds").split()
    assert run.startswith("run_")
    assert state in {"pending", "queued", "started"}  # a steward may have begun it already
    last = until(
        lambda: len(found := ended(running, "seconds")) and found[0]["trigger"] == "manual"
        and found[0], 30, "the run that was asked for",
    )  # fmt: skip
    assert {each["response"]["body"]["model"] for each in answers(running, last)} == {"a1"}
    assert len(runs(running, "seconds")) == before + 1
    assert "skipped" in command(running, "skip-next", "seconds")
    assert command(running, "delete", "seconds").startswith("deleted schedule_")
    command(running, "show", "seconds", fails=1)


def test_rows_with_a_template_and_prompts_given_with_it(
    running: Deployment, tmp_path: Path
) -> None:
    source = tmp_path / "rows.csv"
    source.write_text("text\nfirst\nsecond\n")
    command(
        running, "create", "rows", "--cron", "@yearly", "--timezone", "Europe/Berlin",
        "--rows", str(source), "--template", "Say {text}", "--model", "a0", "--max-tokens", "3",
    )  # fmt: skip
    command(running, "run-now", "rows")
    (run,) = ended(running, "rows")
    assert [each["custom_id"] for each in answers(running, run)] == ["row-2", "row-3"]
    command(running, "change", "rows", "--prompt", "One?", "--prompt", "Two?", "--max-tokens", "2")
    command(running, "run-now", "rows")
    newest = ended(running, "rows", 2)[0]
    assert {each["custom_id"] for each in answers(running, newest)} == {"request-1", "request-2"}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--cron", "61 * * * *"], 1, "the minute '61'"),
        (["--cron", "0 0 30 2 *"], 1, "never fires"),
        (["--cron", "0 2 * * *", "--timezone", "Mars/Base"], 1, "'Mars/Base' is not known"),
        (["--every", "0s"], 2, "--every '0s': give a duration from 1s"),
        (["--every", "1h", "--start", "2027-05-02", "--end", "2027-05-01"], 1, "is not behind"),
        (["--at", "yesterday"], 2, "--at 'yesterday': give a time"),
        (["--at", "2020-01-01T00:00Z"], 1, "has passed"),
    ],
)
def test_bad_rules_are_one_line(
    running: Deployment, options: list[str], code: int, said: str
) -> None:
    error = command(
        running, "create", "bad", *options, "--prompt", "x", "--model", BASE, fails=code
    )
    assert said in error
    assert error.count("\n") == 1


def test_a_rule_is_previewed(running: Deployment) -> None:
    rule = ("--cron", "30 2 * * *", "--timezone", "Europe/Berlin", "--start", "2027-03-27T00:00")
    shown = command(running, "preview", *rule, "--count", "2")
    assert "2027-03-28T03:00:00+02:00" in shown
    assert "2027-03-28T01:00:00Z" in shown


# --- with the real engine -------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_every_minute_on_the_real_engine(
    database_url: str, broker_url: str, tmp_path: Path, scale: Scale
) -> None:
    """A cron rule of every minute for three minutes: the answers are there, late by little, and a
    receiver was told of each batch."""
    if not scale.full:
        pytest.skip("three minutes: with --full")
    base = ensure_base(user_cache_path("lorry"), print)

    async def prepare() -> None:
        async with Database.connect(database_url) as database:
            await registry.declare_base(database, DEMO_BASE, 512, "test")
            await adapters.register_ready(
                database,
                Store.open(str(tmp_path / "store")),
                tenant="default",
                base_model=DEMO_BASE,
                name="sql",
                folder=REPOSITORY / "cli" / "demo" / "adapters" / "sql",
            )

    in_thread(prepare)
    source = tmp_path / "questions.csv"
    source.write_text("table\norders(id, day)\nfilms(id, title)\n")
    allowed = {"LORRY_WEBHOOK_ALLOW": "127.0.0.0/8"}
    with (
        Deployment(tmp_path, database_url, broker_url, **allowed) as deployment,
        ExitStack() as end,
    ):
        deployment.start_api()
        deployment.start_steward()
        secret = lorry("webhooks", "secret", LORRY_URL=f"http://127.0.0.1:{deployment.port}")
        listener = Listener(deployment, "--port", "0", "--secret", secret.stdout.strip())
        end.callback(listener.stop)
        flags = ("--max-model-len", "512", "--max-num-seqs", "8", "--max-lora-rank", "16")
        worker = deployment.start("worker", str(base), *flags, "--served-model-name", DEMO_BASE)
        worker.wait_log("ready:", START_SECONDS)
        command(
            deployment, "create", "every-minute", "--cron", "* * * * *", "--rows", str(source),
            "--template", "Table {table}. How many are there?", "--model", "sql",
            "--max-tokens", "24", "--temperature", "0", "--webhook-url", listener.url,
        )  # fmt: skip
        found = ended(deployment, "every-minute", 3, seconds=300)
        print(command(deployment, "runs", "every-minute"))
        for run in found[-3:]:
            assert run["batch"]["status"] == "completed"
            assert run["batch"]["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
            assert 0 <= run["lateness_seconds"] < 30
            for each in answers(deployment, run):
                body = each["response"]["body"]
                assert body["model"] == "sql"
                assert "SELECT" in body["choices"][0]["message"]["content"]
        firings = [run["fire_at"] for run in found[-3:]]
        assert firings[0] - firings[2] == 2 * 60
        assert len({run["batch"]["id"] for run in found}) == len(found)
        told = listener.got(len(found))
        assert all(each["verified"] for each in told)
        assert {each["event"]["type"] for each in told} == {"batch.completed"}
        assert {each["event"]["data"]["id"] for each in told} >= {r["batch"]["id"] for r in found}
