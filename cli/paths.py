"""Names and ids in the paths of the API."""

from urllib.parse import quote


def segment(name: str) -> str:
    """A name as one segment of a path, whatever it holds: `a?drain=true` is no query."""
    return quote(name, safe="@")
