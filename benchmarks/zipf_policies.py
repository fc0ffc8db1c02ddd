"""Which order suits many rare adapters: a discrete model of one engine, driven by the real planner.

    python -m benchmarks.zipf_policies [--jobs 4096] [--adapters 256] [--slots 16] [--seeds 3]

No clock, no engine, no database: steps of 8 ms + 0.155 ms for each sequence (fitted to an H100 and
an 8B model with LoRA), and every load pauses all for 80 ms. Prints, for each policy and row, the
throughput over that of one adapter with everything upfront, as benchmarks/engine_ratio.py does.
The lines' jobs are known to the planner up to its cap, as they are in a look.
"""

import argparse
import heapq
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.engine_rows import zipf
from db.claims import COUNT_CAP, WaitingLine
from db.waiting import Line
from workers.drain.planner import Shares, SlotView, may_finish, order, turn_seconds

MAX_NUM_SEQS, WINDOW = 256, 384
STEP_SECONDS, SEQUENCE_SECONDS, LOAD_SECONDS = 0.008, 0.000155, 0.080
QUANTUM = 10.0
CHUNK = 512

#: Sorts what the planner would drain now, best first; gets how many jobs each line has.
Policy = Callable[[list[WaitingLine], "Model"], list[WaitingLine]]


@dataclass(slots=True)
class Model:
    """One engine and its queue. Tokens are steps; prompts cost nothing."""

    slots: int
    queues: dict[int, deque[int]]
    now: float = 0.0
    step: int = 0
    loads: int = 0
    drained_at: dict[int, float] = field(default_factory=dict)
    held_since: dict[int, float] = field(default_factory=dict)
    in_engine: Counter[int] = field(default_factory=Counter)
    resident: list[int] = field(default_factory=list)
    #: (last step, adapter) of those that compute
    computing: list[tuple[int, int]] = field(default_factory=list)
    waiting: deque[tuple[int, int]] = field(default_factory=deque)

    def lines(self) -> list[WaitingLine]:
        """What a look shows: of the lines that have waited longest, and of those resident."""
        found = [
            WaitingLine(
                Line(1, a, 1), 0, self.now - self.drained_at.get(a, 0.0), 0,
                min(len(queue), COUNT_CAP), None,
            )
            for a, queue in self.queues.items()
            if queue
        ]  # fmt: skip
        found.sort(key=lambda w: -w.since_seconds)
        here = set(self.resident)
        return found[:64] + [w for w in found[64:] if w.line.adapter_version_id in here]

    def view(self) -> SlotView:
        """The slots as the planner sees them."""
        held = {a: self.now - since for a, since in self.held_since.items()}
        return SlotView(held, frozenset(self.resident), self.slots)

    def load(self, adapter: int) -> None:
        """Make an adapter resident; everything else stands still meanwhile."""
        if adapter in self.resident:
            self.resident.remove(adapter)
        else:
            self.now += LOAD_SECONDS
            self.loads += 1
            while len(self.resident) >= self.slots:
                self.resident.remove(next(a for a in self.resident if a not in self.held_since))
        self.resident.append(adapter)

    def feed(self, adapter: int, limit: int) -> int:
        """Claim a chunk into the engine; returns how many jobs."""
        queue = self.queues[adapter]
        jobs = [queue.popleft() for _ in range(min(limit, len(queue)))]
        if jobs:
            self.load(adapter)
            self.held_since.setdefault(adapter, self.now)
            self.in_engine[adapter] += len(jobs)
            self.waiting.extend((tokens, adapter) for tokens in jobs)
        return len(jobs)

    def compute(self) -> None:
        """Go on to the step in which the next sequence ends."""
        while self.waiting and len(self.computing) < MAX_NUM_SEQS:
            tokens, adapter = self.waiting.popleft()
            heapq.heappush(self.computing, (self.step + tokens, adapter))
        last, _ = self.computing[0]
        self.now += (last - self.step) * (STEP_SECONDS + SEQUENCE_SECONDS * len(self.computing))
        self.step = last
        while self.computing and self.computing[0][0] == last:
            _, adapter = heapq.heappop(self.computing)
            self.in_engine[adapter] -= 1
            if not self.in_engine[adapter]:
                del self.in_engine[adapter], self.held_since[adapter]

    @property
    def free(self) -> int:
        """Room in the window."""
        return WINDOW - len(self.waiting) - len(self.computing)


