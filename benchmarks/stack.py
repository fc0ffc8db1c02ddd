"""A `lorry up` for a benchmark: started, waited for, stopped in order."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx


@contextmanager
def running_stack(
    arguments: Sequence[str], *, ready_seconds: float, environ: dict[str, str] | None = None
) -> Iterator[httpx.Client]:
    """Run `lorry up ARGUMENTS` on a free port and fresh data; yields a client of it.

    Its log goes to standard error.
    """
    with tempfile.TemporaryDirectory(prefix="lorry-bench-") as data_dir:
        Path(data_dir).chmod(0o755)
        port = free_port()
        command = [sys.executable, "-m", "cli.main", "up", *arguments]
        command += ["--port", str(port), "--data-dir", data_dir]
        process = subprocess.Popen(
            command, stdout=sys.stderr, env={**os.environ, **(environ or {})}
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_ready(process, client, ready_seconds)
                yield client
        finally:
            process.terminate()
            process.wait(60)


def wait_ready(process: "subprocess.Popen[bytes]", client: httpx.Client, seconds: float) -> None:
    """Poll /readyz until it answers 200."""
    deadline = time.monotonic() + seconds
    while True:
        if process.poll() is not None:
            raise SystemExit(f"lorry up ended with status {process.returncode}")
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > deadline:
            raise SystemExit(f"lorry up was not ready within {seconds:.0f} s")
        time.sleep(0.1)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
