"""`lorry schedules`: batches every night, or every so often, or once; and their runs."""

from typing import Annotated, Any

import typer

from cli import schedule_options as options
from cli.output import AsJson, show_json, show_rows
from cli.paths import segment

app = typer.Typer(help="Make batches every night, or every so often; list, change, pause them.")

Ref = Annotated[str, typer.Argument(help="The schedule's name, or its id (schedule_…).")]
_COLUMNS = ("id", "name", "state", "rule", "next_fire_at", "missed_runs", "failures_in_a_row")
_RUN_COLUMNS = ("id", "fire_at", "state", "why", "late", "batch", "status", "done", "failed", "of")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What you call it.")],
    cron: options.Cron = None,
    timezone: options.Zone = None,
    every: options.Every = None,
    at: options.At = None,
    start: options.Start = None,
    end: options.End = None,
    prompts: options.Prompts = None,
    file: options.File = None,
    rows: options.Rows = None,
    prompt: options.Prompt = None,
    template: options.Template = None,
    model: options.Model = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    priority: options.Priority = None,
    window: options.Window = None,
    skip_invalid: options.SkipInvalid = None,
    webhook_url: options.Webhook = None,
    metadata: options.Metadata = None,
    missed: options.Missed = None,
    catch_up: options.CatchUp = None,
    overlap: options.Overlap = None,
    dst_gap: options.Gap = None,
    dst_fold: options.Fold = None,
    pause_after_failures: options.PauseAfter = None,
    jitter: options.Jitter = None,
    enabled: options.Enabled = None,
    as_json: AsJson = False,
) -> None:
    """Make a schedule, and print its id and when it fires first."""
    given = options.Given(dict(locals()))
    from cli.client import UPLOAD_SECONDS, Client

    body = given.body()
    with Client.from_environment() as client:
        if not given.options["file"]:
            client.post("/v1/schedules/preview", body)  # a bad rule is told before the upload
        made = client.post("/v1/schedules", body | given.input(client), seconds=UPLOAD_SECONDS)
    _show(made, as_json)


