"""A worker that kills or stops itself at a chosen statement: before it is sent, inside it, or after
its answer came.

The worker is the real one (`workers/main.py: run_worker`) in a process of its own; only its
database connections are watched. Victims are forked from one server that has imported everything,
so that each starts in a fraction of a second.
"""

import asyncio
import multiprocessing
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import asyncpg
import uvloop

from core.errors import ErrorCode
from core.generation import Failure
from core.logs import configure_logging
from core.settings import load_settings
from workers.engine.protocol import Done, Engine, EngineRequest
from workers.engine.selection import EngineName, build_engine
from workers.launcher import WorkerSpec
from workers.main import run_worker

_DB: Final = str(Path(__file__).parents[2] / "db")
#: A job whose prompt holds this word meets an engine error at its first attempt.
HICCUP: Final = "hiccup"


@dataclass(frozen=True, slots=True)
class Blow:
    """Where a victim dies.

    Args:
        statement: its name, as a dry run gave it.
        occurrence: at which time that it comes by; 1 is the first.
        after: after its answer has come, or else before it is sent.
        inside: once Postgres has said what it returns, and before its arguments are sent.
        number: the signal: SIGKILL for its whole session, or SIGSTOP.
    """

    statement: str
    after: bool
    occurrence: int = 1
    number: signal.Signals = signal.SIGKILL
    inside: bool = False

    def __str__(self) -> str:
        number = "" if self.occurrence == 1 else f" the {self.occurrence}. time"
        when = "inside" if self.inside else "after" if self.after else "before"
        return f"{when} {self.statement}{number}"


@dataclass(frozen=True, slots=True)
class Victim:
    """What a victim is to be.

    Args:
        model: the base model's name.
        flags: the simulated engine's.
        settings: every `LORRY_*` variable.
        log: where its output goes; the statements that it sent are kept beside it.
        blow: where it dies; None for a dry run.
    """

    model: str
    flags: tuple[str, ...]
    settings: dict[str, str]
    log: Path
    blow: Blow | None = None

    @property
    def statements_file(self) -> Path:
        return self.log.with_suffix(".statements")

    def statements(self) -> Counter[str]:
        """How often each statement was sent."""
        return Counter(self.statements_file.read_text().splitlines())


def start_victim(victim: Victim) -> "multiprocessing.process.BaseProcess":
    """Start a victim, in a session of its own."""
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
    flags = ("--served-model-name", victim.model, *victim.flags)
    engine = build_engine(EngineName.SIMULATED, victim.model, flags)
    _let_hiccup(engine)
    spec = WorkerSpec(model=victim.model, engine=EngineName.SIMULATED, flags=flags)
    sys.exit(uvloop.run(run_worker(settings, engine, spec)))


def watch_statements(victim: Victim) -> None:
    """Let every connection of this process report its statements, and die at the chosen one."""
    sent: Counter[str] = Counter()
    file = os.open(victim.statements_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    class Watched(asyncpg.Connection):
        __slots__ = ()

        async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
            # with arguments it goes through _execute; BEGIN and COMMIT have none
            if args:
                return str(await super().execute(query, *args, timeout=timeout))
            name = before(query)
            status: str = await super().execute(query, timeout=timeout)
            after(name)
            return status

        async def _execute(self, query: Any, *args: Any, **options: Any) -> Any:
            name = before(query)
            if name and victim.blow and victim.blow.inside and strikes(name, after=False):
                await self.prepare(query)
                os.killpg(os.getpgrp(), victim.blow.number)
            found = await super()._execute(query, *args, **options)  # type: ignore[misc]
            after(name)
            return found

    def before(query: str) -> str:
        name = statement_name(query, sys._getframe(2))
        if name:
            sent[name] += 1
            os.write(file, f"{name}\n".encode())
            strike(name, after=False)
        return name

    def after(name: str) -> None:
        if name:
            strike(name, after=True)

    def strike(name: str, *, after: bool) -> None:
        if victim.blow and not victim.blow.inside and strikes(name, after=after):
            os.killpg(os.getpgrp(), victim.blow.number)

    def strikes(name: str, *, after: bool) -> bool:
        blow = victim.blow
        here = (name, after, sent[name])
        return blow is not None and (blow.statement, blow.after, blow.occurrence) == here

    create_pool = asyncpg.create_pool

    def create_watched_pool(*args: Any, **options: Any) -> Any:
        return create_pool(*args, connection_class=Watched, **options)

    asyncpg.create_pool = create_watched_pool


def statement_name(query: str, frame: FrameType | None) -> str:
    """Who sent a statement, from the outermost function of `db/` inwards, and how it begins.

    Empty for what the driver sends by itself. Its number is left out of a savepoint's name: it
    counts what the connection did before, which is not the same in every run.
    """
    functions: list[str] = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if str(file.parent) == _DB and file.name != "database.py":
            functions.insert(0, f"{file.stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    begins = re.sub(r"__asyncpg_savepoint_\w+?__", "a_savepoint", " ".join(query.split()[:4]))
    return f"{' > '.join(functions)}: {begins}" if functions else ""


def _let_hiccup(engine: Engine) -> None:
    submit = engine.submit

    def submit_with_hiccups(requests: Sequence[EngineRequest], done: Done) -> None:
        fine = []
        for request in requests:
            if HICCUP in str(request.generation.body) and request.request_id.endswith("-1"):
                failure = Failure(ErrorCode.ENGINE_ERROR, "a hiccup")
                asyncio.get_running_loop().call_soon(done, request, failure)
            else:
                fine.append(request)
        submit(fine, done)

    engine.submit = submit_with_hiccups  # type: ignore[method-assign]
