"""A client that keeps submitting through the API, whatever happens to it, and counts."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import httpx2

from tests.support.api import inside


class Load:
    """Jobs submitted over HTTP with an Idempotency-Key each, tried again until they are taken."""

    def __init__(self, url: str, models: list[str]) -> None:
        self._url = url
        self._models = itertools.cycle(models)
        self._stopping = asyncio.Event()
        self._dice = random.Random(7)
        #: every job that was answered with 202
        self.accepted: list[UUID] = []
        #: answers that were no 202, by status; 0 where no answer came
        self.refused: dict[int, int] = {}

    async def run(self, client: httpx2.AsyncClient) -> None:
        while not self._stopping.is_set():
            await self._submit(client)
            await asyncio.sleep(self._dice.uniform(0, 0.02))

    async def _submit(self, client: httpx2.AsyncClient) -> None:
        key = {"Idempotency-Key": uuid4().hex}
        body = {"model": next(self._models), "prompt": key["Idempotency-Key"], "max_tokens": 4}
        while True:
            try:
                response = await client.post(f"{self._url}/v1/jobs", json=body, headers=key)
                status = response.status_code
            except httpx2.TransportError:
                status = 0
            if status == 202:
                self.accepted.append(inside(response.json()["id"]))
                return
            self.refused[status] = self.refused.get(status, 0) + 1
            assert status in (0, 503), response.text
            await asyncio.sleep(0.1)

    def stop(self) -> None:
        self._stopping.set()


@asynccontextmanager
async def steady_load(url: str, models: list[str], clients: int = 2) -> AsyncIterator[Load]:
    """Clients that submit until the block ends; then each finishes the submission it is at."""
    load = Load(url, models)
    async with httpx2.AsyncClient(timeout=60) as client, asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(load.run(client))
        try:
            yield load
        finally:
            load.stop()
