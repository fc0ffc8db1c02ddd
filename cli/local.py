"""The database that a command works on directly: the one configured, or a running stack's."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from db.database import Database

_T = TypeVar("_T")

DataDir = Annotated[
    Path | None,
    typer.Option(help="Data folder of the `lorry up` to use where LORRY_DATABASE_URL is not set."),
]


def database_url(data_dir: Path | None) -> str:
    """`LORRY_DATABASE_URL`, else the running stack's database.

    An explicit `data_dir` is about that stack, whatever the environment says.

    Raises:
        UsageError: neither is there.
    """
    from cli.up.stack import running
    from cli.up.supervisor import default_data_dir
    from core.settings import load_settings

    settings = load_settings(os.environ)
    if settings.database_url and data_dir is None:
        return settings.database_url
    return running((data_dir or default_data_dir()).expanduser().absolute()).database_url


def with_database(data_dir: Path | None, work: Callable[["Database"], Awaitable[_T]]) -> _T:
    """Run something on the database. Raises Unavailable if it cannot be reached."""

    async def run(url: str) -> _T:
        from db.database import Database

        async with Database.connect(url, max_size=1) as database:
            return await work(database)

    return asyncio.run(run(database_url(data_dir)))