@app.command()
def change(
    schedule: Ref,
    name: Annotated[str | None, typer.Option(help="Call it otherwise.")] = None,
    cron: options.Cron = None,
    timezone: options.Zone = None,
    every: options.Every = None,
    at: options.At = None,
    start: options.Start = None,
    end: options.End = None,
    prompts: options.Prompts = None,
    file: options.File = None,
    rows: options.Rows = None,
    prompt: options.Prompt = None,
    template: options.Template = None,
    model: options.Model = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    priority: options.Priority = None,
    window: options.Window = None,
    skip_invalid: options.SkipInvalid = None,
    webhook_url: options.Webhook = None,
    metadata: options.Metadata = None,
    missed: options.Missed = None,
    catch_up: options.CatchUp = None,
    overlap: options.Overlap = None,
    dst_gap: options.Gap = None,
    dst_fold: options.Fold = None,
    pause_after_failures: options.PauseAfter = None,
    jitter: options.Jitter = None,
    enabled: options.Enabled = None,
    reset: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="Back to its default: end_at.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change what is given; the rest stays."""
    given = options.Given(dict(locals()))
    from cli.client import Client

    with Client.from_environment() as client:
        body = dict.fromkeys(reset or []) | given.body() | given.input(client)
        changed = client.patch(f"/v1/schedules/{segment(schedule)}", body)
    _show(changed, as_json)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100, help="At most so many.")] = 20,
    after: Annotated[str | None, typer.Option(help="Only those listed after this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """List schedules, newest first."""
    from cli.client import Client

    with Client.from_environment() as client:
        page = client.get("/v1/schedules", limit=limit, after=after)
    if as_json:
        show_json(page)
        return
    rows = [_row(each) for each in page["data"]]
    show_rows(
        rows, _COLUMNS, as_json=False, none="no schedules: `lorry schedules create` makes one"
    )
    if page["has_more"]:
        print(f"more: --after {page['last_id']}")


@app.command()
def show(schedule: Ref, as_json: AsJson = False) -> None:
    """Show a schedule with its policies."""
    from cli.client import Client

    with Client.from_environment() as client:
        found = client.get(f"/v1/schedules/{segment(schedule)}")
    if as_json:
        show_json(found)
        return
    rows = [{"field": name, "value": value} for name, value in found.items() if value is not None]
    show_rows(rows, ("field", "value"), as_json=False, none="")


@app.command()
def pause(schedule: Ref, as_json: AsJson = False) -> None:
    """Stop firing; runs that wait are skipped, batches run on."""
    _act(schedule, "pause", as_json)


@app.command()
def resume(schedule: Ref, as_json: AsJson = False) -> None:
    """Fire again, from the next firing on."""
    _act(schedule, "resume", as_json)


@app.command()
def delete(schedule: Ref, as_json: AsJson = False) -> None:
    """Delete a schedule and its runs; their batches stay."""
    from cli.client import Client

    with Client.from_environment() as client:
        gone = client.delete(f"/v1/schedules/{segment(schedule)}")
    show_json(gone) if as_json else print(f"deleted {gone['id']}")


@app.command()
def runs(
    schedule: Ref,
    limit: Annotated[int, typer.Option(min=1, max=100, help="At most so many.")] = 20,
    after: Annotated[str | None, typer.Option(help="Only those listed after this run.")] = None,
    as_json: AsJson = False,
) -> None:
    """List a schedule's runs with their batches and lateness, latest first."""
    from cli.client import Client

    with Client.from_environment() as client:
        page = client.get(f"/v1/schedules/{segment(schedule)}/runs", limit=limit, after=after)
    if as_json:
        show_json(page)
        return
    show_rows([_run_row(run) for run in page["data"]], _RUN_COLUMNS, as_json=False, none="no runs")
    if page["has_more"]:
        print(f"more: --after {page['last_id']}")


@app.command("run-now")
def run_now(schedule: Ref, as_json: AsJson = False) -> None:
    """Run a schedule once more, now."""
    _act(schedule, "run", as_json)


@app.command("skip-next")
def skip_next(schedule: Ref, as_json: AsJson = False) -> None:
    """Pass over the next firing."""
    _act(schedule, "skip-next", as_json)


@app.command()
def preview(
    schedule: Annotated[str | None, typer.Argument(help="A schedule; or give a rule.")] = None,
    cron: options.Cron = None,
    timezone: options.Zone = None,
    every: options.Every = None,
    at: options.At = None,
    start: options.Start = None,
    end: options.End = None,
    dst_gap: options.Gap = None,
    dst_fold: options.Fold = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Print the next firings, in UTC and in the schedule's zone."""
    given = options.Given(dict(locals()))
    from cli.client import Client

    with Client.from_environment() as client:
        if schedule is None:
            found = client.post("/v1/schedules/preview", given.body(), count=count)
        else:
            found = client.get(f"/v1/schedules/{segment(schedule)}/preview", count=count)
    if as_json:
        show_json(found)
    else:
        show_rows(found["data"], ("local", "utc"), as_json=False, none="it does not fire any more")


def _act(schedule: str, what: str, as_json: bool) -> None:
    from cli.client import Client

    with Client.from_environment() as client:
        done = client.post(f"/v1/schedules/{segment(schedule)}/{what}", {})
    if as_json:
        show_json(done)
    elif done["object"] == "schedule":
        print(done["state"])
    else:
        print(f"{done['id']} {done['state']}")


def _show(schedule: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(schedule)
    else:
        show_rows([_row(schedule)], _COLUMNS, as_json=False, none="")


def _row(schedule: dict[str, Any]) -> dict[str, Any]:
    if schedule["cron"] is not None:
        rule = f"{schedule['cron']} {schedule['timezone']}"
    elif schedule["every_seconds"] is not None:
        rule = f"every {schedule['every_seconds']} s"
    else:
        rule = "once"
    return {**schedule, "rule": rule}


def _run_row(run: dict[str, Any]) -> dict[str, Any]:
    batch = run["batch"] or {}
    counts = batch.get("request_counts", {})
    late = run["lateness_seconds"]
    return {
        **run,
        "why": run["reason"] or (run["error"] or {}).get("message"),
        "late": None if late is None else f"{late:.3f} s",
        "batch": batch.get("id"),
        "status": batch.get("status"),
        "done": counts.get("completed"),
        "failed": counts.get("failed"),
        "of": counts.get("total"),
    }
