"""Logging of every Lorry process: one line per event on standard error, with its `extra` fields."""

import logging
from typing import Final

#: What a LogRecord has of its own; the rest came through `extra` and is shown as key=value.
_OWN: Final = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        extra = [f"{key}={value}" for key, value in vars(record).items() if key not in _OWN]
        head, newline, rest = line.partition("\n")
        return " ".join([head, *extra]) + newline + rest


def configure_logging(level: str) -> None:
    """Log to standard error from `level` on; the libraries' chatter from warning on."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in ("api", "cli", "core", "db", "workers"):
        logging.getLogger(package).setLevel(level.upper())
    # Celery tells of every broken connection with a trace; the doorbell says it in one line
    logging.getLogger("celery.worker.consumer").setLevel(logging.CRITICAL)
