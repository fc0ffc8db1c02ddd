"""`lorry jobs`: submit, follow, list and cancel jobs through the API."""

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli.output import AsJson, show_json, show_rows
from cli.paths import segment
from core.states import JobState

if TYPE_CHECKING:
    from cli.client import Client

app = typer.Typer(help="Submit, follow, list and cancel jobs.")

JobId = Annotated[str, typer.Argument(help="The job's id (job_…).")]
_FINAL: Final = frozenset(state.value for state in JobState if state.is_final)


@app.command()
def submit(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[str, typer.Option(help="A base model, an adapter, or task:NAME.")],
    system: Annotated[str | None, typer.Option(help="A system message before it.")] = None,
    completion: Annotated[
        bool, typer.Option("--completion", help="Continue the text instead of answering it.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    priority: Annotated[int | None, typer.Option(help="-100 to 100; higher goes first.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key and request make one job only.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait, and print the answer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit one job and print its id; with --wait its answer."""
    from cli.client import Client

    asked: dict[str, Any] = {"model": model, "priority": priority, "temperature": temperature}
    if completion:
        asked |= {"prompt": prompt, "max_tokens": max_tokens}
    else:
        first = [{"role": "system", "content": system}] if system is not None else []
        asked |= {
            "messages": [*first, {"role": "user", "content": prompt}],
            "max_completion_tokens": max_tokens,
        }
    body = {name: value for name, value in asked.items() if value is not None}
    headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
    with Client.from_environment() as client:
        job = client.post("/v1/jobs", body, headers=headers)
        if wait:
            job = _until_final(client, job)
    if as_json:
        show_json(job)
    elif wait:
        _show_answer(job)
    else:
        print(job["id"])
    if job["state"] in _FINAL and job["state"] != JobState.SUCCEEDED:
        raise typer.Exit(1)


@app.command()
def get(
    job_id: JobId,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is final.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a job."""
    from cli.client import Client

    with Client.from_environment() as client:
        job = client.get(f"/v1/jobs/{segment(job_id)}")
        if wait:
            job = _until_final(client, job)
        several = not as_json and job["attempts"] > 1
        earlier = client.get(f"/v1/jobs/{segment(job_id)}/attempts", limit=100) if several else None
    if as_json:
        show_json(job)
    else:
        _show_job(job)
        if earlier:
            print()
            _show_attempts(earlier)


@app.command()
def attempts(
    job_id: JobId,
    limit: Annotated[int, typer.Option(min=1, max=100, help="At most so many.")] = 20,
    after: Annotated[int | None, typer.Option(help="Only those behind this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """List a job's attempts: which worker, when, and what became of each."""
    from cli.client import Client

    with Client.from_environment() as client:
        page = client.get(f"/v1/jobs/{segment(job_id)}/attempts", limit=limit, after=after)
    if as_json:
        show_json(page)
    else:
        _show_attempts(page)


@app.command("list")
def list_(
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="At most so many.")] = 20,
    after: Annotated[str | None, typer.Option(help="Only those listed after this job.")] = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    from cli.client import Client

    chosen = state.value if state else None
    with Client.from_environment() as client:
        page = client.get("/v1/jobs", state=chosen, model=model, limit=limit, after=after)
    if as_json:
        show_json(page)
        return
    columns = ("id", "state", "model", "priority", "attempts", "created_at", "finished_at")
    show_rows(page["data"], columns, as_json=False, none="no jobs")
    if page["has_more"]:
        print(f"more: --after {page['last_id']}")


@app.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job, and print the state it ended in; a finished one keeps its own."""
    from cli.client import Client

    with Client.from_environment() as client:
        job = client.post(f"/v1/jobs/{segment(job_id)}/cancel", {})
    if as_json:
        show_json(job)
    else:
        print(job["state"])


def _until_final(client: "Client", job: dict[str, Any]) -> dict[str, Any]:
    from cli.client import LONGEST_WAIT_SECONDS

    while job["state"] not in _FINAL:
        job = client.get(f"/v1/jobs/{job['id']}", wait=LONGEST_WAIT_SECONDS)
    return job


def _show_answer(job: dict[str, Any]) -> None:
    if job.get("response"):
        for text in answers(job):
            print(text)
    else:
        error = job.get("error") or {}
        typer.echo(f"lorry: job {job['state']}: {error.get('message', 'no answer')}", err=True)


def _show_job(job: dict[str, Any]) -> None:
    facts = ("id", "state", "model", "adapter_version", "attempts", "created_at", "finished_at")
    show_rows([job], facts, as_json=False, none="")
    if job.get("response") or job.get("error"):
        print()
        _show_answer(job)


def _show_attempts(page: dict[str, Any]) -> None:
    columns = ("attempt", "worker", "started_at", "ended_at", "outcome", "error")
    show_rows(page["data"], columns, as_json=False, none="no attempts yet")
    if page["has_more"]:
        print(f"more: --after {page['last_id']}")


def answers(job: dict[str, Any]) -> list[str]:
    """The texts of a finished job, one per choice."""
    choices = (job.get("response") or {}).get("choices") or []
    return [
        (choice.get("message") or {}).get("content") or choice.get("text") or ""
        for choice in choices
    ]
