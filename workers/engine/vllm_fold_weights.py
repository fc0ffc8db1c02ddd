"""The base weights that LoRA can touch: an adapter is added into them, and they are restored.

Imported by vLLM's worker processes only. Restoring copies the weights that the engine started
with, bit for bit; nothing is ever subtracted.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

Copy = Literal["auto", "gpu", "host"]

#: LoRA layers that are a plain matrix each, by their class; what is sharded by rank is not.
KNOWN = {
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearVariableSliceWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
    "ReplicatedLinearWithLoRA",
}
#: Memory of the GPU that a copy leaves alone, beside what a step needs at its peak.
_GPU_MARGIN_BYTES = 3 * 1024**3 // 2
#: A copy on the host takes at most this share of what the machine has left.
_HOST_SHARE = 0.7
_DIGEST_CHUNK = 1 << 24
_NO_MATRIX = "is no plain matrix"


class CannotFold(Exception):
    """An adapter or an engine that is not folded, and why; nothing was changed."""


@dataclass(slots=True)
class _Module:
    """One wrapped layer.

    Args:
        layer: vLLM's LoRA layer.
        weight: the base layer's weight, (out, in), as the engine computes with it.
        saved: the same numbers as the engine started with; None until the copy is made.
    """

    layer: Any
    weight: Any
    saved: Any = None


class FoldWeights:
    """What one rank holds of the base model.

    Args:
        manager: vLLM's LoRA model manager.

    Raises:
        CannotFold: no weight that could be folded into.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._modules: dict[str, _Module] = {}
        unknown: dict[str, str] = {}
        for name, layer in manager.modules.items():
            if problem := _problem(layer):
                unknown[name] = problem
            else:
                self._modules[name] = _Module(layer, layer.base_layer.weight.data)
        if not self._modules:
            # what is wrong with a plain matrix tells more than that another layer is none
            telling = sorted(unknown.values(), key=lambda problem: problem.endswith(_NO_MATRIX))
            raise CannotFold(next(iter(telling), "the model has no LoRA layers"))
        addresses = {module.weight.data_ptr() for module in self._modules.values()}
        if len(addresses) < len(self._modules):
            raise CannotFold("layers of the model share their weights")
        self._dirty: set[str] = set()
        self.folded: int | None = None

    @property
    def copied(self) -> bool:
        """Whether the weights can be restored."""
        return all(module.saved is not None for module in self._modules.values())

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def copy(self, kind: Copy, gpu_left: Callable[[], int]) -> dict[str, float]:
        """Copy the weights, once; again with another kind moves the copy (the base is unfolded).

        Args:
            kind: where to: as much to the GPU as fits and the rest to the host, or one of them.
            gpu_left: tells how many bytes of the GPU's memory may be taken.

        Returns:
            Bytes on the GPU and on the host, and the seconds that it took.

        Raises:
            CannotFold: there is no memory for it.
        """
        if self._dirty:
            raise RuntimeError("the weights are not the base's: nothing to copy from")
        started = time.perf_counter()
        for module in self._modules.values():
            module.saved = None
        if self._on_gpu:
            torch.cuda.empty_cache()
        gpu_bytes = gpu_left()
        sizes = {name: _bytes(module.weight) for name, module in self._modules.items()}
        on_gpu, left = set(), gpu_bytes
        if self._on_gpu and kind != "host":
            for name, size in sizes.items():
                if size <= left:
                    on_gpu.add(name)
                    left -= size
        if kind == "gpu" and self._on_gpu and len(on_gpu) < len(sizes):
            raise CannotFold(
                f"a copy of {sum(sizes.values()) / 1e9:.1f} GB does not fit in the "
                f"{max(0, gpu_bytes) / 1e9:.1f} GB of GPU memory that vLLM leaves"
            )
        host = sum(size for name, size in sizes.items() if name not in on_gpu)
        if host > _HOST_SHARE * _available_bytes():
            raise CannotFold(f"the machine has no {host / 1e9:.1f} GB of memory for a copy")
        for name, module in self._modules.items():
            module.saved = _clone(module.weight) if name in on_gpu else _to_host(module.weight)
        self._settle()
        return {
            "gpu_bytes": float(sum(sizes.values()) - host),
            "host_bytes": float(host),
            "seconds": time.perf_counter() - started,
        }

    def refusal(self, lora_int_id: int) -> str | None:
        """Why an adapter cannot be folded; None if it can."""
        if not self.copied:
            return "there is no copy of the base weights to restore them from"
        adapter = self._manager.get_adapter(lora_int_id)
        if adapter is None or lora_int_id not in self._manager.lora_index_to_id:
            return f"adapter {lora_int_id} is not resident"
        known = self._modules.keys()
        # what meets no module at all does nothing as LoRA either
        odd = [n for n in adapter.loras if n not in known and n in self._manager.modules]
        if odd:
            return f"adapter {lora_int_id} adapts {odd[0]}, which cannot be folded"
        return None

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def restore(self) -> float:
        """Make the weights the base's again, bit for bit; returns the seconds that it took."""
        started = time.perf_counter()
        for name in self._dirty:
            module = self._modules[name]
            module.weight.copy_(module.saved, non_blocking=True)
        self._settle()
        self._dirty.clear()
        self.folded = None
        return time.perf_counter() - started

    def rehearse(self) -> float:
        """The seconds that restoring every weight takes."""
        self._dirty.update(self._modules)
        return float(self.restore())

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def fold(self, lora_int_id: int) -> float:
        """Add a resident adapter into the base's own weights; returns the seconds that it took."""
        if self._dirty:
            raise RuntimeError("another adapter is folded: restore first")
        started = time.perf_counter()
        slot = self._manager.lora_index_to_id.index(lora_int_id)
        adapted = self._manager.get_adapter(lora_int_id).loras.keys()
        for name, module in self._modules.items():
            if name in adapted:
                self._dirty.add(name)
                _add(module, slot)
        self._settle()
        self.folded = lora_int_id
        return time.perf_counter() - started

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def digest(self) -> str:
        """A fingerprint of the weights as they are now."""
        whole = hashlib.sha256()
        for name in sorted(self._modules):
            for part in _fingerprints(self._modules[name].weight):
                whole.update(f"{name}:{part};".encode())
        return whole.hexdigest()

    @property
    def _on_gpu(self) -> bool:
        return any(module.weight.is_cuda for module in self._modules.values())

    def _settle(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def gpu_bytes_left(worker: Any) -> int:
    """GPU memory that vLLM leaves even when a step takes the most it ever does."""
    if not torch.cuda.is_available():
        return 0
    free, _ = torch.cuda.mem_get_info()
    return int(free) - int(getattr(worker, "peak_activation_memory", 0)) - _GPU_MARGIN_BYTES


def _problem(layer: Any) -> str | None:
    """Why a LoRA layer's base weight cannot be folded into."""
    kind = type(layer).__name__
    if kind not in KNOWN:
        return f"{kind} {_NO_MATRIX}"
    method = type(getattr(layer.base_layer, "quant_method", None)).__name__
    if method != "UnquantizedLinearMethod":
        return f"the base model is quantised ({method})"
    weight = getattr(layer.base_layer, "weight", None)
    if weight is None or weight.dim() != 2 or not weight.numel():
        return "vLLM has packed the base weights away, as it does on a CPU"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"the base weights are {weight.dtype}"
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    rows = sum(part.shape[-2] for part in b)
    fits = len(a) == len(b) and rows == weight.shape[0]
    if not fits or any(part.shape[-1] != weight.shape[1] for part in a):
        return f"{kind} keeps its adapters in another shape than its weight {tuple(weight.shape)}"
    return None


def _add(module: _Module, slot: int) -> None:
    """`weight += B @ A`, one slice of a packed layer after another.

    vLLM has multiplied the scaling into B, and filled up a lower rank with zeros. The sum is
    rounded once to the weight's own type.
    """
    row, weight = 0, module.weight
    stacked = zip(module.layer.lora_a_stacked, module.layer.lora_b_stacked, strict=True)
    for a_slots, b_slots in stacked:
        a, b = a_slots[slot, 0], b_slots[slot, 0]
        rows = weight[row : row + b.shape[0]]
        if a.dtype == weight.dtype:
            rows.addmm_(b, a)
        else:
            rows.copy_(rows.float().addmm_(b.float(), a.float()))
        row += b.shape[0]


def _clone(weight: Any) -> Any:
    return weight.clone(memory_format=torch.contiguous_format)


def _to_host(weight: Any) -> Any:
    if not weight.is_cuda:
        return _clone(weight)
    try:
        saved = torch.empty(weight.shape, dtype=weight.dtype, device="cpu", pin_memory=True)
    except RuntimeError:  # the system lets no more be pinned
        saved = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    return saved.copy_(weight)


def _bytes(weight: Any) -> int:
    return int(weight.numel() * weight.element_size())


def _available_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _fingerprints(weight: Any) -> Iterator[int]:
    """Sums over the weight's bits, each multiplied by a number of its place."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    for chunk in weight.contiguous().view(integer).flatten().split(_DIGEST_CHUNK):
        places = torch.arange(chunk.numel(), device=chunk.device) % 65_521 + 1
        yield int((chunk.to(torch.int64) * places).sum())
