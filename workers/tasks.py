"""The one Celery task: a doorbell. It carries nothing and does nothing but ring."""

from collections.abc import Callable

from celery import Celery

from db.doorbell import DOORBELL_TASK


def register_doorbell(app: Celery, ring: Callable[[], None]) -> None:
    """Register the doorbell with an application. Early acknowledged: it is safe to lose."""

    @app.task(name=DOORBELL_TASK, acks_late=False, ignore_result=True)  # type: ignore[untyped-decorator]
    def doorbell() -> None:
        ring()
