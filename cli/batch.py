"""`lorry batch`: run a file of prompts through the API, and follow, list and cancel batches."""

import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from uuid import uuid4

import typer

from cli.output import AsJson, show_json, show_rows
from cli.paths import segment
from core.batch_status import BatchStatus
from core.errors import UsageError

if TYPE_CHECKING:
    from cli.client import Client

app = typer.Typer(help="Run files of prompts; follow, list and cancel batches.")

BatchId = Annotated[str, typer.Argument(help="The batch's id (batch_…).")]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Where the answers go: .jsonl, .csv or .txt."),
]
_SUFFIXES: Final = (".jsonl", ".csv", ".txt")


@app.command()
def run(
    prompts: Annotated[
        Path, typer.Argument(help="JSON lines, plain text (a prompt a line), .csv or .tsv.")
    ],
    model: Annotated[
        str | None, typer.Option(help="For lines that name none: a base, an adapter, a task.")
    ] = None,
    output: Output = None,
    template: Annotated[
        str | None, typer.Option(help="How columns become a prompt: 'Summarise: {text}'.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before each.")] = None,
    completion: Annotated[
        bool, typer.Option("--completion", help="Continue the texts instead of answering.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    window: Annotated[str, typer.Option(help="After this the rest expires: 24h, 30m.")] = "24h",
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Let bad lines fail alone, not the batch.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Print the id and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload prompts, follow the batch, and write the answers in the order of the input."""
    from cli.batch_follow import patiently
    from cli.batch_inputs import Defaults, write_lines
    from cli.client import Client

    _check_output(output)
    if not prompts.is_file():
        raise UsageError(f"there is no file {prompts}")
    fields = {"max_tokens": max_tokens, "temperature": temperature}
    given = {name: value for name, value in fields.items() if value is not None}
    defaults = Defaults(model, system, template, completion, given)
    with Client.from_environment() as client:
        with tempfile.TemporaryFile() as lines:
            text = io.TextIOWrapper(lines, encoding="utf-8", errors="surrogateescape")
            endpoint, _ = write_lines(prompts, text, defaults, keep_bad=skip_invalid)
            text.detach()
            lines.seek(0)
            name = f"{prompts.stem}.jsonl"
            file = client.upload("/v1/files", name, lines, {"purpose": "batch"})
        asked = {
            "input_file_id": file["id"],
            "endpoint": endpoint,
            "completion_window": window,
            "skip_invalid": skip_invalid,
        }
        key = {"Idempotency-Key": uuid4().hex}
        batch = patiently(lambda: client.post("/v1/batches", asked, headers=key))
        if detach:
            show_json(batch) if as_json else print(batch["id"])
            return
        _follow(client, batch, output, as_json)


@app.command()
def attach(batch_id: BatchId, output: Output = None, as_json: AsJson = False) -> None:
    """Follow a batch to its end, and write its answers."""
    from cli.client import Client

    _check_output(output)
    with Client.from_environment() as client:
        _follow(client, client.get(f"/v1/batches/{segment(batch_id)}"), output, as_json)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100, help="At most so many.")] = 20,
    after: Annotated[str | None, typer.Option(help="Only those listed after this batch.")] = None,
    as_json: AsJson = False,
) -> None:
    """List batches, newest first."""
    from cli.client import Client

    with Client.from_environment() as client:
        page = client.get("/v1/batches", limit=limit, after=after)
    if as_json:
        show_json(page)
        return
    columns = ("id", "status", "total", "completed", "failed", "created_at", "expires_at")
    rows = [{**batch, **batch["request_counts"]} for batch in page["data"]]
    show_rows(rows, columns, as_json=False, none="no batches")
    if page["has_more"]:
        print(f"more: --after {page['last_id']}")


@app.command()
def show(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Show a batch, and what is wrong with its lines."""
    from cli.client import Client

    with Client.from_environment() as client:
        batch = client.get(f"/v1/batches/{segment(batch_id)}")
    if as_json:
        show_json(batch)
        return
    columns = ("id", "status", "total", "completed", "failed", "created_at", "expires_at")
    show_rows([{**batch, **batch["request_counts"]}], columns, as_json=False, none="")
    promised = batch["lorry"] or {}
    if promised.get("estimated_finish_at"):
        show_rows([promised], ("estimated_finish_at",), as_json=False, none="")
    if promised.get("warning"):
        typer.echo(f"lorry: {promised['warning']}", err=True)
    _show_errors(batch)


@app.command()
def cancel(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Cancel a batch, and print its status; finished lines are kept."""
    from cli.client import Client

    with Client.from_environment() as client:
        batch = client.post(f"/v1/batches/{segment(batch_id)}/cancel", {})
    show_json(batch) if as_json else print(batch["status"])


@app.command()
def results(
    batch_id: BatchId,
    after: Annotated[int, typer.Option(min=0, help="How many you have already.")] = 0,
) -> None:
    """Print the results that there are as JSON lines, in the order they were finished in."""
    from cli.client import Client

    with Client.from_environment() as client:
        for line in client.lines(f"/v1/batches/{segment(batch_id)}/results", after=after):
            print(line)


def _check_output(output: Path | None) -> None:
    if output is not None and output.suffix not in _SUFFIXES:
        raise UsageError(f"--output {output}: give a name that ends in {', '.join(_SUFFIXES)}")


def _follow(client: "Client", batch: dict[str, Any], output: Path | None, as_json: bool) -> None:
    """Wait for the end, write the answers, and exit with 1 unless every line succeeded."""
    from cli.batch_follow import patiently, until_final
    from cli.batch_output import write_answers

    try:
        batch = until_final(client, batch)
        if output is not None:
            patiently(lambda: write_answers(client, batch, output))
    except KeyboardInterrupt:
        where = f" -o {output}" if output else ""
        typer.echo(f"\nThe batch goes on. Follow it: lorry batch attach {batch['id']}{where}\n"
                   f"Or end it: lorry batch cancel {batch['id']}", err=True)  # fmt: skip
        raise
    if as_json:
        show_json(batch)
    counts = batch["request_counts"]
    _show_errors(batch)
    typer.echo(
        f"{batch['id']} {batch['status']}: {counts['completed']} done, {counts['failed']} failed"
        + ("" if output is None or batch["status"] == "failed" else f", written to {output}"),
        err=True,
    )
    if batch["status"] != BatchStatus.COMPLETED or counts["failed"]:
        raise typer.Exit(1)


def _show_errors(batch: dict[str, Any]) -> None:
    for error in (batch["errors"] or {"data": []})["data"]:
        where = "" if error["line"] is None else f"line {error['line']}: "
        typer.echo(f"lorry: {where}{error['message']}", err=True)
