"""`lorry webhooks listen` as a process: it verifies what it gets, and says so."""

import json
import signal
import subprocess
import sys
from typing import Any
from uuid import uuid4

from tests.support.deployment import Deployment
from tests.support.processes import environment, until


class Listener:
    """One, whose output is in a file."""

    def __init__(self, deployment: Deployment, *arguments: str) -> None:
        self.out = deployment.folder / f"listen-{uuid4().hex[:6]}.out"
        self.err = self.out.with_suffix(".err")
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "webhooks", "listen", *arguments, "--json"],
                env=environment(uuid4().hex, LORRY_URL=f"http://127.0.0.1:{deployment.port}"),
                stdout=out,
                stderr=err,
            )
        until(lambda: "listening on" in self.err.read_text(), 30, "the listener")
        self.url = self.err.read_text().split()[-1]

    def events(self) -> list[dict[str, Any]]:
        # a line may be read while it is being written
        whole = [text for text in self.out.read_text().splitlines(True) if text.endswith("\n")]
        return [json.loads(text) for text in whole]

    def got(self, count: int) -> list[dict[str, Any]]:
        until(lambda: len(self.events()) >= count, 60, f"{count} events: {self.err.read_text()}")
        return self.events()

    def stop(self) -> int:
        self.popen.send_signal(signal.SIGINT)
        return self.popen.wait(20)
