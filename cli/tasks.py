"""`lorry tasks`: route `task:NAME` to an adapter, a version or a base model."""

from typing import Annotated

import typer

from cli.output import AsJson, show_json, show_rows
from cli.paths import segment

app = typer.Typer(help="Route tasks to adapters, versions or base models.")

Name = Annotated[str, typer.Argument(help="The task's name; jobs say task:NAME.")]


@app.command("set")
def set_(
    name: Name,
    model: Annotated[str, typer.Argument(help="An adapter, a version (sql@3) or a base model.")],
    as_json: AsJson = False,
) -> None:
    """Make a task, or route it elsewhere. Jobs keep what they were routed to."""
    from cli.client import Client

    with Client.from_environment() as client:
        task = client.put(f"/v1/tasks/{segment(name)}", {"model": model})
    if as_json:
        show_json(task)
    else:
        print(f"{task['id']} is {task['model']} now")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List your tasks."""
    from cli.client import Client

    rows, after = [], None
    with Client.from_environment() as client:
        while True:
            page = client.get("/v1/tasks", limit=100, after=after)
            rows += page["data"]
            after = page["last_id"]
            if not page["has_more"]:
                break
    columns = ("id", "model", "base_model", "created_at")
    show_rows(rows, columns, as_json=as_json, none="no tasks: `lorry tasks set` makes one")


@app.command()
def remove(name: Name, as_json: AsJson = False) -> None:
    """Remove a task. Its jobs run on."""
    from cli.client import Client

    with Client.from_environment() as client:
        client.delete(f"/v1/tasks/{segment(name)}")
    if as_json:
        show_json({"removed": f"task:{name}"})
    else:
        print(f"removed task:{name}")
