"""GET /v1/usage: which days may be asked for."""

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta

import pytest

from tests.support.api import Api, running_api


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    async with running_api(database_url) as running:
        yield running


async def test_days_that_cannot_be_are_refused(api: Api) -> None:
    today = datetime.now(UTC).date()
    for given, field in (
        ({"end": "0001-01-01"}, "end"),  # thirty days before it, there is no day
        ({"start": "1999-12-31"}, "start"),
        ({"start": str(today), "end": str(today - timedelta(days=1))}, "start"),
        ({"start": str(today - timedelta(days=366))}, "start"),
    ):
        answer = await api.client.get("/v1/usage", params=given)
        assert answer.status_code == 422, given
        assert field in answer.text, given
    for given in ({}, {"end": str(date(2000, 1, 1))}, {"start": str(today)}):
        answer = await api.client.get("/v1/usage", params=given)
        assert (answer.status_code, answer.json()["data"]) == (200, []), given
