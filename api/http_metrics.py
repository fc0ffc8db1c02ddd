"""Counts and times every request, from outside the application, errors of ours included."""

import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.metrics import ApiMetrics

#: What a path that no route takes, or an odd method, is counted under: callers choose those freely.
UNMATCHED: Final = "unmatched"
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class HttpMetrics:
    """Plain ASGI: the body passes through untouched and no task is made for it."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # unless an answer begins

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        try:
            await self._app(scope, receive, note_status)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else UNMATCHED
            # put there by the router, which works on this very scope
            route = getattr(scope.get("route"), "path", UNMATCHED)
            self._metrics.answered(method, route, status, time.perf_counter() - started)
