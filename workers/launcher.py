"""`lorry worker` as a thin parent: the worker runs in a session of its own, and neither outlives
the other.

vLLM's engine process handles SIGINT by itself and does not watch its parent. So signals go to the
worker's pid only, and whatever is left of its session is killed once the worker is gone. Nothing
here imports an engine, Celery or the database.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from workers.engine.selection import EngineName
from workers.process_tree import outlive_parent, run_child

#: How the worker process itself is started; the launcher appends the specification.
WORKER_COMMAND: Final = (sys.executable, "-m", "workers.main")


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What one worker process is to be; it travels to it as JSON.

    Args:
        model: a local folder or a model name, as `vllm serve` takes it.
        engine: which engine holds it.
        flags: the engine's own flags, verbatim and in order.
        name: how the worker is listed; empty for one made from host and pid.
        partitions: the only partitions to serve; None for all.
        adapters: the only adapters to serve, by name; None for all.
        pin: adapters that stay in their slots, by name.
        preload: adapters that are loaded before the first job, by name.
        fold: whether adapters are folded into the base's weights where it pays.
        parent_fd: read end of the launcher's pipe, for `watch_parent`; None without a launcher.
    """

    model: str
    engine: EngineName = EngineName.VLLM
    flags: tuple[str, ...] = ()
    name: str = ""
    partitions: tuple[int, ...] | None = None
    adapters: tuple[str, ...] | None = None
    pin: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    fold: bool = True
    parent_fd: int | None = None

    def to_json(self, parent_fd: int | None = None) -> str:
        """The specification as the worker process takes it on its command line."""
        return json.dumps({**asdict(self), "parent_fd": parent_fd})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ValueError or TypeError for anything else."""
        fields: dict[str, Any] = json.loads(text)
        for name in ("flags", "partitions", "adapters", "pin", "preload"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        return cls(**{**fields, "engine": EngineName(fields["engine"])})


def launch(spec: WorkerSpec, command: Sequence[str] = WORKER_COMMAND) -> int:
    """Run a worker process until it ends, forwarding SIGTERM, and SIGINT as SIGTERM, to it.

    Must run in the main thread. Blocking.

    Args:
        spec: what the worker is to be.
        command: the worker's program, to which the specification is appended as JSON.

    Returns:
        The exit code as `run_child` gives it.
    """
    read_end, write_end = os.pipe()
    try:
        return run_child(
            [*command, spec.to_json(read_end)],
            forward={signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGTERM},
            pass_fds=(read_end,),
        )
    finally:
        os.close(read_end)
        os.close(write_end)


def watch_parent(fd: int | None) -> None:
    """Kill our own process group when the launcher dies, however it dies.

    Starts a daemon thread and returns. The process must lead its own group.

    Args:
        fd: read end of a pipe whose only write end the launcher holds and never writes to; None
            where there is no launcher, and nothing is done.
    """
    if fd is None:
        return

    def wait() -> None:
        while os.read(fd, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="watch-parent", daemon=True).start()
    outlive_parent()


def main() -> int:
    """Run the worker that the first argument describes as JSON."""
    return launch(WorkerSpec.from_json(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
