"""Turn adapter_model.bin into safetensors: a script for a process of its own (db/adapter_bin.py).

    python -I convert_bin.py SOURCE TARGET MOST_BYTES

It imports nothing of Lorry. Exit code 3 says that torch or safetensors is not installed.
"""

import resource
import sys
from pathlib import Path

NO_TORCH = 3
_SECONDS = 240
_ROOM = 512 * 1024 * 1024
_OPEN_FILES = 64


def main(source: Path, target: Path, most_bytes: int) -> int:
    """Convert; returns the exit code, after one line on standard error if it went wrong."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, _SECONDS)
    _limit(resource.RLIMIT_FSIZE, most_bytes + _ROOM)
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError:
        return NO_TORCH
    torch.set_num_threads(1)
    # torch itself has mapped gigabytes by now, which is not the file's doing
    _limit(resource.RLIMIT_AS, _mapped_bytes() + 3 * most_bytes + _ROOM)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    try:
        tensors = torch.load(source, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict):
            raise ValueError(f"it holds a {type(tensors).__name__}, expected tensors by name")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{name!r} is no tensor with a name")
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
                raise ValueError(f"{name!r} is no plain tensor")
        # counted before they are made whole: a view can pretend to any size
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > most_bytes:
            raise ValueError(f"its tensors take {size} bytes, expected at most {most_bytes}")
        whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(whole, target, metadata={"format": "pt"})
    except Exception as error:  # unpickling may raise anything
        line = " ".join(str(error).split())
        sys.stderr.write(f"{type(error).__name__}: {line[:280]}\n")
        return 1
    return 0


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
