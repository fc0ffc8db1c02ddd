"""A `lorry up` of the demo's own, on a free port and a data folder that is thrown away."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, Self

from cli.up import tether
from core.errors import LorryError, UsageError

_USAGE: Final = 2
#: Longest orderly stop: the worker's grace period and the servers' shutdowns.
_STOP_SECONDS: Final = 60.0
#: Of a deployment that the user may have at hand; the demo touches nothing but its own servers.
_NOT_OURS: Final = frozenset(
    {"LORRY_DATABASE_URL", "LORRY_BROKER_URL", "LORRY_STORE_URL", "LORRY_REQUIRE_KEYS"}
)
_ERROR_PREFIX: Final = "lorry: "


class DemoStack:
    """A stack in a process of its own. A context manager: the stack is stopped at the end."""

    def __init__(self, engine: str, on_line: Callable[[str], None]) -> None:
        """Remember what to start.

        Args:
            engine: `vllm` or `simulated`.
            on_line: called, in another thread, with every line that the stack logs.
        """
        self._engine = engine
        self._on_line = on_line
        self._folder = Path(tempfile.mkdtemp(prefix="lorry-demo-"))
        self._last: deque[str] = deque(maxlen=20)

    def __enter__(self) -> Self:
        read_end, self._pipe = os.pipe()
        up = (sys.executable, "-m", "cli.main", "up", "--engine", self._engine)
        options = ("--port", "0", "--data-dir", str(self._folder), "--json")
        self._process = subprocess.Popen(
            tether.command((*up, *options), read_end),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name not in _NOT_OURS},
            start_new_session=True,
            pass_fds=(read_end,),
        )
        os.close(read_end)
        assert self._process.stderr is not None
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stderr,), daemon=True
        )
        self._reader.start()
        return self

    def wait_ready(self) -> str:
        """The API's address, once the stack is ready. Blocking for as long as an engine starts.

        Raises:
            UsageError, LorryError: the stack could not start; the message is the stack's.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            url: str = json.loads(line)["url"]
            return url
        code = self._process.wait()
        self._reader.join(timeout=1)
        said = [text.removeprefix(_ERROR_PREFIX) for text in self._last if _ERROR_PREFIX in text]
        message = (said or [f"the stack ended (exit code {code})"])[-1]
        raise UsageError(message) if code == _USAGE else LorryError(message)

    def __exit__(self, *_: object) -> None:
        self.stop()
        os.close(self._pipe)
        self._reader.join(timeout=1)
        shutil.rmtree(self._folder, ignore_errors=True)

    def stop(self) -> None:
        """Stop the stack in order. Blocking; idempotent."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()

    def _read(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip()
            self._last.append(line)
            self._on_line(line)
