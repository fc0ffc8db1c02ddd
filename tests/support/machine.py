"""A plain model of a job, and what each step of `db/` may do to it.

A new step or state is one method here and one rule in tests/integration/test_job_machine.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.states import FINAL_STATES, TRANSITIONS, JobState


@dataclass
class ModelJob:
    """A job as it must stand in Postgres."""

    state: JobState = JobState.QUEUED
    attempt: int = 0
    failures: int = 0
    releases: int = 0
    owner: int | None = None
    due: bool = True
    answer: str | None = None
    #: the group of suspects that it belongs to; a later one has a larger number
    group: int | None = None
    #: engines that died with this job alone inside
    deaths: int = 0
    #: every (owner, attempt) that was ever claimed and is not the present one
    stale: list[tuple[int, int]] = field(default_factory=list)
    #: what became of the attempts that did not end it
    history: dict[int, str] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def in_line(self) -> bool:
        """Whether the waiting list must have its line."""
        return self.state is JobState.QUEUED and self.group is None

    def move(self, state: JobState) -> None:
        assert state in TRANSITIONS[self.state], (self.state, state)
        if self.state is JobState.RUNNING and self.owner is not None:
            self.stale.append((self.owner, self.attempt))
        self.state = state

    def claim(self, owner: int) -> None:
        self.move(JobState.RUNNING)
        self.attempt += 1
        self.owner = owner

    def succeed(self, answer: str) -> None:
        self.move(JobState.SUCCEEDED)
        self.owner, self.answer = None, answer

    def fail(self, code: str) -> None:
        self.move(JobState.FAILED)
        self.failures += 1
        self.owner, self.answer = None, code

    def retry(self) -> None:
        """A hiccup: queued again, but not yet due. Its engine lived: it is no suspect."""
        self._queue_again("retried")
        self.failures += 1
        self.due = False
        self.group, self.deaths = None, 0

    def release(self) -> None:
        self._queue_again("released")
        self.releases += 1

    def suspect(self, outcome: str, group: int, *, alone: bool, most_deaths: int) -> None:
        """An engine died with it inside."""
        self.deaths += alone
        self.group = group
        if alone and self.deaths >= most_deaths:
            self.fail("attempts_exhausted")
        else:
            self._queue_again(outcome)
            self.due = not alone

    def end(self, state: JobState) -> None:
        """Cancelled or expired: a running one keeps its owner until that has aborted it."""
        self.move(state)

    def _queue_again(self, outcome: str) -> None:
        self.history[self.attempt] = outcome
        self.move(JobState.QUEUED)
        self.owner = None


def put_apart(
    inside: Sequence[ModelJob], outcome: str, group: int, *, ended: int, most_deaths: int
) -> None:
    """An engine dies: what was in it makes two groups, numbered `group` and the next.

    Args:
        inside: the jobs that were in it, by id.
        ended: how many cancelled or expired ones may have been in it too.
    """
    alone = len(inside) + ended == 1
    for number, job in enumerate(inside, 1):
        half = group if 2 * number <= len(inside) else group + 1
        job.suspect(outcome, half, alone=alone, most_deaths=most_deaths)
