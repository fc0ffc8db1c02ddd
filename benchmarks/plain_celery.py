"""Plain Celery doing nothing with each job: for benchmarks/queue.py.

    python -m benchmarks.plain_celery BROKER_URL WORKERS

runs the worker alone; `drain` fills the queue and starts it.
"""

import subprocess
import sys
import time

import redis
from celery import Celery

from benchmarks.backlog import body

#: Messages wait here until the worker is up, and are then moved, all at once, to where it looks.
STAGED, QUEUE = "bench-staged", "bench"
#: How kombu names the messages that a worker holds unacknowledged.
HELD = "unacked"
POLL_SECONDS = 0.02


def application(broker_url: str) -> Celery:
    """An application whose one task does nothing; acknowledged late, so that no job is lost."""
    app = Celery("bench", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=64,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        task_default_queue=QUEUE,
        broker_transport_options={"priority_steps": [0]},
    )

    def noop(body: str) -> None:
        return

    app.task(name="noop")(noop)
    return app


def drain(broker_url: str, valkey: "redis.Redis", jobs: int, workers: int) -> float:
    """Queue jobs, start a worker of so many processes, and return the seconds of its drain."""
    app = application(broker_url)
    with app.producer_or_acquire() as producer:
        for number in range(jobs):
            app.send_task("noop", (body(number),), queue=STAGED, producer=producer)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.plain_celery", broker_url, str(workers)],
        stdout=sys.stderr,
    )
    try:
        _wait_until_it_looks(valkey)
        started = time.monotonic()
        valkey.rename(STAGED, QUEUE)
        while valkey.llen(QUEUE) or valkey.hlen(HELD):
            time.sleep(POLL_SECONDS)
        return time.monotonic() - started
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_it_looks(valkey: "redis.Redis") -> None:
    """Return once a client waits in BRPOP: then the worker consumes."""
    while not any(str(client["cmd"]) == "brpop" for client in valkey.client_list()):
        time.sleep(POLL_SECONDS)
    time.sleep(0.5)


if __name__ == "__main__":
    application(sys.argv[1]).Worker(
        concurrency=int(sys.argv[2]),
        loglevel="ERROR",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    ).start()
