"""Real processes of Lorry, and proof that none of them is left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar
from uuid import uuid4

import httpx2
import psutil

REPOSITORY = Path(__file__).parents[2]
#: Inherited by everything that a marked process starts; no setting of Lorry's.
MARK = "TEST_OF_LORRY"
#: Longest run of a command that ends by itself.
_COMMAND_SECONDS = 120.0
_T = TypeVar("_T")


def until(look: Callable[[], _T | None], seconds: float, what: str) -> _T:
    """The first true thing that `look` returns; fails when there is none in time. Blocking."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def environment(mark: str = "", **settings: str) -> dict[str, str]:
    """Our environment without settings of Lorry's, marked, with these settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("LORRY_")}
    return {**own, MARK: mark, "PYTHONPATH": str(REPOSITORY), **settings}


def lorry(*arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of Lorry's to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=_COMMAND_SECONDS,
        check=False,
    )


class Tree:
    """Everything that descends from a process, remembered before it is killed.

    By family, since that is complete while the root lives; by mark, for what is started later or
    loses its family; by (pid, start time), since a process may overwrite its environment.
    """

    def __init__(self, root: int, mark: str) -> None:
        self._mark = mark
        self._known = {psutil.Process(root), *psutil.Process(root).children(recursive=True)}

    def names(self) -> list[str]:
        """Command lines, for the message of a failed test."""
        return [_describe(process) for process in self.living()]

    def living(self) -> list[psutil.Process]:
        """What is still alive of it, zombies not counted."""
        return [p for p in self._known | set(marked(self._mark)) if _alive(p)]

    def assert_gone(self, seconds: float) -> None:
        """Fail if anything is left after that time."""
        deadline = time.monotonic() + seconds
        while self.living():
            assert time.monotonic() < deadline, f"still there after {seconds:g} s: {self.names()}"
            time.sleep(0.02)


def marked(mark: str) -> list[psutil.Process]:
    """The processes that carry a mark, other than ours."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


class LorryUp:
    """A `lorry up` in a process of its own. A context manager that leaves nothing behind."""

    def __init__(self, data_dir: Path, *arguments: str, **settings: str) -> None:
        self.mark = uuid4().hex
        self._command = [sys.executable, "-m", "cli.main", "up", "--json", "--port", "0"]
        self._command += ["--data-dir", str(data_dir), *arguments]
        self._settings = settings
        self._log = data_dir.parent / f"{data_dir.name}.{self.mark[:6]}.log"
        self.url = ""

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                env=environment(self.mark, **self._settings),
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # like a terminal's foreground job
            )
        return self

    def wait_ready(self, seconds: float) -> dict[str, Any]:
        """What the ready line says."""
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        line = until(self.process.stdout.readline, seconds, f"ready: {self.log()}")
        facts: dict[str, Any] = json.loads(line)
        self.url = facts["url"]
        return facts

    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text(errors="replace")

    def wait_log(self, text: str, seconds: float) -> None:
        """Return once it has logged something."""
        until(lambda: text in self.log(), seconds, f"{text!r} in the log: {self.log()}")

    def tree(self) -> Tree:
        """Everything that runs on behalf of it now."""
        return Tree(self.process.pid, self.mark)

    def interrupt(self) -> None:
        """What a terminal's Ctrl-C does: SIGINT to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def submit(self, model: str, prompt: str, **fields: Any) -> str:
        """Submit a job and return its id."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], **fields}
        response = httpx2.post(f"{self.url}/v1/jobs", json=body)
        assert response.status_code == 202, response.text
        found: str = response.json()["id"]
        return found

    def job(self, job_id: str, wait: float = 0) -> dict[str, Any]:
        """The job as it is now."""
        query = {"wait": wait} if wait else {}
        response = httpx2.get(f"{self.url}/v1/jobs/{job_id}", params=query, timeout=wait + 10)
        found: dict[str, Any] = response.json()
        return found

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            tree = self.tree()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            _kill(tree.living())
        _kill(marked(self.mark))
        assert self.process.stdout is not None
        self.process.stdout.close()


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    except psutil.Error:
        return str(process.pid)
