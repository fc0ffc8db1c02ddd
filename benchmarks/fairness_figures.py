"""What benchmarks/fairness.py reads out of Postgres when a case is over."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from benchmarks.stack import percentile
from db.database import Database


@dataclass(frozen=True, slots=True)
class Sent:
    """A submitted job whose wait is measured.

    Args:
        label: which figure it belongs to.
        at: when, in seconds since the epoch.
        ahead: how many other lines were on the waiting list then.
    """

    label: str
    at: float
    ahead: int


@dataclass(frozen=True, slots=True)
class Observed:
    """What was submitted, and from when to when; times in seconds since the epoch.

    Args:
        flood: the id of the tenant that floods.
        began: when the others began to submit.
        ended: when they ceased.
        until: when we ceased to wait for their jobs.
    """

    sent: Mapping[UUID, Sent]
    flood: int
    began: float
    ended: float
    until: float

    def labelled(self, label: str) -> dict[UUID, Sent]:
        """The jobs that belong to a figure."""
        return {job_id: sent for job_id, sent in self.sent.items() if sent.label == label}


Rows = Mapping[UUID, asyncpg.Record]


async def figures_of(
    database: Database, observed: Observed, options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of a case, in seconds of the scene."""
    rows = await read_rows(database)
    longest = options.speed * max(r["finished"] - r["fed"] for r in rows.values() if r["finished"])
    labels = dict.fromkeys(sent.label for sent in observed.sent.values())
    waits = {label: waits_of(label, observed, rows, options.speed) for label in labels}
    return {
        "speed": options.speed,
        "seconds": options.seconds,
        **waits.pop("others"),
        "longest_running_s": round(longest, 1),
        "bound_s": round(bound(options.others, longest, options), 1),
        "over_own_bound": round(over_own_bound(observed, rows, longest, options), 4),
        **rates(observed, rows, options),
        **waits,
    }


async def read_rows(database: Database) -> dict[UUID, asyncpg.Record]:
    """Every job that was ever fed."""
    async with database.connection() as connection:
        rows = await connection.fetch(
            """
            SELECT id, jobs.tenant_id, completion_tokens AS tokens,
                   extract(epoch FROM started_at)::float8 AS fed,
                   extract(epoch FROM finished_at)::float8 AS finished
            FROM jobs LEFT JOIN job_outputs o ON o.job_id = jobs.id WHERE started_at IS NOT NULL
            """
        )
    return {row["id"]: row for row in rows}


def bound(ahead: int, longest: float, options: argparse.Namespace) -> float:
    """How long an adapter may wait behind so many others."""
    return float(math.ceil(ahead / options.slots) * options.quantum + longest)


def waits_of(label: str, observed: Observed, rows: Rows, speed: float) -> dict[str, Any]:
    """How long the jobs of a label waited. One that was never fed has waited until the end."""
    jobs = observed.labelled(label)
    fed = [rows[i]["fed"] if i in rows else observed.until for i in jobs]
    finished = [(rows[i]["finished"] if i in rows else None) or observed.until for i in jobs]
    sent = [one.at for one in jobs.values()]
    return {
        "jobs": len(jobs),
        "never_fed": sum(i not in rows for i in jobs),
        "until_fed_s": percentiles(sent, fed, speed),
        "until_finished_s": percentiles(sent, finished, speed),
    }


def percentiles(sent: Sequence[float], ended: Sequence[float], speed: float) -> dict[str, float]:
    """p50, p99 and the most of the time between."""
    waits = [speed * (end - begin) for begin, end in zip(sent, ended, strict=True)]
    found = {"p50": percentile(waits, 0.5), "p99": percentile(waits, 0.99), "max": max(waits)}
    return {name: round(value, 2) for name, value in found.items()}


def over_own_bound(
    observed: Observed, rows: Rows, longest: float, options: argparse.Namespace
) -> float:
    """The share of the others' jobs that waited longer than what stood before each explains."""
    jobs = observed.labelled("others")
    over = 0
    for job_id, sent in jobs.items():
        fed = rows[job_id]["fed"] if job_id in rows else observed.until
        over += options.speed * (fed - sent.at) > bound(sent.ahead, longest, options)
    return over / max(1, len(jobs))


def rates(observed: Observed, rows: Rows, options: argparse.Namespace) -> dict[str, int]:
    """Output tokens per second while the others submitted, and what a full engine would make."""
    done = [r for r in rows.values() if r["finished"]]
    in_time = [r for r in done if observed.began <= r["finished"] <= observed.ended]
    seconds = options.speed * (observed.ended - observed.began)
    flood = sum(r["tokens"] for r in in_time if r["tenant_id"] == observed.flood)
    everything = sum(r["tokens"] for r in in_time)
    full = 1000 * options.seqs / (options.step_ms + options.step_ms_per_seq * options.seqs)
    return {
        "flood_tok_s": round(flood / seconds),
        "others_tok_s": round((everything - flood) / seconds),
        "engine_tok_s_at_most": round(full),
    }
