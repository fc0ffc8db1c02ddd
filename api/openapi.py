"""The OpenAPI document: the job's body, which is parsed from its bytes, and the error documents."""

import functools
from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from api.errors import ProblemDetails
from core.batch_request import BatchBody
from core.request_body import ChatBody, CompletionBody
from core.schedule_request import ScheduleBody

_REFERENCE: Final = "#/components/schemas/{model}"

EXAMPLES: Final[dict[str, Any]] = {
    "chat": {
        "summary": "A chat, as sent to /v1/chat/completions",
        "value": {
            "model": "sql",
            "messages": [{"role": "user", "content": "How many orders came in last week?"}],
            "max_tokens": 64,
            "temperature": 0,
        },
    },
    "completion": {
        "summary": "A completion, as sent to /v1/completions",
        "value": {"model": "sql", "prompt": "SELECT", "max_tokens": 16, "seed": 7},
    },
    "structured": {
        "summary": "JSON that fits a schema, with Lorry's own fields",
        "value": {
            "model": "task:extraction",
            "messages": [{"role": "user", "content": "Ada Lovelace was born in London."}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "person",
                    "schema": {
                        "type": "object",
                        "properties": {"name": {"type": "string"}, "city": {"type": "string"}},
                        "required": ["name", "city"],
                    },
                },
            },
            "priority": 10,
            "metadata": {"document": "4711"},
        },
    },
}

#: `openapi_extra` of the route that reads the body itself.
JOB_REQUEST_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "oneOf": [
                        {"$ref": _REFERENCE.format(model="ChatBody")},
                        {"$ref": _REFERENCE.format(model="CompletionBody")},
                    ]
                },
                "examples": EXAMPLES,
            }
        },
    },
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "description": "makes a repeat safe for 24 hours",
            "schema": {"type": "string", "minLength": 1, "maxLength": 255},
        }
    ],
}

_IDEMPOTENCY: Final = JOB_REQUEST_BODY["parameters"]

#: The same for a batch.
BATCH_REQUEST_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="BatchBody")}}},
    },
    "parameters": _IDEMPOTENCY,
}

#: The same for a schedule, made or changed.
SCHEDULE_REQUEST_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _REFERENCE.format(model="ScheduleBody")}}
        },
    }
}

#: `responses` of every route.
PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    code: {
        "description": description,
        "content": {
            "application/problem+json": {
                "schema": {"$ref": _REFERENCE.format(model="ProblemDetails")}
            }
        },
    }
    for code, description in (
        ("4XX", "The request cannot be carried out as it is."),
        ("5XX", "Lorry cannot carry it out now; 503 says in Retry-After when to try again."),
    )
}


def describe(app: FastAPI) -> None:
    """Let `app` describe itself with the schemas that its routes do not declare."""
    # the class's own: what the error handler put in its place adds a second set of error schemas
    generate: Callable[[], dict[str, Any]] = FastAPI.openapi.__get__(app)

    def openapi() -> dict[str, Any]:
        document = generate()
        document["components"]["schemas"].update(_schemas())
        return document

    app.openapi = openapi  # type: ignore[method-assign]


@functools.cache
def _schemas() -> dict[str, Any]:
    """Once per process: it takes 50 ms, and anyone may ask for it again and again."""
    _, definitions = models_json_schema(
        [
            (ChatBody, "validation"),
            (CompletionBody, "validation"),
            (BatchBody, "validation"),
            (ScheduleBody, "validation"),
            (ProblemDetails, "validation"),
        ],
        ref_template=_REFERENCE,
    )
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas
