"""The options that say what a schedule is, and the request body that they make."""

import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from zoneinfo import ZoneInfo

import typer

from core.batch_request import window_seconds
from core.errors import UsageError

if TYPE_CHECKING:
    from cli.client import Client

Cron = Annotated[str | None, typer.Option(help="Five fields, or @daily: '0 2 * * *'.")]
Zone = Annotated[str | None, typer.Option(help="An IANA zone: Europe/Berlin.")]
Every = Annotated[str | None, typer.Option(help="An interval instead: 15m, 6h.")]
At = Annotated[str | None, typer.Option(help="Once instead: 2027-05-01T02:00, in --timezone.")]
Start = Annotated[str | None, typer.Option(help="Nothing fires before this time.")]
End = Annotated[str | None, typer.Option(help="Nothing fires behind this time.")]
Prompts = Annotated[
    Path | None,
    typer.Option(help="A file of prompts, as `lorry batch run` takes it; it is uploaded."),
]
File = Annotated[str | None, typer.Option(help="An uploaded file's id instead (file_…).")]
Rows = Annotated[Path | None, typer.Option(help="A file of rows instead, to fill --template with.")]
Prompt = Annotated[
    list[str] | None, typer.Option(help="A prompt instead of a file; may be repeated.")
]
Template = Annotated[
    str | None, typer.Option(help="How a row becomes a prompt: 'Summarise: {text}'.")
]
Model = Annotated[str | None, typer.Option(help="Of what names none: sql, or sql@3 to pin.")]
System = Annotated[str | None, typer.Option(help="A system message before each.")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
Priority = Annotated[int | None, typer.Option(help="-100 to 100; higher goes first.")]
Window = Annotated[str | None, typer.Option(help="After this the rest of a run expires: 24h.")]
SkipInvalid = Annotated[
    bool | None, typer.Option("--skip-invalid/--no-skip-invalid", help="Bad lines fail alone.")
]
Webhook = Annotated[
    str | None,
    typer.Option("--webhook-url", help="Told of each run's end, and of runs that fail to start."),
]
Metadata = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Yours; may be repeated.")
]
Missed = Annotated[str | None, typer.Option(help="skip, latest or all.")]
CatchUp = Annotated[str | None, typer.Option(help="How old a missed run may be: 7d.")]
Overlap = Annotated[str | None, typer.Option(help="allow, skip, queue or cancel_previous.")]
Gap = Annotated[str | None, typer.Option("--dst-gap", help="after or skip.")]
Fold = Annotated[str | None, typer.Option("--dst-fold", help="first, second or both.")]
PauseAfter = Annotated[
    int | None, typer.Option("--pause-after-failures", help="So many in a row pause it; 0 never.")
]
Jitter = Annotated[str | None, typer.Option(help="Spread starts over so long: 10m.")]
Enabled = Annotated[bool | None, typer.Option("--enabled/--disabled", help="Whether it fires.")]

#: Options whose value goes into the body under another name or form.
_PLAIN: Final = (
    "name", "cron", "timezone", "model", "priority", "skip_invalid", "webhook_url", "missed",
    "overlap", "dst_gap", "dst_fold", "pause_after_failures", "enabled",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Given:
    """The options as they were given; None is not given."""

    options: Mapping[str, Any]

    def body(self) -> dict[str, Any]:
        """The request's body, without what is to be run.

        Raises:
            UsageError: an option that cannot be read.
        """
        options = self.options
        body = {name: options[name] for name in _PLAIN if options.get(name) is not None}
        if options.get("window") is not None:
            body["completion_window"] = options["window"]
        for name, field in (
            ("every", "every_seconds"),
            ("catch_up", "catch_up_seconds"),
            ("jitter", "jitter_seconds"),
        ):
            if options.get(name) is not None:
                body[field] = _seconds(name, options[name])
        for name, field in (("at", "at"), ("start", "start_at"), ("end", "end_at")):
            if options.get(name) is not None:
                body[field] = _moment(name, options[name], options.get("timezone"))
        if options.get("metadata") is not None:
            body["metadata"] = dict(_pair(text) for text in options["metadata"])
        return body

    def input(self, client: "Client") -> dict[str, Any]:
        """What is to be run, with its file uploaded; empty where nothing was given."""
        options = self.options
        given = [n for n in ("prompts", "file", "rows", "prompt") if options.get(n)]
        if len(given) > 1:
            raise UsageError(f"--{given[0]} and --{given[1]} cannot stand together; give one")
        if options.get("template") is not None and given not in (["rows"], ["file"], ["prompts"]):
            raise UsageError("--template needs --rows FILE, a file of rows to fill it with")
        if options.get("prompts"):
            return self._uploaded_prompts(client, options["prompts"])
        if options.get("prompt"):
            return {"requests": [self._request(text) for text in options["prompt"]]}
        if options.get("rows"):
            if options.get("template") is None:
                raise UsageError("--rows needs --template 'Summarise: {text}'")
            path = options["rows"]
            _check_file(path)
            with path.open("rb") as file:
                uploaded = client.upload("/v1/files", path.name, file, {"purpose": "batch"})
            return {"input_file_id": uploaded["id"], "template": self._request(options["template"])}
        if options.get("file"):
            template = options.get("template")
            more = {} if template is None else {"template": self._request(template)}
            return {"input_file_id": options["file"], **more}
        return {}

    def _uploaded_prompts(self, client: "Client", path: Path) -> dict[str, Any]:
        from cli.batch_inputs import Defaults, write_lines

        _check_file(path)
        options = self.options
        # the model stays the schedule's own, where it can be changed
        defaults = Defaults(
            system=options.get("system"),
            template=options.get("template"),
            fields=self._fields(),
            model_later=options.get("model") is not None,
        )
        with tempfile.TemporaryFile() as lines:
            text = io.TextIOWrapper(lines, encoding="utf-8")
            endpoint, _ = write_lines(path, text, defaults)
            text.detach()
            lines.seek(0)
            name = f"{path.stem}.jsonl"
            uploaded = client.upload("/v1/files", name, lines, {"purpose": "batch"})
        return {"input_file_id": uploaded["id"], "endpoint": endpoint}

    def _request(self, prompt: str) -> dict[str, Any]:
        system = self.options.get("system")
        first = [] if system is None else [{"role": "system", "content": system}]
        return {"messages": [*first, {"role": "user", "content": prompt}], **self._fields()}

    def _fields(self) -> dict[str, Any]:
        fields = {name: self.options.get(name) for name in ("max_tokens", "temperature")}
        return {name: value for name, value in fields.items() if value is not None}


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")


def _seconds(option: str, text: str) -> int:
    seconds = window_seconds(text)
    if seconds is None:
        name = option.replace("_", "-")
        raise UsageError(f"--{name} {text!r}: give a duration from 1s to 366d: 30m, 6h, 1d12h")
    return seconds


def _moment(option: str, text: str, zone: str | None) -> float:
    """Unix seconds of a time in ISO 8601; one without an offset is in the zone."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC if zone is None else ZoneInfo(zone))
    except (ValueError, OSError, LookupError):
        raise UsageError(
            f"--{option} {text!r}: give a time such as 2027-05-01T02:00 or 2027-05-01T00:00Z"
        ) from None
    return moment.timestamp()


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--metadata {text!r}: give KEY=VALUE")
    return name, value
