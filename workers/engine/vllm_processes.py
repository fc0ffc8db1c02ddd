"""The engine's processes: what was started for it, down to the last, and that it ends.

vLLM's core starts workers of its own, and one that is still loading outlives the core.
"""

import contextlib
import multiprocessing
from multiprocessing.process import BaseProcess

import psutil


class ProcessFamily:
    """The processes that this one starts from now on, with their descendants."""

    def __init__(self) -> None:
        self._spared = {child.pid for child in multiprocessing.active_children()}
        self._members: set[psutil.Process] = set()

    def look(self) -> None:
        """Remember who lives now: a descendant is not found any more once its parent is gone."""
        for child in self._children():
            with contextlib.suppress(psutil.Error):
                parent = psutil.Process(child.pid)
                self._members |= {parent, *parent.children(recursive=True)}

    def kill(self) -> None:
        """End all of them at once. There is nothing that they could save."""
        children = self._children()
        for child in children:
            with contextlib.suppress(psutil.Error):
                psutil.Process(child.pid).suspend()  # it starts no more of them meanwhile
        self.look()
        for member in self._members:
            with contextlib.suppress(psutil.Error):
                member.kill()  # psutil checks that the pid was not given to another process
        for child in children:
            child.join()

    def _children(self) -> list[BaseProcess]:
        return [one for one in multiprocessing.active_children() if one.pid not in self._spared]
