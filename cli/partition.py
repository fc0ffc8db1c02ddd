"""`lorry adapters partition`: a partition of its own for a hot adapter."""

from typing import Annotated

import typer

from cli.local import DataDir, with_database
from cli.output import AsJson, show_json
from core.errors import UsageError
from core.partitions import LAST_PARTITION


def partition(
    name: Annotated[str, typer.Argument(help="The adapter.")],
    number: Annotated[
        str, typer.Argument(metavar="N|auto", help="Its partition; `auto`: the bucket of its id.")
    ],
    tenant: Annotated[str, typer.Option(help="Whose adapter.")] = "default",
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Move an adapter to a partition, with what waits for it.

    From LORRY_PARTITIONS on a partition is a dedicated one: while a `lorry worker --partitions N`
    lives, the workers that serve everything leave it to that one.
    """
    import os

    from core.settings import load_settings
    from db.partitions import move_adapter

    shared = load_settings(os.environ).partitions
    wanted = _number(number)
    moved = with_database(
        data_dir, lambda database: move_adapter(database, tenant, name, wanted, shared)
    )
    if as_json:
        show_json({"adapter": name, "tenant": tenant, "partition": moved})
        return
    print(f"adapter {name} is in partition {moved}")
    if moved >= shared:
        print(f"serve it alone with `lorry worker MODEL --partitions {moved}`")


def _number(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text) <= LAST_PARTITION):
        raise UsageError(f"partition {text}: give a number from 0 to {LAST_PARTITION}, or auto")
    return int(text)
