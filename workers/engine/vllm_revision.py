"""Which base model it was: a name for the files that the engine loads."""

import hashlib
from pathlib import Path

_WHOLE = 1 << 20  # files up to here are hashed whole, of larger ones only both ends
_END = 1 << 16
_MODEL_FILES = {".json", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".model", ".jinja"}


def revision_of(path: Path) -> str:
    """A short fingerprint of a model's folder or file: `files-` and 16 hex digits.

    It changes when any file of the model does, but for a change in the middle of a large file
    that keeps its size: reading all the weights would add minutes to a start.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file() and file.suffix in _MODEL_FILES and not file.name.startswith("."):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            digest.update(_sample(file))
    return f"files-{digest.hexdigest()[:16]}"


def _sample(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE:
            return stream.read()
        head = stream.read(_END)
        stream.seek(size - _END)
        return head + stream.read()
