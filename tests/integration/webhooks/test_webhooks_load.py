"""Many jobs over 20 receivers, some of them bad: the good ones are told at once, and once.

Quick here; with --full as in `python -m benchmarks.webhooks`: 10,000 jobs in a minute, 29 s.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.webhooks import measure, receiving
from db.database import Database
from tests.support.deployment import Deployment
from tests.support.scale import Scale

pytestmark = pytest.mark.processes


@pytest.fixture
def deployment(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(
        tmp_path, database_url, broker_url, LORRY_WEBHOOK_ALLOW="127.0.0.0/8"
    ) as running:
        yield running


@pytest.mark.timeout(400)
async def test_bad_receivers_delay_no_good_one(
    deployment: Deployment,
    database: Database,
    scale: Scale,
    record_property: Callable[[str, object], None],
) -> None:
    steward = deployment.start_steward()
    async with receiving(slow_seconds=scale(5, 29)) as receivers:
        figures = await measure(database, receivers, scale(1000, 10_000), scale(6, 60))
    record_property("figures", json.dumps(figures))
    assert figures["arrived"] == figures["owed_to_the_17"] == scale(850, 8500)
    assert (figures["twice"], figures["slow_twice"]) == (0, 0)
    # seconds, not the half minute of the slow one nor the retries of the dead
    assert float(str(figures["p50_seconds"])) < 10, figures
    assert steward.popen.poll() is None
    sent_again = await database.fetch_value(
        "SELECT count(*) FROM deliveries WHERE url = ANY($1::text[])"
        " AND (state <> 'delivered' OR attempt <> 1)",
        receivers.good,
    )
    assert sent_again == 0
