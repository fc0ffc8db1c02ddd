"""`lorry up` as a user has it: a real stack that starts, stops, is killed, and finds its data."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import httpx2
import psutil
import pytest

from cli.demo.base import DEMO_BASE
from tests.support.processes import LorryUp, Tree, environment, lorry, marked, until
from tests.support.scale import Scale

pytestmark = pytest.mark.processes

#: Time for a start on a busy machine, and for everything of a killed stack to be gone.
START_SECONDS = 60.0
GONE_SECONDS = 15.0
SIMULATED = ("sim-base", "--engine", "simulated")
#: A job that runs until it is stopped: 5,000 tokens of 20 ms each.
ENDLESS = {"max_completion_tokens": 5_000, "ignore_eos": True}
#: Jobs of a worker that died are back in a few seconds.
QUICK = {"LORRY_LEASE_SECONDS": "2", "LORRY_SWEEP_SECONDS": "0.5"}
SLOW = (*SIMULATED, "--sim-step-ms", "20")


@pytest.fixture
def fresh_dir() -> Iterator[Path]:
    """A data folder that PostgreSQL's own user can reach, which pytest's are not."""
    with TemporaryDirectory(prefix="lorry-up-") as folder:
        yield Path(folder) / "data"


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """One that outlives the stacks of several tests: each finds what the one before left."""
    with TemporaryDirectory(prefix="lorry-up-") as folder:
        yield Path(folder) / "data"


def _running(stack: LorryUp, job_id: str) -> None:
    until(lambda: stack.job(job_id)["state"] == "running", 20, f"{job_id} to run: {stack.log()}")


def _answers(stack: LorryUp) -> bool:
    """Whether a job is taken and answered now."""
    try:
        return bool(stack.job(stack.submit("sim-base", "?"), wait=5)["state"] == "succeeded")
    except (AssertionError, KeyError, ValueError, httpx2.TransportError):
        return False  # refused, or answered by a problem document


def _first_child(stack: LorryUp) -> None:
    until(lambda: len(stack.tree().living()) > 1, 10, "a first child")


def test_serves_until_sigterm_and_finds_its_data_again(data_dir: Path) -> None:
    with LorryUp(data_dir, *SIMULATED) as stack:
        facts = stack.wait_ready(START_SECONDS)
        assert facts["model"] == "sim-base"
        assert facts["engine"] == "simulated"
        job_id = stack.submit("sim-base", "Hello?")
        assert stack.job(job_id, wait=20)["state"] == "succeeded"
        key = lorry("keys", "create", "--tenant", "acme", "--data-dir", str(data_dir))
        assert key.stdout.startswith("lorry_"), key.stderr
        assert key.stdout.count("\n") == 1
        second = lorry("up", *SIMULATED, "--data-dir", str(data_dir), "--port", "0")
        assert second.returncode == 2
        assert "another `lorry up` runs on" in second.stderr
        tree = stack.tree()
        stack.process.send_signal(signal.SIGTERM)
        assert stack.process.wait(30) == 0
        tree.assert_gone(1)
        assert stack.process.stdout is not None
        assert not stack.process.stdout.read(), "one line on stdout, the ready line"
    assert not (data_dir / "stack.json").exists()
    with LorryUp(data_dir, *SIMULATED) as stack:
        stack.wait_ready(START_SECONDS)
        assert stack.job(job_id)["state"] == "succeeded"
        keys = lorry("keys", "list", "--json", "--data-dir", str(data_dir))
        assert [row["tenant"] for row in json.loads(keys.stdout)] == ["acme"]


def test_ctrl_c_in_mid_generation_drains_and_twice_hurries(fresh_dir: Path) -> None:
    with LorryUp(fresh_dir, *SLOW, LORRY_GRACE_SECONDS="60") as stack:
        stack.wait_ready(START_SECONDS)
        _running(stack, stack.submit("sim-base", "Go on", **ENDLESS))
        tree = stack.tree()
        stack.interrupt()
        stack.wait_log("stopping worker", 20)
        stack.interrupt()
        assert stack.process.wait(20) == 130
        tree.assert_gone(1)


def test_sigkill_in_mid_generation_leaves_no_process_and_loses_no_job(data_dir: Path) -> None:
    with LorryUp(data_dir, *SLOW, **QUICK) as stack:
        stack.wait_ready(START_SECONDS)
        job_id = stack.submit("sim-base", "Go on", **{**ENDLESS, "max_completion_tokens": 200})
        _running(stack, job_id)
        tree = stack.tree()
        stack.process.kill()
        # at once, as an impatient user would: it waits for what the killed one leaves behind
        with LorryUp(data_dir, *SLOW, **QUICK) as again:
            again.wait_ready(START_SECONDS)
            assert not tree.living(), tree.names()
            until(lambda: again.job(job_id)["state"] == "succeeded", 60, again.log())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_it_starts_leaves_no_process(fresh_dir: Path, number: signal.Signals) -> None:
    for moment in ("starting PostgreSQL", "starting worker"):
        with LorryUp(fresh_dir, *SIMULATED) as stack:
            stack.wait_log(moment, START_SECONDS)
            _first_child(stack)
            tree = stack.tree()
            stack.process.send_signal(number)
            assert stack.process.wait(30) == (130 if number is signal.SIGINT else -number)
            tree.assert_gone(GONE_SECONDS)
    with LorryUp(fresh_dir, *SIMULATED) as stack:
        stack.wait_ready(START_SECONDS)


def test_a_part_that_dies_is_started_again(data_dir: Path) -> None:
    with LorryUp(data_dir, *SIMULATED, **QUICK) as stack:
        stack.wait_ready(START_SECONDS)
        for part in ("api", "worker", "postgres", "valkey"):
            tether, _ = json.loads((data_dir / "stack.json").read_text())["processes"][part]
            (program,) = psutil.Process(tether).children()
            os.kill(program.pid, signal.SIGKILL)
            stack.wait_log(f"{part} ended", 20)
            until(lambda: _answers(stack), 60, f"an answer without {part}: {stack.log()}")


def test_a_flag_that_the_engine_refuses_stops_the_stack_with_its_message(data_dir: Path) -> None:
    with LorryUp(data_dir, *SIMULATED, "--no-such-flag", "1") as stack:
        assert stack.process.wait(START_SECONDS) == 2
        assert stack.log().splitlines()[-1].startswith("lorry: simulated engine:")
        assert "--no-such-flag" in stack.log().splitlines()[-1]
        assert not marked(stack.mark)


def test_servers_of_the_users_own_and_keys(
    fresh_dir: Path, database_url: str, broker_url: str
) -> None:
    servers = {"LORRY_DATABASE_URL": database_url, "LORRY_BROKER_URL": broker_url}
    with LorryUp(fresh_dir, *SIMULATED, "--require-keys", **servers) as stack:
        stack.wait_ready(START_SECONDS)
        assert not {"postgres", "valkey"} & {path.name for path in fresh_dir.iterdir()}
        stack.wait_log("lorry keys create --tenant default", 5)
        url = f"{stack.url}/v1/models"
        assert httpx2.get(url).status_code == 401
        key = lorry("keys", "create", "--tenant", "default", **servers).stdout.strip()
        client = {"LORRY_URL": stack.url, "LORRY_API_KEY": key}
        asked = lorry("jobs", "submit", "--model", "sim-base", "Hello?", "--wait", **client)
        assert asked.returncode == 0, asked.stderr
        assert asked.stdout.startswith("simulated base")
        revoked = lorry("keys", "revoke", key[:12], **servers)
        assert revoked.returncode == 0, revoked.stderr
        assert lorry("jobs", "list", **client).returncode == 1


def test_demo_says_last_how_it_went() -> None:
    demo = lorry("demo", "--engine", "simulated")
    assert demo.returncode == 0, demo.stderr
    last = demo.stdout.splitlines()[-1]
    assert re.fullmatch(r"demo: 24 jobs, 24 succeeded, \d+ tok/s, [\d.]+ s", last), last


def test_sigkill_of_the_demo_leaves_no_process() -> None:
    mark = uuid4().hex
    command = [sys.executable, "-m", "cli.main", "demo", "--engine", "simulated"]
    with subprocess.Popen(
        command, env=environment(mark), stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        next(line for line in demo.stdout if "starting worker" in line)
        tree = Tree(demo.pid, mark)
        demo.kill()
    tree.assert_gone(GONE_SECONDS)


@pytest.mark.vllm
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_vllm_in_mid_generation_leaves_no_process(
    data_dir: Path, number: signal.Signals, scale: Scale
) -> None:
    """The kinder signal with --full: other tests stop vLLM in order."""
    if number is signal.SIGINT and not scale.full:
        pytest.skip("vLLM is started once here: with --full")
    with LorryUp(data_dir, LORRY_GRACE_SECONDS="1") as stack:
        stack.wait_ready(240)
        jobs = [
            stack.submit(DEMO_BASE, f"Story {i}", max_completion_tokens=1_500, ignore_eos=True)
            for i in range(8)
        ]
        _running(stack, jobs[0])
        tree = stack.tree()
        assert any("VLLM" in name for name in tree.names()), tree.names()
        if number is signal.SIGINT:
            stack.interrupt()
        else:
            stack.process.kill()
        stack.process.wait(60)
        tree.assert_gone(GONE_SECONDS)
