"""A steward's part in schedules, in a process that kills itself at a chosen statement.

As in `tests/support/killable_worker.py`: the duties are the real ones, only their connections are
watched.
"""

import multiprocessing
import os
import sys

import uvloop

from core.logs import configure_logging
from core.settings import Settings, load_settings
from db.database import Database
from tests.support.killable_worker import Victim, watch_statements
from workers.steward.schedules import ScheduleDuties

#: Looks of one victim: what a first one wakes, a second one starts.
LOOKS = 2


def start_steward(victim: Victim) -> "multiprocessing.process.BaseProcess":
    """Start a victim, in a session of its own; it ends after a few looks, if it is not killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
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
    uvloop.run(_look(settings))
    sys.exit(0)


async def _look(settings: Settings) -> None:
    async with Database.connect(str(settings.database_url), max_size=1) as database:
        duties = ScheduleDuties(database, settings)
        for _ in range(LOOKS):
            await duties.tick()
            await duties.follow()
