"""Which base model and adapters a stack serves, and how they become known to it.

python -m cli.up.serving CACHE_DIR      makes the demo's base there
"""

import asyncio
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cli.up.options import UpOptions
from core.errors import UsageError

if TYPE_CHECKING:
    from db.database import Database

DEFAULT_TENANT: Final = "default"
#: Enough for the demo's prompts and small enough for a laptop's memory.
DEMO_FLAGS: Final = ("--max-model-len", "2048", "--max-loras", "4", "--max-lora-rank", "8")
DEMO_ADAPTERS: Final = ("sql", "pirate", "json")


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served.

    Args:
        name: the base model's name outside.
        model: what the worker is given: a folder or a name.
        context: the base's context in tokens; None if only its worker can tell.
        adapters: names and folders.
        flags: the engine's flags.
        makes_base: whether the demo's base has to be made first.
    """

    name: str
    model: str
    context: int | None
    adapters: tuple[tuple[str, Path], ...]
    flags: tuple[str, ...]
    makes_base: bool = False


def choose(options: UpOptions) -> Serving:
    """Settle what is served, without loading or making anything.

    Raises:
        UsageError: the model's folder does not exist or holds no model; adapters of a base whose
            context is unknown.
    """
    if options.model is None:
        return _demo(options)
    context = _number(options.flags, "--max-model-len") or _context_of_folder(options)
    if options.engine == "simulated":
        context = context or 8192
    if context is None and options.adapters:
        raise UsageError(f"the context of {options.model} is not known here: add --max-model-len")
    name = _text(options.flags, "--served-model-name") or _outside_name(options.model)
    return Serving(name, options.model, context, options.adapters, options.flags)


async def register(database: "Database", store_url: str, partitions: int, what: Serving) -> None:
    """Make the base and its adapters known, as far as they are not yet.

    By the same way as an upload: the rules that need no worker apply here, and the worker probes
    them before their first job.

    Raises:
        AdapterRejected, InvalidRequest: an adapter or its name cannot be used.
    """
    from db.adapter_package import PackageLimits, unpack
    from db.adapters import add
    from db.registry import declare_base
    from db.store import Store
    from db.tenants import DEFAULT_TENANT_ID

    if what.context is not None:
        await declare_base(database, what.name, what.context)
    store = Store.open(store_url)
    for name, folder in what.adapters:
        with tempfile.TemporaryDirectory(prefix="lorry-adapter-") as scratch:
            package = await asyncio.to_thread(
                unpack, folder, Path(scratch) / "unpacked", PackageLimits()
            )
            await add(
                database,
                store,
                tenant_id=DEFAULT_TENANT_ID,
                name=name,
                base_model=what.name,
                package=package,
                partitions=partitions,
            )


def _demo(options: UpOptions) -> Serving:
    import cli.demo
    from cli.demo.base import DEMO_BASE, DEMO_CONTEXT

    home = Path(next(iter(cli.demo.__path__))) / "adapters"
    adapters = tuple((name, home / name) for name in DEMO_ADAPTERS if (home / name).is_dir())
    simulated = options.engine == "simulated"
    flags = options.flags or (() if simulated else DEMO_FLAGS)
    return Serving(
        name=_text(flags, "--served-model-name") or DEMO_BASE,
        model=DEMO_BASE if simulated else str(options.cache_dir / DEMO_BASE),
        context=_number(flags, "--max-model-len") or DEMO_CONTEXT,
        adapters=adapters + options.adapters,
        flags=flags,
        makes_base=not simulated,
    )


def _context_of_folder(options: UpOptions) -> int | None:
    """The context that a local model's configuration states, in tokens."""
    assert options.model is not None
    folder = Path(options.model).expanduser()
    if not folder.is_dir():
        if options.engine == "vllm" and options.model.startswith((os.sep, ".", "~")):
            raise UsageError(f"model {options.model}: no such folder. Check the path")
        return None
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if options.engine == "vllm" and not (folder / "params.json").is_file():
            raise UsageError(
                f"model {options.model}: the folder has no config.json. Name the folder that holds "
                "the model's config.json, tokenizer and weights"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"model {options.model}: config.json cannot be read ({error})") from None
    text = config.get("text_config") or {}
    found = config.get("max_position_embeddings") or text.get("max_position_embeddings")
    return int(found) if found else None


def _outside_name(model: str) -> str:
    # as the engines name themselves without --served-model-name
    return Path(model).expanduser().absolute().name if Path(model).expanduser().exists() else model


def _text(flags: tuple[str, ...], flag: str) -> str | None:
    """The value of an engine flag, as `--flag value`, `--flag=value`, or with underscores."""
    for index, text in enumerate(flags):
        name, equals, value = text.partition("=")
        if name.replace("_", "-") != flag:
            continue
        if equals:
            return value
        return flags[index + 1] if index + 1 < len(flags) else None
    return None


def _number(flags: tuple[str, ...], flag: str) -> int | None:
    text = _text(flags, flag) or ""
    return int(text) if text.isdigit() and int(text) else None


def main() -> int:
    """Make the demo's base below the folder named on the command line."""
    from cli.demo.base import DemoBaseError, ensure_base

    try:
        ensure_base(Path(sys.argv[1]), lambda line: print(line, flush=True))
    except DemoBaseError as error:
        print(f"lorry: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
