"""Doorbells: the Celery messages that say "partition P has work", and the queues they go to.

A doorbell carries no job, so it may be lost, repeated or come late: a worker also looks by itself.
Ringing never waits for the broker and never fails its caller.
"""

import logging
import threading
import time
from typing import Any, Final

from celery import Celery

from core.partitions import queue_name

log = logging.getLogger(__name__)

#: The one task that Lorry's workers know.
DOORBELL_TASK: Final = "lorry.doorbell"
#: A doorbell older than this is dropped: the workers have looked by themselves since.
EXPIRES_SECONDS: Final = 30.0
#: At most one ring per partition and process in this time; a later one waits for its end.
PAUSE_SECONDS: Final = 0.05
#: How long the broker may take to connect or answer.
BROKER_SECONDS: Final = 3.0


def celery_app(broker_url: str) -> Celery:
    """A Celery application for doorbells: no result backend, nothing that carries correctness."""
    app = Celery("lorry", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=False,
        task_default_delivery_mode="transient",
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=BROKER_SECONDS,
        broker_heartbeat=0,
        broker_transport_options=transport_options(broker_url),
    )
    return app


def transport_options(broker_url: str) -> dict[str, Any]:
    """What the broker's transport needs: bounded waits, and one Redis list per queue."""
    if not broker_url.startswith(("redis", "valkey", "sentinel")):
        return {}
    return {
        "priority_steps": [0],  # each step is another list in every BRPOP
        "socket_connect_timeout": BROKER_SECONDS,
        "socket_keepalive": True,
        "health_check_interval": 25,
    }


def publisher_timeouts(broker_url: str) -> dict[str, float]:
    """Bounded waits for a broker that takes connections and then says nothing."""
    if broker_url.startswith(("redis", "valkey", "sentinel")):
        return {"socket_timeout": BROKER_SECONDS}
    if broker_url.startswith("amqp"):
        return {"read_timeout": BROKER_SECONDS, "write_timeout": BROKER_SECONDS}
    return {}


class Doorbell:
    """Rings partitions from a thread of its own: on the leading edge, then once per pause."""

    def __init__(self, broker_url: str) -> None:
        self._app = celery_app(broker_url)
        # a publisher reads nothing but answers; one that never comes must not hold up every ring
        self._app.conf.broker_transport_options |= publisher_timeouts(broker_url)
        self._lock = threading.Condition()
        #: queues that want a ring, and when each was last rung (monotonic seconds)
        self._wanted: set[str] = set()
        self._rung_at: dict[str, float] = {}
        self._closing = False
        self._reachable = True
        self._thread = threading.Thread(target=self._run, name="doorbell", daemon=True)
        self._thread.start()

    def ring(self, base_model: str, partition: int) -> None:
        """Ask for a ring; returns at once. Call it after the work's commit, never before."""
        with self._lock:
            self._wanted.add(queue_name(base_model, partition))
            self._lock.notify()

    def close(self) -> None:
        """Ring what is wanted and stop; a broker that does not answer is not waited for."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join(timeout=1)

    def _run(self) -> None:
        while (queue := self._next_due()) is not None:
            self._publish(queue)

    def _next_due(self) -> str | None:
        """Wait for a queue whose pause is over; None when closed and nothing is wanted."""
        with self._lock:
            while True:
                now = time.monotonic()
                due_at = {q: self._rung_at.get(q, -1e9) + PAUSE_SECONDS for q in self._wanted}
                first = min(due_at, key=due_at.__getitem__, default=None)
                if first is not None and (due_at[first] <= now or self._closing):
                    self._wanted.discard(first)
                    self._rung_at[first] = now
                    return first
                if self._closing:
                    return None
                self._lock.wait(None if first is None else due_at[first] - now)

    def _publish(self, queue: str) -> None:
        try:
            self._app.send_task(
                DOORBELL_TASK, queue=queue, expires=EXPIRES_SECONDS, retry=False, ignore_result=True
            )
        except Exception as error:  # a lost ring costs promptness alone: the workers look anyway
            if self._reachable:
                log.warning(
                    "Broker unreachable, jobs flow by polling until it is back: %s",
                    error,
                    extra={"action": "doorbell_lost", "queue": queue},
                )
            self._reachable = False
        else:
            if not self._reachable:
                log.info("Broker is back", extra={"action": "doorbell_back"})
            self._reachable = True
