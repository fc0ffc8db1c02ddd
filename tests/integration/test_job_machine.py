"""The job's state machine against a plain model: any steps in any order, on a real Postgres."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from core.retry import LONE_ENGINE_DEATHS, lone_losses
from core.states import JobState
from db import claims, jobs, maintenance, results, suspects, workers
from db.database import Database
from db.results import Result, RetryLater
from db.suspects import Death
from db.tenants import DEFAULT_TENANT_ID
from db.waiting import Line
from db.workers import WorkerFacts
from tests.support.jobs import BASE, Bench, make_bench, submit
from tests.support.machine import ModelJob, put_apart
from tests.support.scale import Scale

T = TypeVar("T")
MAX_ATTEMPTS = 3
LIVE = 3600.0


@dataclass
class World:
    """Postgres on an event loop of its own: the machine's rules are not coroutines."""

    loop: asyncio.AbstractEventLoop
    bench: Bench

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(step, self.loop).result(30)


def test_any_steps_in_any_order_keep_every_promise(
    database_url: str, tmp_path: Path, scale: Scale
) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(step: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(step, loop).result(30)

    database = call(Database.open(database_url))
    try:
        bench = call(make_bench(database, tmp_path, adapters=1))
        run_state_machine_as_test(
            lambda: Machine(World(loop, bench)),  # type: ignore[arg-type]
            settings=settings(
                max_examples=scale(40, 400),
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                derandomize=not scale.full,
            ),
        )
    finally:
        call(database.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Machine(RuleBasedStateMachine):
    """Each rule does one step by `db/` and, where the model allows it, on the model."""

    submitted: Bundle[UUID] = Bundle("submitted")
    registered: Bundle[int] = Bundle("registered")

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.database = world.bench.database
        self.jobs: dict[UUID, ModelJob] = {}
        self.living: set[int] = set()
        #: the groups of suspects so far
        self.groups = 0

    def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self.world.run(make())

    def execute(self, statement: str, *arguments: object) -> None:
        async def run() -> None:
            async with self.database.connection() as connection:
                await connection.execute(statement, *arguments)

        self.world.run(run())

    @initialize()
    def clear(self) -> None:
        for table in ("jobs", "job_inputs", "job_outputs", "job_attempts", "waiting_adapters"):
            self.execute(f"DELETE FROM {table}")
        self.execute("UPDATE workers SET stopped_at = now() WHERE stopped_at IS NULL")

    # -- steps that add something ---------------------------------------------------------

    @rule(target=submitted, model=st.sampled_from([BASE, "a0"]))
    def submit(self, model: str) -> UUID:
        (job_id,) = self.call(lambda: submit(self.database, model))
        self.jobs[job_id] = ModelJob()
        return job_id

    @rule(target=registered)
    def register(self) -> int:
        facts = WorkerFacts(self.world.bench.base_model_id, "x", 1, "simulated", "1", {})
        worker = self.call(lambda: workers.register(self.database, facts, LIVE))
        self.living.add(worker)
        return worker

    # -- steps of a worker ----------------------------------------------------------------

    @rule(worker=registered, version=st.sampled_from([0, 1]), limit=st.integers(1, 4))
    def claim(self, worker: int, version: int, limit: int) -> None:
        line = self._line(version)
        due = self._due(line)
        found = self.call(lambda: claims.claim(self.database, worker, line, limit))
        expected = min(limit, len(due)) if worker in self.living else 0
        assert len(found) == expected and {job.id for job in found} <= due
        for job in found:
            self.jobs[job.id].claim(worker)
            assert self.jobs[job.id].attempt == job.attempt

    @rule(worker=registered, limit=st.integers(1, 4))
    def take_group(self, worker: int, limit: int) -> None:
        found = self.call(
            lambda: suspects.take_group(
                self.database, worker, self.world.bench.base_model_id, waited_seconds=0, limit=limit
            )
        )
        waiting = self._suspects() if worker in self.living else {}
        first = min((m.group for m in waiting.values() if m.group is not None), default=None)
        of_first = [job_id for job_id, model in waiting.items() if model.group == first]
        assert [job.id for job in sorted(found)] == of_first[:limit], "one group, the oldest"
        for job in found:
            self.jobs[job.id].claim(worker)

    @rule(job=submitted)
    def finish(self, job: UUID) -> None:
        for owner, attempt, allowed in self._claims_of(job):
            answer = f'{{"by": {owner}, "attempt": {attempt}}}'
            result = Result(job, attempt, response=answer)
            written = self.call(partial(results.record, self.database, owner, [result]))
            assert written == ({job} if allowed else set())
            if allowed:
                self.jobs[job].succeed(answer)

    @rule(job=submitted)
    def fail(self, job: UUID) -> None:
        for owner, attempt, allowed in self._claims_of(job):
            result = Result(job, attempt, error_code="engine_error", error_message="no")
            written = self.call(partial(results.record, self.database, owner, [result]))
            assert written == ({job} if allowed else set())
            if allowed:
                self.jobs[job].fail("engine_error")

    @rule(job=submitted)
    def hiccup(self, job: UUID) -> None:
        for owner, attempt, allowed in self._claims_of(job):
            again = [_retry_later(job, attempt)]
            written = self.call(partial(results.retry_later, self.database, owner, again))
            assert written == ({job} if allowed else set())
            if allowed:
                self.jobs[job].retry()

    @rule(job=submitted)
    def come_due(self, job: UUID) -> None:
        """Time goes by."""
        self.execute("UPDATE jobs SET not_before = now() WHERE id = $1 AND state = 'queued'", job)
        if self.jobs[job].state is JobState.QUEUED:
            self.jobs[job].due = True

    @rule(job=submitted)
    def release(self, job: UUID) -> None:
        for owner, attempt, allowed in self._claims_of(job):
            given = [(job, attempt)]
            count = self.call(partial(claims.release, self.database, owner, given))
            assert count == (1 if allowed else 0)
            if allowed:
                self.jobs[job].release()

    @rule(worker=registered)
    def learn_of_ended(self, worker: int) -> None:
        told = set(self.call(lambda: workers.take_ended(self.database, worker)))
        ended = {
            (job_id, model.attempt)
            for job_id, model in self.jobs.items()
            if model.owner == worker and model.state in (JobState.CANCELLED, JobState.EXPIRED)
        }
        assert told == ended, "each is told once, to its own worker"
        for job_id, _ in told:
            self.jobs[job_id].owner = None

    @rule(worker=registered)
    def sign_off(self, worker: int) -> None:
        if worker not in self.living:
            return  # a worker that is lost or stopped has ended
        self.call(lambda: workers.sign_off(self.database, worker))
        self._end(worker)

    @rule(worker=registered, data=st.data())
    def engine_dies(self, worker: int, data: st.DataObject) -> None:
        """With some of the worker's jobs in it: the others had come out, or were not in yet."""
        if worker not in self.living:
            return
        running = self._running(worker)
        fed = data.draw(st.lists(st.sampled_from(sorted(running)), unique=True)) if running else []
        death = Death("suspect", "the engine died", LONE_ENGINE_DEATHS, 3600.0)
        count = self.call(lambda: workers.sign_off(self.database, worker, death, fed))
        assert count == len(running)
        self._die([running[i] for i in sorted(fed)], worker, "suspect", LONE_ENGINE_DEATHS)
        self._end(worker)

    def _end(self, worker: int) -> None:
        """Nothing stays owned by a worker that has ended."""
        self.living.discard(worker)
        for model in self._owned(worker).values():
            if model.state is JobState.RUNNING:
                model.release()
            model.owner = None

    def _die(self, inside: list[ModelJob], worker: int, outcome: str, most_deaths: int) -> None:
        if inside:
            ended = len(self._owned(worker)) - len(self._running(worker))
            put_apart(inside, outcome, self.groups, ended=ended, most_deaths=most_deaths)
            self.groups += 2

    # -- steps of others ------------------------------------------------------------------

    @rule(job=submitted)
    def cancel(self, job: UUID) -> None:
        self.call(lambda: jobs.cancel(self.database, DEFAULT_TENANT_ID, job))
        if not self.jobs[job].final:
            self.jobs[job].end(JobState.CANCELLED)

    @rule(job=submitted)
    def expire(self, job: UUID) -> None:
        self.execute("UPDATE jobs SET deadline = now() WHERE id = $1", job)
        expired = self.call(lambda: maintenance.expire_due(self.database))
        assert expired == (not self.jobs[job].final)
        if expired:
            self.jobs[job].end(JobState.EXPIRED)

    @rule(worker=registered)
    def lose(self, worker: int) -> None:
        """A lease runs out and a steward looks; then the worker wakes up."""
        self.execute(
            "UPDATE workers SET lease_expires_at = now() - interval '1 s' WHERE id = $1", worker
        )
        freed = self.call(lambda: _rescue(self.database))
        if worker not in self.living:
            assert freed == {}
            return
        running = self._running(worker)
        assert freed == {worker: len(running)}
        # it fed suspects by themselves alone: where there are others, those were inside
        others = [model for model in running.values() if model.group is None]
        inside = others or list(running.values())
        self._die(inside, worker, "rescued", lone_losses(MAX_ATTEMPTS))
        self._end(worker)
        assert not self.call(lambda: workers.renew(self.database, worker, LIVE))

    @rule()
    def rebuild(self) -> None:
        assert self.call(lambda: maintenance.rebuild_waiting(self.database)) == 0

    @rule(version=st.sampled_from([0, 1]))
    def end_turn(self, version: int) -> None:
        line = self._line(version)
        left = self.call(lambda: claims.end_turn(self.database, line))
        assert left or not self._queued(line)

    # -- what must hold after every step --------------------------------------------------

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        async def read() -> tuple[list[Any], list[Any]]:
            async with self.database.connection() as connection:
                rows = await connection.fetch(
                    "SELECT j.*, coalesce(o.response::text, o.error_code) AS answer,"
                    " o.job_id IS NOT NULL AS answered,"
                    " (SELECT coalesce(json_object_agg(attempt, outcome), '{}') FROM job_attempts a"
                    "  WHERE a.job_id = j.id) AS history"
                    " FROM jobs j LEFT JOIN job_outputs o ON o.job_id = j.id"
                )
                lines = await connection.fetch(
                    "SELECT base_model_id, adapter_version_id, tenant_id FROM waiting_adapters"
                )
            return rows, lines

        rows, lines = self.world.run(read())
        assert {row["id"] for row in rows} == set(self.jobs)
        for row in rows:
            model = self.jobs[row["id"]]
            stands = (row["state"], row["attempt"], row["failures"], row["releases"])
            assert stands == (model.state, model.attempt, model.failures, model.releases)
            assert row["lease_owner"] == model.owner
            assert (row["suspect_deaths"] or 0) == model.deaths
            assert json.loads(row["history"]) == {str(n): how for n, how in model.history.items()}
            assert row["answer"] == model.answer
            assert row["answered"] == (model.state in (JobState.SUCCEEDED, JobState.FAILED))
            assert (row["finished_at"] is not None) == model.final
        groups: set[tuple[int, int]] = set()
        for row in rows:
            stored, group = row["suspect_group"], self.jobs[row["id"]].group
            assert (stored is None) == (group is None)
            if group is not None:
                groups.add((stored, group))
        in_order = [group for _, group in sorted(groups)]
        assert in_order == sorted(set(in_order)), "the same are together, and the order is kept"
        waiting = {Line(*row.values()) for row in lines}
        assert {self._line(v) for v in (0, 1) if self._queued(self._line(v))} <= waiting

    # -- the model's own questions --------------------------------------------------------

    def _line(self, version: int) -> Line:
        return Line(self.world.bench.base_model_id, version, DEFAULT_TENANT_ID)

    def _queued(self, line: Line) -> set[UUID]:
        return {i for i in self._ids_of(line) if self.jobs[i].in_line}

    def _due(self, line: Line) -> set[UUID]:
        return {i for i in self._queued(line) if self.jobs[i].due}

    def _suspects(self) -> dict[UUID, ModelJob]:
        """Those that are due, by id."""
        waiting = (JobState.QUEUED, True)
        return {
            i: model
            for i, model in sorted(self.jobs.items())
            if model.group is not None and (model.state, model.due) == waiting
        }

    def _ids_of(self, line: Line) -> set[UUID]:
        async def read() -> set[UUID]:
            async with self.database.connection() as connection:
                rows = await connection.fetch(
                    "SELECT id FROM jobs WHERE adapter_version_id = $1", line.adapter_version_id
                )
            return {row["id"] for row in rows}

        return self.world.run(read())

    def _owned(self, worker: int) -> dict[UUID, ModelJob]:
        return {i: model for i, model in sorted(self.jobs.items()) if model.owner == worker}

    def _running(self, worker: int) -> dict[UUID, ModelJob]:
        owned = self._owned(worker).items()
        return {i: model for i, model in owned if model.state is JobState.RUNNING}

    def _claims_of(self, job: UUID) -> list[tuple[int, int, bool]]:
        """Everyone who ever had the job, its attempt, and whether a write of theirs counts.

        The late ones come first, and once more after the one that counts.
        """
        model = self.jobs[job]
        late = [(owner, attempt, False) for owner, attempt in model.stale]
        if model.state is not JobState.RUNNING or model.owner is None:
            return late
        now = (model.owner, model.attempt)
        return [*late, (*now, True), (*now, False)]


def _retry_later(job: UUID, attempt: int) -> RetryLater:
    return RetryLater(job, attempt, 3600.0, "it hiccupped")


async def _rescue(database: Database) -> dict[int, int]:
    """A steward that has been in touch for long enough looks once."""
    return await workers.rescue_lost(database, 0, MAX_ATTEMPTS)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")
