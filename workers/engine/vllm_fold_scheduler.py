"""The fold inside vLLM's core process: a scheduler that lets one adapter alone compute.

While adapter X is folded, only X's requests are scheduled. The others are parked: what was running
becomes preempted, as vLLM itself does it when memory is short, but keeps its KV blocks and its
count of computed tokens; what waited waits on. Afterwards vLLM resumes them by its own rules, from
where they were. So neither of its model runners ever holds more requests than it has room for.

Importing this module gives `EngineCore` the method `lorry_fold`, one call between two steps:
nothing is scheduled while the weights change, and a step issued before is executed before.
"""

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request, RequestStatus

#: The queues of requests that do not run; releases differ in which they have.
_QUEUES = ("waiting", "skipped_waiting", "kv_holding_waiting")


class _FoldScheduling:
    """What is added to vLLM's scheduler."""

    #: the adapter that alone may be scheduled; None lets all
    lorry_only: int | None = None
    #: why nothing may be scheduled any more
    lorry_broken: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: requests that wait and keep their KV blocks, in the order in which they were parked
        self.lorry_parked: dict[str, Request] = {}

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        """One step's requests; see vLLM. Raises, and ends the core, after a fold that failed."""
        if self.lorry_broken:
            raise RuntimeError(f"folding went wrong: {self.lorry_broken}")
        if self.lorry_only is None and not self.lorry_parked:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        parked = self._park()
        hidden = self._hide()
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._show(hidden)
        self._check(output)
        self._make_room(output)
        # tells the model runner to forget them; vLLM's own preempted ones are in it already
        output.preempted_req_ids = (output.preempted_req_ids or set()) | parked
        self._forget_resumed()
        return output

    def has_requests(self: Any) -> bool:
        """Whether to step: not for parked requests alone, which would spin."""
        if self.lorry_only is None or self.running or self.lorry_broken:
            return bool(super().has_requests())  # type: ignore[misc]
        queues = (queue for queue in self._queues().values())
        may_run = any(_adapter(r) == self.lorry_only for queue in queues for r in queue)
        return may_run or bool(self.has_finished_requests())

    def _queues(self: Any) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _QUEUES if hasattr(self, name)}

    def _park(self: Any) -> set[str]:
        """Take what may not run out of the running set; returns their ids."""
        if self.lorry_only is None:
            return set()
        others = [r for r in self.running if _adapter(r) != self.lorry_only]
        if not others:
            return set()
        self.running = [r for r in self.running if _adapter(r) == self.lorry_only]
        queue = getattr(self, "kv_holding_waiting", self.waiting)
        for request in reversed(others):
            request.status = RequestStatus.PREEMPTED
            request.spec_token_ids = []
            self._inflight_prefills.discard(request)
            queue.prepend_request(request)
        self.lorry_parked |= {request.request_id: request for request in others}
        return {request.request_id for request in others}

    def _hide(self: Any) -> list[tuple[str, list[Request]]]:
        """Take what may not be scheduled now out of the queues, for the length of a call."""
        hidden = []
        for name, queue in self._queues().items():
            found = [request for request in queue if not self._may_run(request)]
            if found:
                rest = create_request_queue(self.policy)
                for request in queue:
                    if self._may_run(request):
                        rest.add_request(request)
                setattr(self, name, rest)
                hidden.append((name, found))
        return hidden

    def _show(self: Any, hidden: list[tuple[str, list[Request]]]) -> None:
        for name, requests in hidden:
            queue = getattr(self, name)
            for request in reversed(requests):  # they have waited longest
                queue.prepend_request(request)

    def _may_run(self: Any, request: Request) -> bool:
        if self.lorry_only is not None and _adapter(request) != self.lorry_only:
            return False
        # parked while its last step was under way: the token made there must be known first
        return request.request_id not in self.lorry_parked or not request.num_output_placeholders

    def _check(self: Any, output: Any) -> None:
        if self.lorry_only is None:
            return
        scheduled = (self.requests[name] for name in output.num_scheduled_tokens)
        if wrong := {_adapter(r) for r in scheduled} - {self.lorry_only}:
            raise RuntimeError(f"adapter {self.lorry_only} is folded, and {wrong} was scheduled")

    def _make_room(self: Any, output: Any) -> None:
        """Parked requests give up their KV before running ones do, and before nothing runs."""
        lost = len(output.preempted_req_ids or ())
        if not lost and not output.num_scheduled_tokens and not self.running:
            lost = any(self._may_run(r) for queue in self._queues().values() for r in queue)
        for request in reversed(list(self.lorry_parked.values())):
            if not lost:
                return
            if request.status == RequestStatus.PREEMPTED and not request.num_output_placeholders:
                self._evict(request)
                lost -= 1

    def _evict(self: Any, request: Request) -> None:
        """Free a parked request's KV: it will be computed again, as vLLM's preempted ones are."""
        del self.lorry_parked[request.request_id]
        if not request.num_computed_tokens:
            return
        self._free_request_blocks(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        if hasattr(self, "kv_holding_waiting"):
            self.kv_holding_waiting.remove_request(request)
            self.waiting.prepend_request(request)

    def _forget_resumed(self: Any) -> None:
        self.lorry_parked = {
            name: request
            for name, request in self.lorry_parked.items()
            if request.status == RequestStatus.PREEMPTED
        }


class FoldScheduler(_FoldScheduling, Scheduler):  # type: ignore[misc]  # vLLM is not type-checked
    """vLLM's scheduler with a fold."""


class FoldAsyncScheduler(_FoldScheduling, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler with a fold."""


def fold_scheduler(vllm_config: Any, **kwargs: Any) -> Any:
    """The scheduler that vLLM would choose, with a fold. This is what `scheduler_cls` names."""
    chosen = FoldAsyncScheduler if vllm_config.scheduler_config.async_scheduling else FoldScheduler
    return chosen(vllm_config=vllm_config, **kwargs)


def _adapter(request: Request) -> int:
    return request.lora_request.lora_int_id if request.lora_request else 0


def _lorry_fold_prepare(core: Any, copy: str) -> dict[str, Any]:
    """Make every rank ready to fold; see `FoldExtension.lorry_fold_prepare`."""
    scheduler = core.scheduler
    if not isinstance(scheduler, _FoldScheduling):
        return {"refused": f"the scheduler is {type(scheduler).__name__}"}
    made = core.model_executor.collective_rpc("lorry_fold_prepare", args=(copy,))
    for rank in made:
        if "refused" in rank:
            return {"refused": rank["refused"]}
    return {name: max(rank[name] for rank in made) for name in made[0]}


def _lorry_fold(core: Any, lora_int_id: int | None) -> dict[str, Any]:
    """Fold an adapter, or None, on every rank; see `FoldExtension.lorry_fold`.

    Raises:
        Exception: it went wrong half-way. Nothing is computed any more: the next step ends the
            core.
    """
    scheduler = core.scheduler
    started = time.perf_counter()
    try:
        made = core.model_executor.collective_rpc("lorry_fold", args=(lora_int_id,))
        refused = [rank["refused"] for rank in made if "refused" in rank]
        if refused and len(refused) == len(made):
            return {"refused": refused[0]}
        if refused:
            raise RuntimeError(f"one rank has folded and another not: {refused[0]}")
        scheduler.lorry_only = lora_int_id
    except BaseException as error:
        scheduler.lorry_broken = f"{type(error).__name__}: {error}"
        raise
    times = {name: max(rank[name] for rank in made) for name in made[0]}
    return times | {"pause": time.perf_counter() - started}


def _lorry_fold_digest(core: Any) -> list[str]:
    """A fingerprint of each rank's weights."""
    return list(core.model_executor.collective_rpc("lorry_fold_digest"))


EngineCore.lorry_fold_prepare = _lorry_fold_prepare
EngineCore.lorry_fold = _lorry_fold
EngineCore.lorry_fold_digest = _lorry_fold_digest
