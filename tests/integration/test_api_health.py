"""/healthz and /readyz, unknown paths, and faults."""

from fastapi import FastAPI

from db import registry, workers
from db.database import Database
from db.migrate import upgrade
from db.workers import WorkerFacts
from tests.support.api import BASE, CONTEXT, assert_problem, running_api


async def test_ready_once_migrated(empty_database_url: str) -> None:
    async with running_api(empty_database_url) as api:
        response = await api.client.get("/readyz")
        problem = assert_problem(response, 503, "revision none", "lorry migrate")
        assert problem["code"] == "not_ready"
        assert response.headers["retry-after"]
        assert (await api.client.get("/healthz")).json() == {"live": True}
        upgrade_in_thread(empty_database_url)
        assert (await api.client.get("/readyz")).json() == {"ready": True}


def upgrade_in_thread(url: str) -> None:
    import threading

    thread = threading.Thread(target=upgrade, args=(url,))
    thread.start()
    thread.join()


async def test_with_a_model_ready_means_listed_and_a_live_worker(
    database: Database, database_url: str
) -> None:
    async with running_api(database_url, ready_model=BASE) as api:
        assert_problem(await api.client.get("/readyz"), 503, BASE, "not listed yet")
        base_id = await registry.declare_base(database, BASE, CONTEXT)
        assert_problem(await api.client.get("/readyz"), 503, BASE, "no worker")
        facts = WorkerFacts(base_id, "host", 1, "simulated", "1", {})
        worker_id = await workers.register(database, facts, 600)
        assert (await api.client.get("/readyz")).status_code == 200
        await workers.sign_off(database, worker_id)
        assert_problem(await api.client.get("/readyz"), 503, "no worker")


async def test_an_unknown_path_is_a_problem_document(database_url: str) -> None:
    for path in ["/", "/v1/job", "/v1/jobs/", "/v1/chat/completions"]:
        async with running_api(database_url) as api:
            problem = assert_problem(await api.client.post(path), 404, path, "/docs")
            assert problem["code"] == "not_found"


async def test_a_wrong_method_names_the_right_one(database_url: str) -> None:
    async with running_api(database_url) as api:
        response = await api.client.put("/v1/models")
        problem = assert_problem(response, 405, "PUT", "/v1/models", "GET")
        assert response.headers["allow"] == "GET"
        assert problem["code"] == "method_not_allowed"


async def test_a_fault_of_ours_shows_no_internals(database_url: str) -> None:
    async with running_api(database_url) as api:
        break_down(api.app)
        problem = assert_problem(await api.client.get("/broken"), 500, "fault of Lorry's")
        assert "secret" not in str(problem)


def break_down(app: FastAPI) -> None:
    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("secret")
