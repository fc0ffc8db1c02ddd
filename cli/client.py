"""A thin client of the REST API, for the commands that a user runs from anywhere."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Final, Self

import httpx2

from core.errors import LorryError, UsageError
from core.settings import refuse_unknown_variables

DEFAULT_URL: Final = "http://127.0.0.1:8000"
#: A long poll's answer may take as long as it was asked to wait, and some.
_SLACK_SECONDS: Final = 10.0
LONGEST_WAIT_SECONDS: Final = 30
#: The API unpacks and stores an upload before it answers.
UPLOAD_SECONDS: Final = 600.0


class Unreachable(LorryError):
    """The API cannot be reached."""


class Refused(LorryError):
    """The API refused."""

    def __init__(self, message: str, problem: dict[str, Any]) -> None:
        super().__init__(message)
        self.problem = problem


class Client:
    """Speaks to one API. A context manager."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Open a client.

        Args:
            url: the API's address.
            key: the bearer key, if any.

        Raises:
            UsageError: the address is not one.
        """
        self._url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._http = httpx2.Client(base_url=self._url, headers=headers, timeout=_SLACK_SECONDS)
        except (httpx2.InvalidURL, ValueError) as error:
            raise UsageError(f"LORRY_URL={url!r}: {error}") from None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The client of `LORRY_URL` and `LORRY_API_KEY`.

        Raises:
            UsageError: an unknown `LORRY_*` variable, or an address that is not one.
        """
        refuse_unknown_variables(environ)
        return cls(environ.get("LORRY_URL") or DEFAULT_URL, environ.get("LORRY_API_KEY"))

    def get(self, path: str, *, wait: float = 0, **query: Any) -> dict[str, Any]:
        """GET a document.

        Args:
            path: below the API's address.
            wait: how long the API may hold the request, in seconds.
            query: the query's parameters; None leaves one out.

        Raises:
            LorryError: the API refused, or could not be reached.
        """
        given = {name: value for name, value in query.items() if value is not None}
        if wait:
            given["wait"] = wait
        return self._call("GET", path, params=given, timeout=wait + _SLACK_SECONDS)

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        seconds: float = _SLACK_SECONDS,
        **query: Any,
    ) -> dict[str, Any]:
        """POST a document and return the answer, which may take `seconds`. Raises like `get`."""
        return self._call(
            "POST",
            path,
            json=dict(body),
            headers=dict(headers or {}),
            timeout=seconds,
            params={name: value for name, value in query.items() if value is not None},
        )

    def upload(self, path: str, name: str, file: BinaryIO, fields: Mapping[str, str]) -> Any:
        """POST a file as a form, streamed, and return the answer. Raises like `get`."""
        return self._call(
            "POST",
            path,
            files={"file": (name, file)},
            data=dict(fields),
            timeout=httpx2.Timeout(_SLACK_SECONDS, write=None, read=UPLOAD_SECONDS),
        )

    def lines(self, path: str, **query: Any) -> Iterator[str]:
        """GET a document of lines, streamed. Raises like `get`, also on the way."""
        try:
            with self._http.stream("GET", path, params=query, timeout=UPLOAD_SECONDS) as response:
                if response.is_error:
                    response.read()
                    raise Refused(_message_of(response), _problem_of(response))
                yield from _whole_lines(response.iter_text())
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None

    def put(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """PUT a document and return the answer. Raises like `get`."""
        return self._call("PUT", path, json=dict(body))

    def patch(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """PATCH a document and return the answer. Raises like `get`."""
        return self._call("PATCH", path, json=dict(body), timeout=UPLOAD_SECONDS)

    def delete(self, path: str, **query: str | None) -> dict[str, Any]:
        """DELETE; returns the answer, empty where there is none. Raises like `get`."""
        given = {name: value for name, value in query.items() if value is not None}
        return self._call("DELETE", path, params=given)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def _unreachable(self, error: httpx2.TransportError) -> "Unreachable":
        return Unreachable(
            f"the API at {self._url} cannot be reached ({error or type(error).__name__}); "
            "start one with `lorry up`, or set LORRY_URL"
        )

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **options)
        except httpx2.UnsupportedProtocol as error:
            raise UsageError(f"LORRY_URL={self._url!r}: {error}") from None
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None
        if response.is_error:
            raise Refused(_message_of(response), _problem_of(response))
        if response.status_code == httpx2.codes.NO_CONTENT:
            return {}
        try:
            document: dict[str, Any] = response.json()
        except ValueError:
            raise LorryError(
                f"{self._url} answered {method} {path} with something else than JSON; "
                "is LORRY_URL the address of a Lorry API?"
            ) from None
        return document


def _whole_lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines split at line feeds alone: JSON may hold other separators as they are."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest


def _problem_of(response: httpx2.Response) -> dict[str, Any]:
    try:
        problem = response.json()
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def _message_of(response: httpx2.Response) -> str:
    """One line out of a problem document or an OpenAI error object."""
    try:
        problem = response.json()
        inner = problem.get("error")
        said = (inner or {}).get("message") or problem.get("detail") or problem.get("title")
    except (ValueError, AttributeError):
        said = None
    message = f"{said or response.reason_phrase} ({response.status_code})"
    if response.status_code == httpx2.codes.UNAUTHORIZED and not os.environ.get("LORRY_API_KEY"):
        message += "; set LORRY_API_KEY"
    return message
