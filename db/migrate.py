"""Migrations, run by the `lorry migrate` command and by `lorry up`."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

import migrations
from db.database import Database

_FOLDER = Path(migrations.__file__).parent


def upgrade(database_url: str, revision: str = "head") -> None:
    """Bring the schema to `revision`. Blocking; runs its own event loop."""
    command.upgrade(alembic_config(database_url), revision)


def downgrade(database_url: str, revision: str) -> None:
    """Take the schema back to `revision` (`base` removes it)."""
    command.downgrade(alembic_config(database_url), revision)


def head_revision() -> str:
    """The newest revision that this release knows."""
    head = ScriptDirectory(str(_FOLDER)).get_current_head()
    assert head is not None, "a release has at least one migration"
    return head


async def current_revision(database: Database) -> str | None:
    """The schema's revision, or None for a database that was never migrated.

    Raises:
        Unavailable: Postgres cannot be reached.
    """
    if await database.fetch_value("SELECT to_regclass('alembic_version')") is None:
        return None
    revision: str | None = await database.fetch_value("SELECT version_num FROM alembic_version")
    return revision


def alembic_config(database_url: str) -> Config:
    """Alembic's settings without an ini file; `%` would be an interpolation there."""
    config = Config()
    config.set_main_option("script_location", str(_FOLDER))
    config.set_main_option("file_template", "r%%(rev)s_%%(slug)s")
    url = database_url.replace("postgresql://", "postgresql+asyncpg://", 1)
    url = url.replace("postgres://", "postgresql+asyncpg://", 1)
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config
