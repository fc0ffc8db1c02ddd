"""An adapter's folder made into one file to upload: what belongs to an adapter, nothing else."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from core.errors import UsageError

_CONFIG: Final = "adapter_config.json"
#: The weights, in the order of preference; a pickle is converted by the API.
_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE: Final = (
    _CONFIG,
    "added_tokens.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_REMOTE: Final = {
    "http": "download it first",
    "https": "download it first",
    "s3": "copy it here first, for example with `aws s3 cp --recursive`",
    "gs": "copy it here first",
    "hf": "download it first, for example with `hf download`",
}


@contextmanager
def packed(source: str) -> Iterator[Path]:
    """The file to upload: an archive as it is, a folder as a tar file that goes away afterwards.

    Raises:
        UsageError: there is nothing there, or it is a remote address or no adapter's folder.
    """
    scheme, separator, _ = source.partition("://")
    if separator:
        remedy = _REMOTE.get(scheme, "copy it to this machine first")
        raise UsageError(
            f"{source}: remote addresses are not taken yet; {remedy}, then give the folder or "
            "archive here"
        )
    path = Path(source).expanduser()
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise UsageError(f"{source}: there is no such folder or archive")
    folder = _adapter_folder(path)
    with TemporaryDirectory(prefix="lorry-pack-") as scratch:
        # not compressed: weights hardly shrink, and it takes minutes
        archive = Path(scratch) / "adapter.tar"
        with tarfile.open(archive, "w") as tar:
            for file in _files(folder):
                tar.add(file.resolve(), arcname=file.name, recursive=False)
        yield archive


def _adapter_folder(path: Path) -> Path:
    """The folder itself, or the one adapter's folder right below it."""
    if (path / _CONFIG).is_file():
        return path
    below = sorted(config.parent for config in path.glob(f"*/{_CONFIG}"))
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(str(folder) for folder in below[:10])
        raise UsageError(f"{path} holds several adapters: give one of {names}")
    raise UsageError(
        f"{path} holds no {_CONFIG}: give the folder that PEFT's save_pretrained() wrote"
    )


def _files(folder: Path) -> list[Path]:
    weights = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    names = (*_BESIDE, *([weights] if weights else ()))
    return [folder / name for name in names if (folder / name).is_file()]
