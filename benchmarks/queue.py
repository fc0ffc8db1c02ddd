"""Queue speed with an engine that does nothing, beside other queues on the same servers.

    python -m benchmarks.queue [--jobs N] [--rounds R] [--only drain,bulk,http,pickup]

Bulk submission beside a raw COPY, single submissions over HTTP, how soon an idle worker has a job,
and the drain. There every round drains the same backlog by each contender in turn, in another order
each time, so that a neighbour's load on the machine falls on all alike. The clock runs from the
word "go" to the last commit: claimed, run, recorded, and for Lorry its answer stored. The slow ones
get fewer jobs.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import backlog, bulk, http_submit, peers, pickup, plain_celery
from benchmarks.drivers import race
from benchmarks.servers import Servers, running_servers
from db.bulk import submit_many
from db.database import Database
from db.migrate import upgrade
from db.registry import Target

ADAPTERS = 8
TABLES = "jobs, job_inputs, job_outputs, waiting_adapters"
#: The peers that Lorry is to outrun: those that keep jobs in Postgres.
PEERS = ("pgqueuer", "procrastinate")
#: Seconds of work for the slow contenders would be minutes with everybody's number of jobs.
SLOW_SHARE = 40


@dataclass(slots=True)
class Contender:
    """One queue in one setting.

    Args:
        run: drains so many jobs and returns the seconds.
        share: how many times fewer jobs it gets.
    """

    name: str
    run: Callable[[int], float]
    share: int = 1
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Jobs per second, the median of the rounds."""
        return statistics.median(self.rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="of the drain; bulk: 50,000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="bulk,http,pickup,drain")
    options = parser.parse_args()
    parts = set(options.only.split(","))
    with running_servers() as servers, tempfile.TemporaryDirectory() as folder:
        upgrade(servers.postgres_url)
        targets = asyncio.run(_register(servers, Path(folder)))
        if "bulk" in parts:
            show("bulk submission", bulk.measure(servers, targets, 50_000, options.rounds))
        if "http" in parts:
            show("single submissions", http_submit.measure(servers, Path(folder) / "store", 5_000))
        if "pickup" in parts:
            show("idle pickup", pickup.measure(servers, 200))
        if "drain" in parts:
            compete(enter(servers, Path(folder), targets), options.jobs, options.rounds)


def show(name: str, figures: Mapping[str, object]) -> None:
    """One JSON line, at once."""
    print(json.dumps({"name": name, **figures}), flush=True)


def compete(contenders: list[Contender], jobs: int, rounds: int) -> None:
    """Run the rounds and print every run, the medians, and the ratio."""
    for number in range(rounds):
        for contender in rotated(contenders, number):
            share = jobs // contender.share
            rate = share / contender.run(share)
            contender.rates.append(rate)
            show(contender.name, {"round": number + 1, "jobs": share, "jobs_s": round(rate)})
    report(contenders)


def enter(servers: Servers, folder: Path, targets: list[Target]) -> list[Contender]:
    """Prepare the servers for every contender."""
    servers.execute("CREATE DATABASE pgqueuer", "CREATE DATABASE procrastinate")
    asyncio.run(peers.install_pgqueuer(servers.url("pgqueuer")))
    asyncio.run(peers.install_procrastinate(servers.url("procrastinate")))
    lorry = _Lorry(servers, folder, targets)
    return [
        Contender("lorry, 1 worker", lambda jobs: lorry.run(jobs, 1)),
        Contender("pgqueuer, 1 process of 2 managers", lambda n: _pgqueuer(servers, n, 1, 2)),
        Contender("pgqueuer, 2 processes of 1 manager", lambda n: _pgqueuer(servers, n, 2, 1)),
        Contender("lorry, 2 workers", lambda jobs: lorry.run(jobs, 2)),
        Contender("procrastinate, 2 workers", lambda n: _procrastinate(servers, n), SLOW_SHARE),
        Contender(
            "celery, 2 processes",
            lambda n: plain_celery.drain(servers.broker_url, servers.valkey(), n, 2),
            SLOW_SHARE,
        ),
    ]


def rotated(contenders: list[Contender], by: int) -> list[Contender]:
    """The same ones, another one first."""
    by = by * 2 % len(contenders)
    return contenders[by:] + contenders[:by]


def report(contenders: list[Contender]) -> None:
    """The medians, and Lorry's ratio to the faster peer of those that keep jobs in Postgres."""
    for contender in contenders:
        show(contender.name, {"median_jobs_s": round(contender.rate)})
    ours = max(c.rate for c in contenders if c.name.startswith("lorry"))
    theirs = max(c.rate for c in contenders if c.name.startswith(PEERS))
    both = statistics.median(
        best_of_round("lorry", contenders, number) / best_of_round(PEERS, contenders, number)
        for number in range(len(contenders[0].rates))
    )
    print(f"median of the rounds' ratios: {both:.2f}")
    print(f"lorry / faster peer: {ours / theirs:.2f}")


def best_of_round(names: str | tuple[str, ...], contenders: list[Contender], number: int) -> float:
    """The best rate in a round of the contenders whose names begin so."""
    return max(c.rates[number] for c in contenders if c.name.startswith(names))


async def _register(servers: Servers, folder: Path) -> list[Target]:
    async with Database.connect(servers.postgres_url) as database:
        return await backlog.register(database, folder, ADAPTERS)


class _Lorry:
    """Fills and drains Lorry's tables."""

    def __init__(self, servers: Servers, folder: Path, targets: list[Target]) -> None:
        self._servers = servers
        self._folder = folder
        self._targets = targets

    def run(self, jobs: int, workers: int) -> float:
        self._servers.execute(f"TRUNCATE {TABLES}")
        asyncio.run(self._fill(jobs))
        settle(self._servers, "lorry")
        where = [self._servers.postgres_url, self._servers.broker_url, str(self._folder)]
        return race([["-m", "benchmarks.noop_worker", *where]] * workers, jobs)

    async def _fill(self, jobs: int) -> None:
        async with Database.connect(self._servers.postgres_url) as database:
            await submit_many(database, backlog.new_jobs(jobs, self._targets))


def _pgqueuer(servers: Servers, jobs: int, processes: int, managers: int) -> float:
    url = servers.url("pgqueuer")
    asyncio.run(peers.fill_pgqueuer(url, jobs))
    settle(servers, "pgqueuer")
    command = ["-m", "benchmarks.peers", "pgqueuer", url, str(managers), "250"]
    return race([command] * processes, jobs)


def _procrastinate(servers: Servers, jobs: int) -> float:
    url = servers.url("procrastinate")
    asyncio.run(peers.fill_procrastinate(url, jobs))
    settle(servers, "procrastinate")
    return race([["-m", "benchmarks.peers", "procrastinate", url, "16"]] * 2, jobs)


def settle(servers: Servers, database: str) -> None:
    """What a filled queue owes to the background, done before the clock: the same for everybody."""
    servers.execute("VACUUM ANALYZE", "CHECKPOINT", database=database)


if __name__ == "__main__":
    main()
