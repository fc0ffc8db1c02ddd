"""Whether to fold, and which adapter: pure decisions over what is in the engine and what waits.

While an adapter is folded it computes at the speed of the base model, and nobody else computes. So
it is folded where that is the faster way to do what there is to do, by enough to repay the switch;
for a quantum at most while others wait; and between two folds the others have the engine.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from db.claims import COUNT_CAP, PRESSING_SECONDS, WaitingLine
from workers.drain.planner import SlotView

#: How many sequences an engine computes at half of its speed, as a share of `max_num_seqs`: its
#: step takes so much time whoever computes. Measured on an H100: 52 to 64 of 256.
HALF_SPEED_SHARE: Final = 0.22
#: A fold must promise to be faster by this much: what it promises is not exact.
BETTER: Final = 1.08
#: ... and the time that it saves must be worth so many switches.
REPAYS: Final = 2.0
#: A fold lasts so many switches at least, whatever becomes due meanwhile ...
SHORTEST_SWITCHES: Final = 8.0
#: ... and never less than this, in seconds.
SHORTEST_SECONDS: Final = 1.0
#: A fold whose time is over goes on without being fed, but no longer than so many quanta.
LONGEST_QUANTA: Final = 1.5
#: After a fold that kept others waiting, they have the engine for this share of its time.
REST_SHARE: Final = 0.35
#: Jobs of a line that has more than a look counts.
MANY: Final = 4 * COUNT_CAP
#: Tokens of a job where nothing is known of any.
USUAL_TOKENS: Final = 300.0
#: Share of the KV cache that parked requests and the folded adapter's may want together.
CACHE_SHARE: Final = 0.9


class Held(NamedTuple):
    """Unfinished jobs in the engine, and the tokens expected of them."""

    jobs: int = 0
    tokens: int = 0


class Choice(NamedTuple):
    """What is to be folded.

    Args:
        version: the adapter version; None is none.
        feed: whether it is fed first. Otherwise it gets nothing more, and others are fed, who wait
            in the engine until it has less left than is worth a fold.
    """

    version: int | None
    feed: bool = True


@dataclass(frozen=True, slots=True)
class FoldView:
    """What a decision is made of.

    Args:
        folded: the adapter version that is folded now.
        held: what is in the engine, by adapter version (0: the base model).
        lines: the lines that may be drained now, best first.
        waiting: every line with jobs due, those without a slot too.
        slots: the engine's slots.
        max_num_seqs: sequences that compute at once.
        cache_tokens: what the KV cache holds; 0 where that is not known.
        refused: adapter versions that the engine does not fold.
        state_seconds: how long what is folded has been, or nothing has.
        parked_seconds: how long the requests parked first have waited; 0 while none is.
        rest_seconds: how long nothing is to be folded after the last fold.
        quantum_seconds: `LORRY_QUANTUM_SECONDS`.
        gain: a folded engine's speed over that of one with adapters, with as many sequences.
        switch_seconds: what a restore and a fold take.
        tokens_per_second: of an engine full of requests with adapters, prompts included.
    """

    folded: int | None
    held: Mapping[int, Held]
    lines: Sequence[WaitingLine]
    waiting: Sequence[WaitingLine]
    slots: SlotView
    max_num_seqs: int
    state_seconds: float
    quantum_seconds: float
    gain: float
    switch_seconds: float
    tokens_per_second: float
    cache_tokens: int = 0
    parked_seconds: float = 0.0
    rest_seconds: float = 0.0
    refused: Collection[int] = field(default_factory=frozenset)
    #: jobs that may be fed, by adapter version; those that a look did not count to their end are
    #: taken to be many
    jobs_waiting: Counter[int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        counts: Counter[int] = Counter()
        for w in self.lines:
            counts[w.line.adapter_version_id] += w.jobs if w.jobs < COUNT_CAP else MANY
        object.__setattr__(self, "jobs_waiting", counts)

    def jobs(self, version: int) -> int:
        """Jobs of an adapter, in the engine and before it."""
        return self.held.get(version, Held()).jobs + self.jobs_waiting[version]

    @property
    def shortest_seconds(self) -> float:
        """How long a fold lasts at least."""
        return max(SHORTEST_SECONDS, SHORTEST_SWITCHES * self.switch_seconds)


def choose(view: FoldView) -> Choice:
    """What is to be folded now.

    Stays with what is folded as long as that is right: every change costs a switch.
    """
    folded = view.folded
    if folded is None:
        resting = view.state_seconds < view.rest_seconds and bool(view.waiting)
        return Choice(None if resting else _best(view))
    if not view.jobs(folded):
        return Choice(_next(view))
    if not _others(view):
        return Choice(folded)
    if _pressed(view, folded):
        return Choice(None)
    if view.state_seconds >= view.shortest_seconds and _time_is_over(view):
        left = view.held.get(folded, Held()).jobs
        late = view.state_seconds >= LONGEST_QUANTA * view.quantum_seconds
        # what it has begun runs on folded, as long as that is the faster way
        return Choice(None if late or _value(view, left) < 1 else folded, feed=False)
    return Choice(folded if _value(view, view.jobs(folded)) >= 1 else _next(view))


def rest_after(fold_seconds: float, others: bool) -> float:
    """How long others have the engine after a fold, in seconds.

    Args:
        others: whether any waited for it, before the engine or parked in it.
    """
    return REST_SHARE * fold_seconds if others else 0.0


def speed(sequences: float, max_num_seqs: int) -> float:
    """An engine's speed with so many sequences, 1 for one without overheads."""
    return sequences / (sequences + HALF_SPEED_SHARE * max_num_seqs)


