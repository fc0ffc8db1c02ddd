"""Keys: who may ask, and what is said to who may not."""

from db import registry
from db.database import Database
from db.tenants import create_key, revoke_key
from tests.support.api import BASE, CHAT, CONTEXT, assert_problem, running_api

BAD_HEADERS = [
    (None, "no API key was given"),
    ("Bearer", "no API key was given"),
    ("Basic abc", "no API key was given"),
    ("Bearer wrong", "unknown or revoked"),
    ("Bearer ü", "unknown or revoked"),
]


async def test_a_missing_or_wrong_key_is_401(database_url: str) -> None:
    for header, says in BAD_HEADERS:
        headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
        async with running_api(database_url, require_keys=True) as api:
            for method, path in (
                ("GET", "/v1/jobs"),
                ("POST", "/v1/jobs"),
                ("GET", "/v1/jobs/job_1?wait=99"),
                ("POST", "/v1/jobs/job_1/cancel"),
                ("GET", "/v1/models"),
                ("GET", "/v1/models/x"),
            ):
                response = await api.client.request(method, path, headers=headers, content=b"{")
                problem = assert_problem(response, 401, says)
                assert response.headers["www-authenticate"] == "Bearer"
                assert problem["code"] == "unauthorized"


async def test_a_revoked_key_ends_at_once(database: Database, database_url: str) -> None:
    await registry.declare_base(database, BASE, CONTEXT)
    key = await create_key(database, "one")
    headers = {"Authorization": f"bearer {key}"}
    async with running_api(database_url, require_keys=True) as api:
        assert (await api.submit(CHAT, **headers)).status_code == 202
        assert await revoke_key(database, key[:12])
        problem = assert_problem(await api.submit(CHAT, **headers), 401, "revoked")
        assert key not in str(problem)


async def test_health_needs_no_key(database_url: str) -> None:
    async with running_api(database_url, require_keys=True) as api:
        for path in ("/healthz", "/readyz", "/openapi.json"):
            assert (await api.client.get(path)).status_code == 200


async def test_without_required_keys_any_key_will_do(database: Database, database_url: str) -> None:
    """OpenAI's clients always send one."""
    await registry.declare_base(database, BASE, CONTEXT)
    async with running_api(database_url) as api:
        assert (await api.submit(CHAT, Authorization="Bearer EMPTY")).status_code == 202
        page = (await api.client.get("/v1/jobs")).json()
        assert len(page["data"]) == 1
