"""When the stack is ready, and the one line that says so."""

import asyncio
import json
from typing import Final

import httpx2

from cli.up.options import UpOptions
from cli.up.serving import Serving

_PAUSE_SECONDS: Final = 0.1
_TIMEOUT_SECONDS: Final = 5.0


async def wait_ready(url: str) -> None:
    """Return once `/readyz` says that the API, the model and a worker are ready.

    However long that takes: an engine's start takes minutes, and its death ends the wait elsewhere.
    """
    async with httpx2.AsyncClient(
        base_url=url, timeout=_TIMEOUT_SECONDS, trust_env=False
    ) as client:
        while True:
            try:
                if (await client.get("/readyz")).status_code == httpx2.codes.OK:
                    return
            except httpx2.TransportError:
                pass  # not listening yet
            await asyncio.sleep(_PAUSE_SECONDS)


def ready_line(url: str, options: UpOptions, serving: Serving) -> str:
    """What `lorry up` prints, once, on stdout."""
    adapters = [name for name, _ in serving.adapters]
    if options.as_json:
        facts = {"url": url, "model": serving.name, "adapters": adapters, "engine": options.engine}
        return json.dumps({"ready": True, **facts})
    model = f"model {serving.name}"
    if adapters:
        model += f", adapters {', '.join(adapters)}"
    engine = f"engine {options.engine}"
    if options.engine == "simulated":
        engine += ": answers are made up"
    return f"lorry is ready: {url} ({model}; {engine})"
