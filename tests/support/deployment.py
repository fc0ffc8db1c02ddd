"""A deployment in real processes: `lorry api`, `worker` and `steward` on real servers."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import httpx2

from tests.support.processes import Tree, environment, until

#: Short enough for tests, long enough for a busy machine.
QUICK_SETTINGS = {
    "LORRY_LEASE_SECONDS": "6",
    "LORRY_POLL_SECONDS": "0.5",
    "LORRY_SWEEP_SECONDS": "0.5",
    "LORRY_QUANTUM_SECONDS": "1",
    "LORRY_REQUIRE_KEYS": "false",
}


class Process:
    """One process of Lorry, its log kept in a file."""

    def __init__(self, arguments: list[str], settings: dict[str, str], log: Path) -> None:
        #: worker, api or steward
        self.name = arguments[0]
        self.mark = uuid4().hex
        self.log_file = log
        with log.open("wb") as file:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "cli.main", *arguments],
                env=environment(self.mark, **settings),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_log(self, text: str, seconds: float = 60) -> None:
        def seen() -> bool:
            assert self.popen.poll() is None, f"ended early: {self.log()}"
            return text in self.log()

        until(seen, seconds, f"{text!r} in {self.log()}")

    def kill(self) -> None:
        """SIGKILL; whatever it had started must go by itself."""
        tree = Tree(self.popen.pid, self.mark)
        self.popen.kill()
        self.popen.wait()
        tree.assert_gone(10)

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, and its exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(seconds)


class Deployment:
    """A context manager: everything that was started is stopped at its end."""

    def __init__(self, folder: Path, database_url: str, broker_url: str, **settings: str) -> None:
        self.folder = folder
        self.settings = {
            "LORRY_DATABASE_URL": database_url,
            "LORRY_BROKER_URL": broker_url,
            "LORRY_STORE_URL": str(folder / "store"),
            "LORRY_CACHE_DIR": str(folder / "cache"),
            **QUICK_SETTINGS,
            **settings,
        }
        self.port = _free_port()
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.processes: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        for process in reversed(self.processes):
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.popen.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.popen.pid, signal.SIGKILL)
                process.popen.wait()

    def start(self, *arguments: str) -> Process:
        """Start `lorry ARGUMENTS`."""
        name = f"{arguments[0]}-{len(self.processes)}.log"
        process = Process(list(arguments), self.settings, self.folder / name)
        self.processes.append(process)
        return process

    def start_api(self) -> Process:
        """Start the API and wait until it answers."""
        process = self.start("api", "--port", str(self.port))
        until(self._api_answers, 60, f"the API: {process.log()}")
        return process

    def start_worker(self, model: str, *flags: str) -> Process:
        """Start a worker on the simulated engine and wait until it is ready."""
        process = self.start("worker", model, "--engine", "simulated", *flags)
        process.wait_log("ready:")
        return process

    def start_steward(self) -> Process:
        """Start a steward and wait until it is ready."""
        process = self.start("steward")
        process.wait_log("Steward ready")
        return process

    def post(self, model: str, prompt: str, **fields: Any) -> str:
        """Submit a completion; returns the job's id."""
        body = {"model": model, "prompt": prompt, "max_tokens": 8, **fields}
        response = self.client.post("/v1/jobs", json=body)
        assert response.status_code == 202, response.text
        job_id: str = response.json()["id"]
        return job_id

    def _api_answers(self) -> bool:
        try:
            return self.client.get("/healthz").status_code == 200
        except httpx2.HTTPError:
            return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
