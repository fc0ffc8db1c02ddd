"""`lorry keys`: API keys, straight in the database, since the first one cannot come by the API."""

from dataclasses import asdict
from typing import Annotated

import typer

from cli.local import DataDir, with_database
from cli.output import AsJson, show_json, show_rows
from core.errors import LorryError

app = typer.Typer(help="Make, list and revoke API keys.")


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key it is; a new tenant is made.")],
    name: Annotated[str, typer.Option(help="What the key is for.")] = "",
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, and nothing else. It cannot be shown again."""
    from db.tenants import create_key

    key = with_database(data_dir, lambda database: create_key(database, tenant, name))
    if as_json:
        show_json({"key": key, "tenant": tenant, "name": name})
    else:
        print(key)


@app.command("list")
def list_(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the keys, newest first, without their secrets."""
    from db.tenants import list_keys

    rows = [asdict(row) for row in with_database(data_dir, list_keys)]
    columns = ("id", "tenant", "name", "prefix", "created_at", "revoked_at")
    show_rows(rows, columns, as_json=as_json, none="no keys: `lorry keys create` makes one")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id, or its beginning as listed.")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key: requests with it are refused from now on."""
    from db.tenants import revoke_key

    if not with_database(data_dir, lambda database: revoke_key(database, key)):
        raise LorryError(f"no live key {key!r}: `lorry keys list` shows them")
    if as_json:
        show_json({"revoked": key})
    else:
        print(f"revoked {key}")
