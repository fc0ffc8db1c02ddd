"""The command line as a test calls it."""

import pytest

from cli import main


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = main.USAGE) -> str:
    """The one line that a failing command writes to stderr."""
    assert main.run(list(arguments)) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lorry: ")
    assert printed.err.count("\n") == 1, printed.err
    return printed.err
