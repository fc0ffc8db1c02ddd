"""`lorry up` as a user has it: a real stack that starts, stops, is killed, and finds its data."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from cli.demo.base import DEMO_BASE
from tests.support.processes import LorryUp, lorry, marked, until

pytestmark = pytest.mark.processes

#: Time for a start on a busy machine, and for everything of a killed stack to be gone.
START_SECONDS = 60.0
GONE_SECONDS = 15.0
SIMULATED = ("sim-base", "--engine", "simulated")
#: A job that runs until it is stopped: 5,000 tokens of 20 ms each.
ENDLESS = {"max_completion_tokens": 5_000, "ignore_eos": True}
SLOW = (*SIMULATED, "--sim-step-ms", "20")


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A data folder that PostgreSQL's own user can reach, which pytest's are not."""
    with TemporaryDirectory(prefix="lorry-up-") as folder:
        yield Path(folder) / "data"


def _running(stack: LorryUp, job_id: str) -> None:
    until(lambda: stack.job(job_id)["state"] == "running", 20, f"{job_id} to run: {stack.log()}")


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


def test_ctrl_c_in_mid_generation_drains_and_twice_hurries(data_dir: Path) -> None:
    with LorryUp(data_dir, *SLOW, LORRY_GRACE_SECONDS="60") as stack:
        stack.wait_ready(START_SECONDS)
        _running(stack, stack.submit("sim-base", "Go on", **ENDLESS))
        tree = stack.tree()
        stack.interrupt()
        stack.wait_log("stopping worker", 20)
        stack.interrupt()
        assert stack.process.wait(20) == 130
        tree.assert_gone(1)


def test_sigkill_in_mid_generation_leaves_no_process_and_loses_no_job(data_dir: Path) -> None:
    with LorryUp(data_dir, *SLOW) as stack:
        stack.wait_ready(START_SECONDS)
        job_id = stack.submit("sim-base", "Go on", **{**ENDLESS, "max_completion_tokens": 200})
        _running(stack, job_id)
        tree = stack.tree()
        stack.process.kill()
        # at once, as an impatient user would: it waits for what the killed one leaves behind
        with LorryUp(data_dir, *SLOW, LORRY_LEASE_SECONDS="2") as again:
            again.wait_ready(START_SECONDS)
            assert not tree.living(), tree.names()
            until(lambda: again.job(job_id)["state"] == "succeeded", 60, again.log())


@pytest.mark.parametrize("moment", ["starting PostgreSQL", "starting worker"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_it_starts_leaves_no_process(
    data_dir: Path, moment: str, number: signal.Signals
) -> None:
    with LorryUp(data_dir, *SIMULATED) as stack:
        stack.wait_log(moment, START_SECONDS)
        until(lambda: len(stack.tree().living()) > 1, 10, "a first child")
        tree = stack.tree()
        stack.process.send_signal(number)
        assert stack.process.wait(30) == (130 if number is signal.SIGINT else -signal.SIGKILL)
        tree.assert_gone(GONE_SECONDS)
    with LorryUp(data_dir, *SIMULATED) as stack:
        stack.wait_ready(START_SECONDS)


@pytest.mark.parametrize("part", ["api", "worker", "postgres", "valkey"])
def test_a_part_that_dies_is_started_again(data_dir: Path, part: str) -> None:
    with LorryUp(data_dir, *SIMULATED, LORRY_LEASE_SECONDS="2") as stack:
        stack.wait_ready(START_SECONDS)
        tether, _ = json.loads((data_dir / "stack.json").read_text())["processes"][part]
        (program,) = psutil.Process(tether).children()
        os.kill(program.pid, signal.SIGKILL)
        stack.wait_log(f"{part} ended", 20)

        def answered() -> bool:
            try:
                return stack.job(stack.submit("sim-base", "?"), wait=5)["state"] == "succeeded"
            except (OSError, AssertionError, KeyError, ValueError):
                return False
            except Exception as error:  # the client's own: the API is not back yet
                assert type(error).__module__.startswith("http"), error
                return False

        until(answered, 60, stack.log())


def test_a_second_stack_on_the_same_data_is_refused(data_dir: Path) -> None:
    with LorryUp(data_dir, *SIMULATED) as stack:
        stack.wait_ready(START_SECONDS)
        second = lorry("up", *SIMULATED, "--data-dir", str(data_dir), "--port", "0")
        assert second.returncode == 2
        assert "another `lorry up` runs on" in second.stderr


def test_a_flag_that_the_engine_refuses_stops_the_stack_with_its_message(data_dir: Path) -> None:
    with LorryUp(data_dir, *SIMULATED, "--no-such-flag", "1") as stack:
        assert stack.process.wait(START_SECONDS) == 2
        assert stack.log().splitlines()[-1].startswith("lorry: simulated engine:")
        assert "--no-such-flag" in stack.log().splitlines()[-1]
        assert not marked(stack.mark)


@pytest.mark.vllm
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_vllm_in_mid_generation_leaves_no_process(data_dir: Path, number: signal.Signals) -> None:
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
