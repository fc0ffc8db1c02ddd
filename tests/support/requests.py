"""Bodies of requests, and what becomes of them."""

import json
from typing import Any

import pytest

from core.errors import InvalidRequest
from core.request import JobRequest, parse_job_request

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
PROMPT: dict[str, Any] = {"model": "m", "prompt": "Hi"}


def parse(body: Any) -> JobRequest:
    return parse_job_request(json.dumps(body).encode())


def refusal(body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    return caught.value


def with_schema(schema: Any) -> dict[str, Any]:
    json_schema = {"name": "s", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def message(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more}]}
