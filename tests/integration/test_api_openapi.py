"""The OpenAPI document: complete, and its examples are true."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from api.app import create_app
from core.request import parse_job_request
from core.settings import Settings


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings(database_url="postgresql://nowhere/none")).openapi()


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for child in value.values():
            yield from nodes(child)
    elif isinstance(value, list):
        for child in value:
            yield from nodes(child)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = {node["$ref"] for node in nodes(document) if isinstance(node.get("$ref"), str)}
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references
    assert references <= schemas


def test_every_schema_is_one(document: dict[str, Any]) -> None:
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_every_route_is_described(document: dict[str, Any]) -> None:
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) == {
        "POST /v1/jobs",
        "GET /v1/jobs",
        "GET /v1/jobs/{job_id}",
        "GET /v1/jobs/{job_id}/attempts",
        "POST /v1/jobs/{job_id}/cancel",
        "POST /v1/files",
        "GET /v1/files",
        "GET /v1/files/{file_id}",
        "DELETE /v1/files/{file_id}",
        "GET /v1/files/{file_id}/content",
        "POST /v1/webhooks",
        "GET /v1/webhooks",
        "GET /v1/webhooks/secret",
        "POST /v1/webhooks/secret",
        "GET /v1/webhooks/{webhook_id}",
        "PATCH /v1/webhooks/{webhook_id}",
        "DELETE /v1/webhooks/{webhook_id}",
        "POST /v1/webhooks/{webhook_id}/rotate",
        "POST /v1/webhooks/{webhook_id}/test",
        "GET /v1/webhooks/{webhook_id}/deliveries",
        "POST /v1/webhooks/{webhook_id}/replay",
        "GET /v1/deliveries",
        "GET /v1/deliveries/{delivery_id}",
        "POST /v1/deliveries/{delivery_id}/replay",
        "POST /v1/deliveries/replay",
        "POST /v1/batches",
        "GET /v1/batches",
        "GET /v1/batches/{batch_id}",
        "POST /v1/batches/{batch_id}/cancel",
        "GET /v1/batches/{batch_id}/results",
        "POST /v1/schedules",
        "GET /v1/schedules",
        "POST /v1/schedules/preview",
        "GET /v1/schedules/{schedule_id}",
        "PATCH /v1/schedules/{schedule_id}",
        "DELETE /v1/schedules/{schedule_id}",
        "POST /v1/schedules/{schedule_id}/pause",
        "POST /v1/schedules/{schedule_id}/resume",
        "POST /v1/schedules/{schedule_id}/run",
        "POST /v1/schedules/{schedule_id}/skip-next",
        "GET /v1/schedules/{schedule_id}/preview",
        "GET /v1/schedules/{schedule_id}/runs",
        "GET /v1/usage",
        "POST /v1/adapters",
        "GET /v1/adapters",
        "POST /v1/adapters/check",
        "GET /v1/adapters/{name}",
        "DELETE /v1/adapters/{name}",
        "GET /v1/adapters/{name}/versions",
        "GET /v1/adapters/{name}/versions/{version}",
        "POST /v1/adapters/{name}/rollback",
        "GET /v1/tasks",
        "GET /v1/tasks/{name}",
        "PUT /v1/tasks/{name}",
        "DELETE /v1/tasks/{name}",
        "GET /v1/models",
        "GET /v1/models/{name}",
        "GET /healthz",
        "GET /readyz",
        "GET /metrics",
    }
    for name, operation in operations.items():
        assert operation["summary"], name
        assert "application/problem+json" in operation["responses"]["4XX"]["content"]
        assert ("security" in operation) == ("/v1/" in name)


def test_examples_are_accepted_by_the_parser_and_the_schema(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    schema = {**content["schema"], "components": document["components"]}
    assert len(content["examples"]) >= 2
    for example in content["examples"].values():
        parse_job_request(json.dumps(example["value"]).encode())
        Draft202012Validator(schema).validate(example["value"])


def test_the_document_can_be_asked_for_twice(document: dict[str, Any]) -> None:
    app = create_app(Settings(database_url="postgresql://nowhere/none"))
    assert app.openapi() == app.openapi() == document
