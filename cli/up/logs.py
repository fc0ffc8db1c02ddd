"""What the children say: kept in files, and shown with the name of who said it.

PostgreSQL's and Valkey's routine lines go to their files only; the last lines of any child are
remembered, so that a death can be explained.
"""

import logging
import sys
import threading
from collections import deque
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Final

FILE_BYTES: Final = 10_000_000
REMEMBERED_LINES: Final = 20
#: Whose lines are only kept in their files.
QUIET: Final = frozenset({"postgres", "valkey", "initdb"})
_WIDTH: Final = 8
_COLOURS: Final = {"lorry": 35, "api": 36, "worker": 32, "steward": 33, "demo": 34}


class Logs:
    """Writes lines to stderr, one writer at a time, and to one file per child."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._writing = threading.Lock()
        self._coloured = sys.stderr.isatty()
        self._files: dict[str, RotatingFileHandler] = {}

    def say(self, line: str) -> None:
        """Say something about the stack itself."""
        self.write("lorry", line)

    def write(self, name: str, line: str) -> None:
        """Keep a line, and show it unless it comes from one of the quiet children."""
        record = logging.LogRecord(name, logging.INFO, "", 0, line, None, None)
        self._file(name).emit(record)
        if name not in QUIET:
            self._show(name, line)

    def follow(self, name: str, stream: IO[bytes]) -> "Follower":
        """Write everything that comes out of `stream` under a child's name."""
        return Follower(self, name, stream)

    def path(self, name: str) -> Path:
        """The file that keeps a child's lines."""
        return self.folder / f"{name}.log"

    def close(self) -> None:
        """Close the files."""
        for handler in self._files.values():
            handler.close()

    def _file(self, name: str) -> RotatingFileHandler:
        with self._writing:
            if name not in self._files:
                self._files[name] = RotatingFileHandler(
                    self.path(name), maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8"
                )
            return self._files[name]

    def _show(self, name: str, line: str) -> None:
        prefix = f"{name:<{_WIDTH}}|"
        if self._coloured:
            prefix = f"\033[{_COLOURS.get(name, 37)}m{prefix}\033[0m"
        with self._writing:
            try:
                print(prefix, line, file=sys.stderr, flush=True)
            except OSError:
                pass  # the terminal is gone; the files still keep everything


class Follower:
    """The thread that reads one child's output."""

    def __init__(self, logs: Logs, name: str, stream: IO[bytes]) -> None:
        self._logs = logs
        self._name = name
        self._stream = stream
        self._last: deque[str] = deque(maxlen=REMEMBERED_LINES)
        self._thread = threading.Thread(target=self._read, name=f"log-{name}", daemon=True)
        self._thread.start()

    def last_words(self) -> list[str]:
        """The child's last lines, oldest first, once it has ended."""
        self._thread.join(timeout=1)
        return list(self._last)

    def _read(self) -> None:
        with self._stream:
            for raw in self._stream:
                # progress bars redraw themselves by carriage returns: the last state is enough
                line = raw.decode("utf-8", "replace").rstrip().rpartition("\r")[2]
                if line.strip():
                    self._last.append(line)
                    self._logs.write(self._name, line)
