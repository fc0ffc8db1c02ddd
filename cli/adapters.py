"""`lorry adapters`: add, check, list, show, roll back and remove adapters through the API."""

import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli.output import AsJson, show_json, show_rows
from cli.output import error as tell
from cli.paths import segment

if TYPE_CHECKING:
    from cli.client import Client

app = typer.Typer(help="Add, check, list, roll back and remove adapters.")

Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Source = Annotated[str, typer.Argument(help="A folder, a .tar.gz or a .zip.")]
BaseModel = Annotated[
    str | None, typer.Option(help="The base model, where there are several and it does not tell.")
]
_POLL_SECONDS: Final = 0.5
#: How long `add` waits in silence before it says for what.
_SILENT_SECONDS: Final = 5.0


@app.command()
def add(
    name: Name,
    source: Source,
    base_model: BaseModel = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until it is ready or rejected.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter; under a name that there is, as its next version."""
    from cli.client import Client

    with Client.from_environment() as client:
        version = _upload(client, "/v1/adapters", source, {"name": name, "base_model": base_model})
        for hint in version["hints"]:
            tell(f"note: {hint['message']}")
        created = version["created"]
        if wait:
            version = _until_validated(client, version)
    if as_json:
        show_json(version)
    elif version["state"] != "rejected":
        word = version["state"] if created else f"{version['state']}, it was there already"
        current = ", current" if version["current"] else ""
        print(f"{version['id']}: {word}{current}")
    if version["state"] == "rejected":
        tell(f"{version['id']} was rejected")
        _tell_findings(version["findings"])
        raise typer.Exit(1)


@app.command()
def check(source: Source, base_model: BaseModel = None, as_json: AsJson = False) -> None:
    """Apply every rule that needs no worker, and store nothing. Exits with 1 if one is broken."""
    from cli.client import Client

    with Client.from_environment() as client:
        found = _upload(client, "/v1/adapters/check", source, {"base_model": base_model})
    if as_json:
        show_json(found)
    else:
        for hint in found["hints"]:
            print(f"note: {hint['message']}")
        if not found["findings"]:
            print(f"nothing against it: rank {found['rank']}, for {found['base_model']}")
    if found["findings"]:
        _tell_findings(found["findings"])
        raise typer.Exit(1)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List your adapters: version, state, rank, size, where resident, what waits, tokens/s."""
    from cli.client import Client

    with Client.from_environment() as client:
        rows = _all(client, "/v1/adapters")
    if as_json:
        show_json(rows)
        return
    shown = [
        {"name": row["name"], "base": row["base_model"]} | _cells(row["current"] or row["newest"])
        for row in rows
    ]
    for cells, row in zip(shown, rows, strict=True):
        if row["current"] and row["newest"]["version"] != row["current_version"]:
            cells["newest"] = f"{row['newest']['version']} {row['newest']['state']}"
    columns = ("name", "version", "state", "base", *_COLUMNS, "newest")
    show_rows(shown, columns, as_json=False, none="no adapters: `lorry adapters add` adds one")


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show an adapter's newest version, and why it was rejected if it was."""
    from cli.client import Client

    with Client.from_environment() as client:
        adapter = client.get(f"/v1/adapters/{segment(name)}")
    if as_json:
        show_json(adapter)
        return
    newest = adapter["newest"]
    probe = newest["probe"] or {}
    facts = {
        "name": adapter["name"],
        "base model": adapter["base_model"],
        "current version": adapter["current_version"],
        "newest version": f"{newest['version']}, {newest['state']}",
        "rank": newest["rank"],
        "size": _size(newest["size_bytes"]),
        "sha256": newest["sha256"],
        "load": _seconds(probe.get("load_seconds")),
        "memory": _size(probe.get("memory_bytes")),
        "resident on workers": _listed(newest["resident_on"]),
        "waiting jobs": _waiting(newest),
        "tokens/s": round(newest["tokens_per_second"]),
    }
    for label, value in facts.items():
        print(f"{label:20} {'-' if value is None else value}")
    if newest["waiting_for"]:
        print(f"{'waits for':20} {newest['waiting_for']}")
    for finding in newest["findings"]:
        print(f"{'rejected':20} {finding['code']}: {finding['message']}")


@app.command()
def versions(name: Name, as_json: AsJson = False) -> None:
    """List an adapter's versions, newest first."""
    from cli.client import Client

    with Client.from_environment() as client:
        rows = _all(client, f"/v1/adapters/{segment(name)}/versions")
    if as_json:
        show_json(rows)
        return
    shown = [
        _cells(row)
        | {
            "current": "yes" if row["current"] else "",
            "created_at": row["created_at"],
            "why": "; ".join(finding["message"] for finding in row["findings"]),
        }
        for row in rows
    ]
    columns = ("version", "state", "current", "created_at", *_COLUMNS, "why")
    show_rows(shown, columns, as_json=False, none="no versions")


@app.command()
def rollback(
    name: Name,
    version: Annotated[int, typer.Argument(min=1, help="The version to make current.")],
    as_json: AsJson = False,
) -> None:
    """Make another version current, for jobs submitted from now on."""
    from cli.client import Client

    with Client.from_environment() as client:
        adapter = client.post(f"/v1/adapters/{segment(name)}/rollback", {"version": version})
    if as_json:
        show_json(adapter)
    else:
        print(f"{name} is {name}@{adapter['current_version']} now")


@app.command()
def remove(
    name: Name,
    drain: Annotated[
        bool, typer.Option("--drain", help="Let the jobs that it has finish.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove an adapter. Its files are deleted after its last job."""
    from cli.client import Client

    with Client.from_environment() as client:
        removed = client.delete(f"/v1/adapters/{segment(name)}", drain="true" if drain else None)
    if as_json:
        show_json(removed)
    elif removed["jobs"]:
        print(f"removed {name}; {removed['jobs']} jobs of it will finish")
    else:
        print(f"removed {name}")


_COLUMNS: Final = ("rank", "size", "resident", "waiting", "tok/s")


def _cells(version: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": version["version"],
        "state": version["state"],
        "rank": version["rank"],
        "size": _size(version["size_bytes"]),
        "resident": _listed(version["resident_on"]),
        "waiting": _waiting(version),
        "tok/s": round(version["tokens_per_second"]),
    }


def _upload(
    client: "Client", path: str, source: str, fields: dict[str, str | None]
) -> dict[str, Any]:
    """Upload a source; every finding is told, and the command ends with 1, if it is refused."""
    from cli.client import Refused
    from cli.pack import packed

    given = {name: value for name, value in fields.items() if value is not None}
    try:
        with packed(source) as archive, archive.open("rb") as content:
            answer: dict[str, Any] = client.upload(path, archive.name, content, given)
            return answer
    except Refused as refused:
        findings = refused.problem.get("findings") or []
        if not findings:
            raise
        tell(f"{source}: {refused.problem.get('title')}")
        _tell_findings(findings)
        raise typer.Exit(1) from None


def _until_validated(client: "Client", version: dict[str, Any]) -> dict[str, Any]:
    """Poll until it is ready or rejected; says once what it waits for."""
    path = f"/v1/adapters/{version['adapter']}/versions/{version['version']}"
    said, speak_at = None, time.monotonic() + _SILENT_SECONDS
    while version["state"] == "validating":
        why = version["waiting_for"]
        if why != said and (time.monotonic() > speak_at or "no worker" in why):
            tell(f"{version['id']} waits: {why}")
            said = why
        time.sleep(_POLL_SECONDS)
        version = client.get(path)
    return version


def _tell_findings(findings: list[dict[str, str]]) -> None:
    for finding in findings:
        tell(f"{finding['code']}: {finding['message']}")


def _all(client: "Client", path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    after = None
    while True:
        page = client.get(path, limit=100, after=after)
        rows += page["data"]
        if not page["has_more"]:
            return rows
        after = page["last_id"]


def _size(value: int | None) -> str | None:
    if value is None:
        return None
    return f"{value / 1e6:.1f} MB" if value >= 100_000 else f"{value / 1e3:.1f} kB"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value * 1000:.0f} ms"


def _listed(ids: list[int]) -> str | None:
    return ", ".join(str(one) for one in ids) or None


def _waiting(version: dict[str, Any]) -> str:
    return f"{version['waiting_jobs']}{'+' if version['waiting_jobs_capped'] else ''}"
