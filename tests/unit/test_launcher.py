"""The launcher and its worker, as real processes: neither outlives the other, nor does a helper."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tests.support.processes import Tree, environment, marked, until
from workers.engine.selection import EngineName
from workers.launcher import WorkerSpec, watch_parent

pytestmark = pytest.mark.processes

_LAUNCH = """
import sys
from workers.launcher import WorkerSpec, launch
sys.exit(launch(WorkerSpec("m"), [sys.executable, "-c", sys.argv[1], *sys.argv[2:]]))
"""

#: A worker with a helper that ignores SIGINT and SIGTERM, as an engine's process may. It tells its
#: pid in a file; its SIGTERM handler counts and ends it at the second one.
_WORKER = """
import os, pathlib, signal, subprocess, sys, threading, time
from workers.launcher import WorkerSpec, watch_parent
pid_file, mode, spec = sys.argv[1], sys.argv[2], WorkerSpec.from_json(sys.argv[3])
if mode != "deaf":
    watch_parent(spec.parent_fd)
terms = []
def term(number, frame):
    terms.append(number)
    pathlib.Path(pid_file + ".terms").write_text(str(len(terms)))
signal.signal(signal.SIGTERM, term)
signal.signal(signal.SIGINT, lambda *_: os._exit(99))
helper = subprocess.Popen([sys.executable, "-c",
    "import signal,time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; time.sleep(600)"])
pathlib.Path(pid_file + ".new").write_text(f"{os.getpid()} {helper.pid}")
os.replace(pid_file + ".new", pid_file)
if mode == "exit":
    os._exit(7)
while len(terms) < 2:
    time.sleep(0.01)
os._exit(5)
"""


class _Launched:
    def __init__(self, folder: Path, mode: str) -> None:
        self.mark = uuid4().hex
        self._pid_file = folder / "pids"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, _WORKER, str(self._pid_file), mode],
            env=environment(self.mark),
            start_new_session=True,
        )

    def pids(self) -> tuple[int, int]:
        until(self._pid_file.exists, 20, "the worker to start")
        worker, helper = self._pid_file.read_text().split()
        return int(worker), int(helper)

    def terms(self) -> int:
        path = Path(f"{self._pid_file}.terms")
        return int(path.read_text() or 0) if path.exists() else 0

    def tree(self) -> Tree:
        return Tree(self.process.pid, self.mark)


@contextmanager
def _launched(folder: Path, mode: str = "serve") -> Iterator[_Launched]:
    launched = _Launched(folder, mode)
    try:
        yield launched
    finally:
        launched.process.kill()
        launched.process.wait()
        for process in marked(launched.mark):
            process.kill()


def test_worker_runs_in_a_session_of_its_own(tmp_path: Path) -> None:
    with _launched(tmp_path) as launched:
        worker, helper = launched.pids()
        assert os.getsid(worker) == worker
        assert os.getsid(helper) == worker


def test_exit_code_is_the_workers_and_its_session_is_cleaned(tmp_path: Path) -> None:
    with _launched(tmp_path, "exit") as launched:
        assert launched.process.wait(20) == 7
        worker, helper = launched.pids()
        assert not psutil.pid_exists(worker)
        assert not psutil.pid_exists(helper)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_each_signal_reaches_the_worker_once_as_sigterm(
    tmp_path: Path, number: signal.Signals
) -> None:
    with _launched(tmp_path) as launched:
        launched.pids()
        tree = launched.tree()
        launched.process.send_signal(number)
        until(lambda: launched.terms() == 1, 10, "the first signal to arrive")
        launched.process.send_signal(number)
        assert launched.process.wait(20) == 5
        tree.assert_gone(1)


def test_sigkill_of_the_worker_leaves_no_helper(tmp_path: Path) -> None:
    with _launched(tmp_path) as launched:
        worker, _ = launched.pids()
        tree = launched.tree()
        os.kill(worker, signal.SIGKILL)
        assert launched.process.wait(20) == 128 + signal.SIGKILL
        tree.assert_gone(1)


@pytest.mark.parametrize("mode", ["serve", "deaf"])
def test_sigkill_of_the_launcher_ends_the_worker(tmp_path: Path, mode: str) -> None:
    """Both by the pipe (its helper too) and, before a worker listens to that, by the kernel."""
    with _launched(tmp_path, mode) as launched:
        worker, helper = launched.pids()
        tree = launched.tree()
        launched.process.kill()
        launched.process.wait()
        if mode == "serve":
            tree.assert_gone(5)
        else:
            until(lambda: worker not in {p.pid for p in tree.living()}, 5, "the worker to end")
            os.kill(helper, signal.SIGKILL)


def test_sigterm_before_the_worker_can_handle_it_is_a_clean_stop(tmp_path: Path) -> None:
    sleeper = "import pathlib,sys,time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    started = tmp_path / "started"
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, sleeper, str(started)], env=environment()
    )
    until(started.exists, 20, "the worker to start")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_specification_survives_the_command_line() -> None:
    spec = WorkerSpec(
        "org/model",
        EngineName.SIMULATED,
        ("--hf-overrides", '{"a": "b c"}', "-tp", "2"),
        partitions=(1, 2),
    )
    text = spec.to_json(9)
    assert WorkerSpec.from_json(text).parent_fd == 9
    assert WorkerSpec.from_json(text).flags == spec.flags
    assert json.loads(text)["engine"] == "simulated"


def test_no_launcher_means_nothing_to_watch() -> None:
    watch_parent(None)
