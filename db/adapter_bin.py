"""adapter_model.bin, a pickle, turned into safetensors by a process that has little to lose.

The API never unpickles and never imports torch. The converter runs apart (`python -I`), with an
empty environment and limits on memory, time and files, and lets torch read tensors only.
"""

import subprocess
import sys
from pathlib import Path
from typing import Final

from core.adapter_rules import Finding
from core.errors import AdapterRejected

#: By path: `python -I` sees only what is installed.
_CONVERTER: Final = Path(__file__).parents[1] / "workers" / "engine" / "convert_bin.py"
_SECONDS: Final = 300.0
_NO_TORCH: Final = 3  # the converter's exit code
_REMEDY: Final = (
    "convert it where it was trained: "
    "`safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
    "'adapter_model.safetensors')`"
)


def convert_bin(source: Path, target: Path, most_bytes: int) -> None:
    """Write the tensors of `source` to `target` as safetensors. Blocking, for seconds.

    Args:
        most_bytes: the most that the tensors may take.

    Raises:
        AdapterRejected: torch is not installed here, or the file is not a plain pickle of tensors.
    """
    command = [sys.executable, "-I", str(_CONVERTER), str(source), str(target), str(most_bytes)]
    try:
        done = subprocess.run(
            command,
            env={"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refused("bin_conversion", f"took longer than {_SECONDS:.0f} s to convert") from None
    if done.returncode == _NO_TORCH:
        raise _refused(
            "bin_needs_torch", "is a pickle, and PyTorch is not installed here to read it"
        )
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise _refused("bin_conversion", f"cannot be converted to safetensors ({why[:300]})")


def _refused(code: str, what: str) -> AdapterRejected:
    return AdapterRejected([Finding(code, f"adapter_model.bin {what}; {_REMEDY}")])
