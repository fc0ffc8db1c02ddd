"""An adapter from its upload to its jobs in real processes, its files on a local S3 server."""

import json
from pathlib import Path

import pytest

from db.database import Database
from db.store import Store
from tests.integration.test_blobs import s3_url  # noqa: F401  a fixture
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, all_final, states
from tests.support.processes import lorry
from tests.support.uploads import tiny
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes


async def test_an_adapter_goes_over_s3_from_its_folder_to_its_jobs(
    database: Database,
    database_url: str,
    broker_url: str,
    tmp_path: Path,
    s3_url: str,  # noqa: F811
) -> None:
    with Deployment(tmp_path, database_url, broker_url, LORRY_STORE_URL=s3_url) as deployment:
        deployment.start_api()
        deployment.start_worker("m", "--served-model-name", BASE)
        client = {"LORRY_URL": str(deployment.client.base_url)}
        for number in (1, 2):
            folder = tiny(tmp_path / str(number), seed=number)
            added = lorry("adapters", "add", "sql", str(folder), "--json", **client)
            assert added.returncode == 0, added.stderr
            version = json.loads(added.stdout)
            assert (version["id"], version["state"]) == (f"sql@{number}", "ready")
            assert Store.open(s3_url).has(version["sha256"])
            deployment.post("sql", "x")
        deployment.post("sql@1", "x")
        await eventually(lambda: all_final(database), "the jobs")
        assert await states(database) == {"succeeded": 3}
        copies = {path.name for path in (tmp_path / "cache" / "adapters").iterdir()}
        assert len(copies) == 2  # fetched from S3, verified

        assert lorry("tasks", "set", "ask", "sql", **client).returncode == 0
        refused = lorry("adapters", "remove", "sql", **client)
        assert (refused.returncode, "task:ask" in refused.stderr) == (1, True)
        assert lorry("tasks", "remove", "ask", **client).returncode == 0
        shown = lorry("adapters", "list", **client).stdout
        assert all(word in shown for word in ("sql", "rank", "size", "resident", "tok/s"))
        rolled = lorry("adapters", "rollback", "sql", "1", **client)
        assert rolled.stdout == "sql is sql@1 now\n"
        removed = lorry("adapters", "remove", "sql", **client)
        assert (removed.returncode, removed.stdout) == (0, "removed sql\n")
        remote = lorry("adapters", "add", "x", "hf://org/x", **client)
        assert (remote.returncode, "hf download" in remote.stderr) == (2, True)
