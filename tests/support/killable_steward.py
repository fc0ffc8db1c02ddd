"""A real steward that kills itself at one chosen statement, as tests/support/killable_worker.py."""

import multiprocessing
import os
import sys

import uvloop

from core.logs import configure_logging
from core.settings import load_settings
from tests.support.killable_worker import Victim, watch_statements
from workers.steward import main


def start_steward(victim: Victim) -> "multiprocessing.process.BaseProcess":
    """Start a steward that is to die, in a session of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.killable_worker", __name__])
    process = context.Process(target=_run, args=(victim,), daemon=True)
    process.start()
    return process


def _run(victim: Victim) -> None:
    os.setsid()
    with victim.log.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for name in [n for n in os.environ if n.startswith("LORRY_")]:
        del os.environ[name]
    os.environ.update(victim.settings)
    settings = load_settings(os.environ)
    configure_logging(settings.log_level)
    watch_statements(victim)
    uvloop.run(main._run(settings))
    sys.exit(0)
