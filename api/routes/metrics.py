"""/metrics, for Prometheus."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api.services import ServicesDep

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus's text format."}},
    response_class=Response,
)
async def get_metrics(services: ServicesDep) -> Response:
    """Queue, workers and requests.

    No key is asked for, as on /healthz: it shows sums over all tenants, labelled by base model and
    by the id of the adapter version, which no tenant sees or names anywhere. The queue is looked at
    once in 5 seconds at most, and 503 is the answer while Postgres is away.
    """
    return Response(await services.metrics.text(services.database), media_type=CONTENT_TYPE_LATEST)
