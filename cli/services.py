"""The commands that run something for long: the stack, its parts, and the migration."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.local import DataDir, database_url
from cli.output import AsJson, show_json
from core.errors import UsageError
from core.partitions import LAST_PARTITION
from workers.engine.selection import EngineName

if TYPE_CHECKING:
    from core.settings import Settings

#: Commands whose unknown options are the engine's: vLLM's flags pass through verbatim, in order.
PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True}

Engine = Annotated[str, typer.Option(help="vllm, or simulated to try the queue without a model.")]
Fold = Annotated[
    str, typer.Option(help="auto folds adapters into the base's weights where it pays; or off.")
]
Host = Annotated[str, typer.Option(help="Where to listen.")]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="Where to listen; 0 takes a free port.")]
EngineFlags = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] [ENGINE FLAGS]...",
        help="The base model, before the flags, and flags as `vllm serve` takes them.",
        show_default=False,
    ),
]


def up(
    model_and_flags: EngineFlags = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is kept.")] = None,
    engine: Engine = "vllm",
    fold: Fold = "auto",
    require_keys: Annotated[
        bool, typer.Option("--require-keys", help="Ask for API keys; needed beyond loopback.")
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Register an adapter; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run everything on this machine: PostgreSQL, Valkey, API, steward and one worker.

    Without MODEL it serves the demo's small base model and its three adapters.
    """
    from cli.up.options import UpOptions, parse_adapters
    from cli.up.supervisor import default_data_dir
    from cli.up.supervisor import up as run

    model, flags = split_model(model_and_flags)
    settings = _settings(needs_servers=False)
    named = "LORRY_REQUIRE_KEYS" in os.environ and settings.require_keys
    options = UpOptions(
        model=model,
        host=host,
        port=port,
        data_dir=(data_dir or default_data_dir()).expanduser().absolute(),
        cache_dir=settings.cache_folder().expanduser().absolute(),
        engine=_engine(engine),
        fold=_fold(fold),
        require_keys=require_keys or named,
        adapters=parse_adapters(adapter or []),
        flags=flags,
        as_json=as_json,
    )
    raise typer.Exit(run(options, settings))


def api(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    ready_model: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the REST API."""
    settings = _settings()
    from api.server import serve

    serve(settings, host=host, port=port, ready_model=ready_model)


def worker(
    model_and_flags: EngineFlags = None,
    engine: Engine = "vllm",
    fold: Fold = "auto",
    name: Annotated[str, typer.Option(help="How the worker is listed.")] = "",
    partitions: Annotated[
        str | None, typer.Option(metavar="P,P…", help="Serve only these partitions.")
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME…", help="Serve only these adapters; it then polls."),
    ] = None,
    pin: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME…", help="Load these adapters first and keep them."),
    ] = None,
    preload: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME…", help="Load these adapters before the first job."),
    ] = None,
) -> None:
    """Run a worker: one engine, holding one base model."""
    model, flags = split_model(model_and_flags)
    if model is None:
        raise UsageError("name the MODEL before the engine's flags: lorry worker MODEL [FLAGS]")
    _settings()
    from workers.launcher import WorkerSpec, launch

    spec = WorkerSpec(
        model=model,
        engine=_engine(engine),
        fold=_fold(fold),
        flags=flags,
        name=name,
        partitions=_partitions(partitions),
        adapters=None if adapters is None else tuple(_listed(adapters, "--adapters")),
        pin=() if pin is None else tuple(_listed(pin, "--pin")),
        preload=() if preload is None else tuple(_listed(preload, "--preload")),
    )
    raise typer.Exit(launch(spec))


def steward() -> None:
    """Run the steward: rings again, rescues jobs of lost workers, expires, tidies up."""
    settings = _settings()
    from workers.steward.main import run

    run(settings)


def migrate(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Bring the database's schema up to date. Safe to repeat."""
    url = database_url(data_dir)
    from db.migrate import head_revision, upgrade

    upgrade(url)
    if as_json:
        show_json({"revision": head_revision()})
    else:
        print(f"the schema is at revision {head_revision()}")


def split_model(arguments: list[str] | None) -> tuple[str | None, tuple[str, ...]]:
    """MODEL, which comes first or not at all, and the engine's flags.

    What does not come first may be a flag's value: only the engine can tell.
    """
    rest = tuple(arguments or ())
    if rest and not rest[0].startswith("-"):
        return rest[0], rest[1:]
    return None, rest


def _partitions(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = _listed(text, "--partitions")
    for part in parts:
        if not (part.isascii() and part.isdigit() and int(part) <= LAST_PARTITION):
            raise UsageError(f"--partitions {part}: give numbers from 0 to {LAST_PARTITION}")
    return tuple(int(part) for part in parts)


def _listed(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{option} {text!r}: give names separated by commas, none empty")
    return parts


def _engine(name: str) -> EngineName:
    try:
        return EngineName(name)
    except ValueError:
        raise UsageError(f"--engine {name}: give one of {', '.join(EngineName)}") from None


def _fold(choice: str) -> bool:
    if choice not in ("auto", "off"):
        raise UsageError(f"--fold {choice}: give auto or off")
    return choice == "auto"


def _settings(*, needs_servers: bool = True) -> "Settings":
    """The settings; UsageError if a service lacks the servers that it needs."""
    from core.logs import configure_logging
    from core.settings import load_settings

    settings = load_settings(os.environ)
    configure_logging(settings.log_level)
    if needs_servers:
        for value, name in (
            (settings.database_url, "LORRY_DATABASE_URL"),
            (settings.broker_url, "LORRY_BROKER_URL"),
            (settings.store_url, "LORRY_STORE_URL"),
        ):
            if not value:
                raise UsageError(f"{name} is not set; `lorry up` runs everything on one machine")
    return settings
