"""How far the engine's core has come, counted from vLLM's per-iteration statistics.

Outputs say nothing on the way (only the final one is sent), and a hung core passes its health
check: this count is what tells a slow engine from a hung one.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class WorkCount:
    """Tokens the core has worked on, prompts included, and those it made; they only rise.

    And how many requests were in the last step that was heard of, and waited for one, as the core
    itself counts them.
    """

    def __init__(self) -> None:
        self.value = 0
        self.made = 0
        self.in_step = 0
        self.waiting = 0

    def logger_factory(self) -> Callable[..., StatLoggerBase]:
        """What `AsyncLLM` takes in `stat_loggers`."""

        def make(_config: Any, _engine_index: int = 0) -> StatLoggerBase:
            return _WorkLogger(self)

        return make


class _WorkLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM is not type-checked
    def __init__(self, count: WorkCount) -> None:
        self._count = count

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self._count.in_step = scheduler_stats.num_running_reqs
            self._count.waiting = scheduler_stats.num_waiting_reqs
        tokens = 0
        if iteration_stats is not None:
            self._count.made += iteration_stats.num_generation_tokens
            tokens = iteration_stats.num_generation_tokens + iteration_stats.num_prompt_tokens
        # A step that only computed part of a long prompt has no tokens to show, but was work.
        self._count.value += max(tokens, 1)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
