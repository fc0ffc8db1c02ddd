"""`lorry models`: what a request's `model` can name."""

from typing import Annotated

import typer

from cli.local import DataDir, with_database
from cli.output import AsJson, show_json, show_rows

app = typer.Typer(help="List models; declare a base model before any worker ran.")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the base models, adapters and tasks that the API serves to you."""
    from cli.client import Client

    with Client.from_environment() as client:
        rows = client.get("/v1/models")["data"]
    keys = {key: None for row in rows for key in row if key != "object"}
    columns = [
        key for key in keys if not any(isinstance(row.get(key), dict | list) for row in rows)
    ]
    show_rows(rows, columns, as_json=as_json, none="no models: start a worker")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The base model's name, as its workers will say it.")],
    max_model_len: Annotated[int, typer.Option(min=1, help="Its context in tokens.")],
    revision: Annotated[str, typer.Option(help="Which files those are, if it matters.")] = "",
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Declare a base model, so that jobs for it are taken before its first worker ran."""
    from db.registry import declare_base

    with_database(data_dir, lambda database: declare_base(database, name, max_model_len, revision))
    if as_json:
        show_json({"name": name, "max_model_len": max_model_len, "revision": revision})
    else:
        print(f"declared {name} with a context of {max_model_len} tokens")
