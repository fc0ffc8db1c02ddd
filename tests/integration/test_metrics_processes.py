"""Metrics of a real worker process, and `lorry top` in a real terminal."""

import os
import pty
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.deployment import Deployment
from tests.support.processes import environment, until

pytestmark = pytest.mark.processes


def test_a_worker_serves_its_metrics_and_refuses_a_taken_port(
    tmp_path: Path, database_url: str, broker_url: str
) -> None:
    with Deployment(tmp_path, database_url, broker_url, LORRY_METRICS_PORT="0") as deployment:
        worker = deployment.start_worker("m")
        address = next(
            word for word in worker.log().split() if word.endswith("/metrics") and "http" in word
        )
        with urllib.request.urlopen(address) as answer:
            assert "lorry_starved_seconds_total 0.0" in answer.read().decode()
        port = address.split(":")[2].partition("/")[0]
        deployment.settings["LORRY_METRICS_PORT"] = port
        second = deployment.start("worker", "m", "--engine", "simulated")
        assert second.popen.wait(60) == 2
        assert f"LORRY_METRICS_PORT={port}: the port is taken" in second.log()
        assert worker.stop() == 0
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(port))) != 0


def test_top_redraws_until_ctrl_c(database_url: str) -> None:
    ours, theirs = pty.openpty()
    settings = {"LORRY_DATABASE_URL": database_url, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "top", "--every", "0.2"],
        env=environment(**settings),
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    seen = b""

    def redrawn() -> bool:
        nonlocal seen
        seen += os.read(ours, 65536)
        return seen.count(b"0 waiting") >= 3

    try:
        until(redrawn, 30, "three frames")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        os.close(ours)
    assert (process.returncode, errors) == (130, b"")
    assert b"\x1b[?1049h" in seen  # a screen of its own, so that the shell's comes back
