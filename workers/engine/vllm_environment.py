"""The environment variables that vLLM must find before it is imported."""

import os


def prepare_environment() -> None:
    """Set what vLLM, transformers and the hub client read. What an operator has set stays.

    Call it before the first import of vLLM: some of these are read while it is imported.
    """
    for name, value in _defaults().items():
        os.environ.setdefault(name, value)


def _defaults() -> dict[str, str]:
    return {
        # An adapter path or a template that is not there must never turn into a download.
        "HF_HUB_OFFLINE": "1",
        # The worker's process has threads by now, which a fork would copy half-way.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # The rest matters on a CPU only, where "auto" would keep one core back.
        "VLLM_CPU_OMP_THREADS_BIND": _ranges(sorted(os.sched_getaffinity(0))),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    }


def _ranges(cores: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
