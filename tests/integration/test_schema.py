"""The schema: migrations and models agree, and every migration goes back."""

import asyncio
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from db.database import Database
from db.migrate import current_revision, downgrade, head_revision, upgrade
from db.models import Base


def test_migrated_schema_is_the_models_schema(empty_database_url: str) -> None:
    upgrade(empty_database_url)

    def differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        return list(compare_metadata(context, Base.metadata))

    async def run() -> list[Any]:
        engine = create_async_engine(
            empty_database_url.replace("postgresql://", "postgresql+asyncpg://")
        )
        try:
            async with engine.connect() as connection:
                return await connection.run_sync(differences)
        finally:
            await engine.dispose()

    assert asyncio.run(run()) == []


def test_fresh_schema_is_the_migrated_schema(postgres: Any, template: str) -> None:
    """CHECK constraints and storage options too, which Alembic does not compare."""
    postgres.create_database("fresh_models")

    async def describe(name: str, create: bool) -> list[tuple[Any, ...]]:
        engine = create_async_engine(
            postgres.url(name).replace("postgresql://", "postgresql+asyncpg://")
        )
        try:
            if create:
                async with engine.begin() as connection:
                    await connection.run_sync(Base.metadata.create_all)
        finally:
            await engine.dispose()
        plain = await asyncpg.connect(postgres.url(name))
        try:
            return [tuple(row.values()) for row in await plain.fetch(_DESCRIBE)]
        finally:
            await plain.close()

    try:
        migrated = asyncio.run(describe(template, create=False))
        fresh = asyncio.run(describe("fresh_models", create=True))
    finally:
        postgres.drop_database("fresh_models")
    assert fresh == migrated
    assert len(fresh) > 50


_DESCRIBE = """
SELECT 'column', table_name::text, column_name::text, data_type::text, is_nullable::text,
       coalesce(column_default, '')
FROM information_schema.columns
WHERE table_schema = 'public' AND table_name <> 'alembic_version'
UNION ALL
SELECT 'constraint', conrelid::regclass::text, conname::text, pg_get_constraintdef(oid), '', ''
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
  AND conrelid::regclass::text <> 'alembic_version' AND contype <> 'n'
UNION ALL
SELECT 'index', tablename::text, indexname::text, indexdef, '', ''
FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'
UNION ALL
SELECT 'options', relname::text, array_to_string(reloptions, ','), '', '', ''
FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
  AND relname <> 'alembic_version'
ORDER BY 1, 2, 3
"""


def test_every_migration_goes_back_and_forth(empty_database_url: str) -> None:
    upgrade(empty_database_url)
    downgrade(empty_database_url, "base")

    async def tables() -> list[str]:
        connection = await asyncpg.connect(empty_database_url)
        try:
            rows = await connection.fetch(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            )
            return [row["tablename"] for row in rows]
        finally:
            await connection.close()

    assert asyncio.run(tables()) == ["alembic_version"]
    upgrade(empty_database_url)


async def test_current_revision(empty_database_url: str, database: Database) -> None:
    async with Database.connect(empty_database_url) as empty:
        assert await current_revision(empty) is None
    assert await current_revision(database) == head_revision()


@pytest.mark.parametrize(
    "impossible",
    [
        "state = 'succeeded'",
        "state = 'running'",
        "state = 'running', attempt = 1",
        "state = 'running', lease_owner = 7",
        "state = 'done'",
        "finished_at = now()",
        "lease_owner = 7",
        "attempt = -1",
        "releases = 1",
        "priority = 101",
    ],
)
async def test_postgres_refuses_impossible_jobs(database: Database, impossible: str) -> None:
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO jobs (id, place, tenant_id, base_model_id)"
            " VALUES (gen_random_uuid(), 0, 1, 1)"
        )
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(f"UPDATE jobs SET {impossible}")