def _time_is_over(view: FoldView) -> bool:
    """Whether others have waited long enough: in the engine, or before it."""
    if view.parked_seconds >= view.quantum_seconds and len(view.held) > 1:
        return True
    if view.state_seconds >= view.quantum_seconds:
        return True
    return _others_due(view, view.folded)


def _next(view: FoldView) -> int | None:
    """What to go on with where the folded adapter has too little left."""
    return None if view.parked_seconds >= view.quantum_seconds else _best(view)


def _best(view: FoldView) -> int | None:
    """The first adapter, in the order of the lines, that is worth a fold."""
    versions = dict.fromkeys(w.line.adapter_version_id for w in view.lines)
    by_amount = sorted(view.held, key=lambda v: -view.held[v].jobs)
    for version in [*versions, *by_amount]:
        if version == view.folded or not _can_fold(view, version):
            continue
        if _value(view, view.jobs(version)) >= BETTER and _repays(view, version):
            return version
    return None


def _can_fold(view: FoldView, version: int) -> bool:
    return (
        version not in view.refused
        and version in view.slots.resident  # the base model never is
        and not _pressed(view, version)
        and not _others_due(view, version)
        and _has_cache(view, version)
    )


def _value(view: FoldView, jobs: int) -> float:
    """How many times faster the engine works with so many jobs folded, all else parked."""
    most = view.max_num_seqs
    alone = min(most, jobs)
    waiting = sum(view.jobs_waiting.values())
    together = min(most, sum(held.jobs for held in view.held.values()) + waiting)
    if not alone or not together:
        return 0.0
    return view.gain * speed(alone, most) / speed(together, most)


def _repays(view: FoldView, version: int) -> bool:
    """Whether what there is of an adapter is enough for its fold to save what the switch costs."""
    seconds = view.jobs(version) * _tokens_of_a_job(view) / view.tokens_per_second
    if _others(view, version):
        seconds = min(seconds, view.quantum_seconds)
    return seconds * (1 - 1 / _value(view, view.jobs(version))) > REPAYS * view.switch_seconds


def _has_cache(view: FoldView, version: int) -> bool:
    """Whether the adapter's requests find room beside the KV of those that would be parked."""
    if not view.cache_tokens:
        return True
    others = [held for v, held in view.held.items() if v != version]
    jobs = sum(held.jobs for held in others)
    tokens = sum(held.tokens for held in others)
    parked = tokens * min(1.0, view.max_num_seqs / jobs) if jobs else 0.0
    wanted = min(view.max_num_seqs, view.jobs(version)) * _tokens_of_a_job(view)
    return parked + wanted <= CACHE_SHARE * view.cache_tokens


def _tokens_of_a_job(view: FoldView) -> float:
    jobs = sum(held.jobs for held in view.held.values())
    return sum(held.tokens for held in view.held.values()) / jobs if jobs else USUAL_TOKENS


def _others(view: FoldView, version: int | None = None) -> bool:
    """Whether anyone else has jobs, in the engine or before it."""
    version = view.folded if version is None else version
    if any(held.jobs for v, held in view.held.items() if v != version):
        return True
    return any(w.line.adapter_version_id != version for w in view.waiting)


def _others_due(view: FoldView, version: int | None) -> bool:
    """Whether another line that could be drained now has waited past its bound, and for as long
    as a fold may last. One without a slot would not be drained for an unfold."""
    rounds = -(-len(view.waiting) // max(1, view.slots.shared))
    bound = view.quantum_seconds * (rounds + LONGEST_QUANTA)
    return any(w.since_seconds > bound for w in view.lines if w.line.adapter_version_id != version)


def _pressed(view: FoldView, version: int) -> bool:
    """Whether another adapter's deadline is near."""
    return any(
        w.deadline_seconds is not None and w.deadline_seconds < PRESSING_SECONDS
        for w in view.waiting
        if w.line.adapter_version_id != version
    )