def drain(model: Model, policy: Policy) -> float:
    """Drain everything as `workers/drain/` does; returns the seconds."""
    turn: WaitingLine | None = None
    ends, fed = 0.0, 0
    while any(model.queues.values()) or model.in_engine:
        while model.free >= (1 if len(model.computing) + len(model.waiting) < 256 else 24):
            if turn is None:
                lines, view = model.lines(), model.view()
                hungry = len(model.computing) + len(model.waiting) < MAX_NUM_SEQS
                best = policy(order(lines, view, Shares(), QUANTUM, seats_free=hungry), model)
                if not best:
                    break
                turn, fed = best[0], 0
                ends = model.now + turn_seconds(view, QUANTUM)
            adapter, limit = turn.line.adapter_version_id, min(model.free, CHUNK)
            taken = model.feed(adapter, limit)
            fed += taken
            left = min(len(model.queues[adapter]), COUNT_CAP)
            if taken < limit or (model.now >= ends and not may_finish(fed, left)):
                model.drained_at[adapter] = model.now
                turn = None
        if model.in_engine:
            model.compute()
    return model.now


def as_planned(lines: list[WaitingLine], model: Model) -> list[WaitingLine]:
    """The planner's order, as it is."""
    return lines


def filler_first(lines: list[WaitingLine], model: Model) -> list[WaitingLine]:
    """The longest line first."""
    return sorted(lines, key=lambda w: -w.jobs)


def rare_first(lines: list[WaitingLine], model: Model) -> list[WaitingLine]:
    """The shortest line first: never leave the rare ones for the end."""
    return sorted(lines, key=lambda w: w.jobs)


def rare_beside_filler(reserved: int) -> Policy:
    """Rare ones first, as long as so many slots are held by lines with more to come."""

    def policy(lines: list[WaitingLine], model: Model) -> list[WaitingLine]:
        fillers = sum(1 for a in model.held_since if model.queues[a])
        if len(model.computing) + len(model.waiting) < MAX_NUM_SEQS or fillers < reserved:
            return filler_first(lines, model)
        return rare_first(lines, model)

    return policy


def full_then_rare(lines: list[WaitingLine], model: Model) -> list[WaitingLine]:
    """The longest line of those with a slot while the engine is short, else the rare ones."""
    if len(model.computing) + len(model.waiting) >= MAX_NUM_SEQS:
        return rare_first(lines, model)
    return sorted(lines, key=lambda w: (w.line.adapter_version_id not in model.held_since, -w.jobs))


POLICIES: dict[str, Policy] = {
    "as planned": as_planned,
    "longest first": filler_first,
    "rare first": rare_first,
    "rare beside 1 filler": rare_beside_filler(1),
    "rare beside 4 fillers": rare_beside_filler(4),
    "full, then rare": full_then_rare,
}


def tokens_of(jobs: int, seed: int) -> list[int]:
    """Answers' lengths: log-normal, median 120, up to 768, as in benchmarks/workload.py."""
    rng = random.Random(seed)
    return [max(16, min(768, int(rng.lognormvariate(4.79, 0.75)))) for _ in range(jobs)]


def queues_of(lengths: Sequence[int], adapter_of: Callable[[int], int]) -> dict[int, deque[int]]:
    """The jobs by adapter, numbered from 1."""
    queues: dict[int, deque[int]] = {}
    for number, tokens in enumerate(lengths):
        queues.setdefault(1 + adapter_of(number), deque()).append(tokens)
    return queues


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=4096)
    parser.add_argument("--adapters", type=int, default=256)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows: list[tuple[str, int, int, Callable[[int], Callable[[int], int]]]] = [
        ("eight", 2000, 8, lambda seed: lambda i: i % 8),
        ("thirtytwo", 2560, 8, lambda seed: lambda i: i % 32),
        ("zipf, 0.6", int(0.6 * options.jobs), options.slots, lambda s: zipf(options.adapters, s)),
        ("zipf", options.jobs, options.slots, lambda s: zipf(options.adapters, s)),
    ]
    for name, policy in POLICIES.items():
        figures: dict[str, list[object]] = {}
        for row, jobs, slots, spread in rows:
            for seed in range(1, 1 + options.seeds):
                lengths = tokens_of(jobs, seed)
                bare = drain(Model(slots, queues_of(lengths, lambda i: 0)), as_planned)
                model = Model(slots, queues_of(lengths, spread(seed)))
                ratio = round(bare / drain(model, policy), 3)
                figures.setdefault(row, []).append((ratio, model.loads))
        print(json.dumps({"policy": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
