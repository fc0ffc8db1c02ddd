"""How `make test` spreads the tests that run vLLM over two of pytest's workers."""

import os
import re
from functools import cache
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

_SHARED_ENGINE = "the shared engine"
#: A test, or a fixture of its file, that takes the engine which is started once per session.
_TAKES_IT = re.compile(r"\bvllm_engine: ")


class SharedEngineScheduling(LoadFileScheduling):
    """xdist's `--dist loadfile`, but all files that take the shared engine go to one worker.

    Else each worker would start one. xdist's own groups (`--dist loadgroup`) would do, but version
    3.8 writes them where pytest 9.2 does not read them.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return _SHARED_ENGINE if _takes_it(self.config.rootpath / file) else file


@cache
def _takes_it(file: Path) -> bool:
    return _TAKES_IT.search(file.read_text(encoding="utf-8")) is not None


def keep_to_own_cores(config: pytest.Config) -> None:
    """Give each of several workers its own cores, where all that runs is vLLM.

    An engine uses every core that it may, and waits for the slowest: engines that shared their
    cores would wait for each other at every step. What a worker starts inherits its cores.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker or config.getoption("markexpr") != "vllm":
        return
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    own = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: workers]
    if own:  # else there are more workers than cores
        os.sched_setaffinity(0, own)
