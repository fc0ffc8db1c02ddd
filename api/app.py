"""The application: routes, errors, and the services that live as long as it does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from api.errors import handle_errors
from api.http_metrics import HttpMetrics
from api.metrics import ApiMetrics
from api.openapi import PROBLEMS, describe
from api.routes import (
    adapters,
    batches,
    deliveries,
    files,
    health,
    jobs,
    metrics,
    models,
    schedules,
    tasks,
    usage,
    webhooks,
)
from api.services import open_services
from core.settings import Settings

DESCRIPTION = (
    "An asynchronous job queue for text generation over many LoRA adapters. Submit the request "
    "that you would have sent to OpenAI's API or to vLLM; read the answer when it is there."
)


def create_app(settings: Settings, ready_model: str | None = None) -> FastAPI:
    """An ASGI application; nothing connects before its lifespan begins.

    Args:
        ready_model: the base model that needs a live worker before /readyz is 200, or None.
    """

    counts = ApiMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, ready_model, counts) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="Lorry",
        description=DESCRIPTION,
        version=_version(),
        lifespan=lifespan,
        redoc_url=None,
        responses=PROBLEMS,
        # /v1/jobs/ is not /v1/jobs: a redirect would lose the body of a POST with some clients
        redirect_slashes=False,
    )
    handle_errors(app)
    for module in (
        jobs,
        batches,
        schedules,
        files,
        models,
        adapters,
        tasks,
        webhooks,
        deliveries,
        usage,
        health,
        metrics,
    ):
        app.include_router(module.router)
    describe(app)
    app.add_middleware(HttpMetrics, metrics=counts)
    return app


def _version() -> str:
    try:
        return version("lorry")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0"
