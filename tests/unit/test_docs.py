"""The documentation agrees with the program: settings, commands, options, errors, links, targets.

python -m tests.unit.test_docs      prints the table of docs/reference/settings.md
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import api.app  # noqa: F401  brings the API's own errors
from cli import services
from cli.main import app
from core.errors import ErrorCode, LorryError
from core.settings import PREFIX, Settings, known_variables

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("docs/**/*.md"), *(ROOT / f"{n}.md" for n in ("README", "CONTRIBUTING"))]
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


def settings_table() -> str:
    """The table of settings as Markdown."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        rows.append(f"| `{PREFIX}{name.upper()}` | {_shown(field.default)} | {field.description} |")
    return "\n".join(rows)


def _shown(default: Any) -> str:
    if default is None:
        return "not set"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`" if default != "" else "empty"


def _command_lines(page: Path) -> Iterator[str]:
    """What a reader may type: shell blocks, prompts in console blocks, inline code."""
    text = page.read_text()
    for language, block in _BLOCK.findall(text):
        lines = block.replace("\\\n", " ").splitlines()
        if language == "console":
            yield from (line[2:] for line in lines if line.startswith("$ "))
        elif language in ("sh", "bash"):
            yield from lines
    yield from _SPAN.findall(_BLOCK.sub("", text))


def _lorry_arguments(line: str) -> Iterator[list[str]]:
    """The arguments of each `lorry` in a command line, inside `$(…)` too."""
    for part in re.split(r"\$\(|&&|[|;]", line):
        try:
            words = shlex.split(part.rstrip(")"), comments=True)
        except ValueError:  # a quotation that goes on in the next line: no command of ours
            continue
        while words and (_ASSIGNMENT.fullmatch(words[0]) or words[0] in ("env", "export")):
            words = words[1:]
        if len(words) > 1 and words[0] in ("lorry", ".venv/bin/lorry"):
            yield words[1:]


def _problem(arguments: list[str]) -> str | None:
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while rest and hasattr(command, "commands"):
        name = rest.pop(0)
        if name not in command.commands:
            return f"there is no command {name!r}"
        command = command.commands[name]
    if command.context_settings == services.PASS_THROUGH:
        return None  # unknown options are the engine's
    known = {option for param in command.params for option in param.opts} | {"--help"}
    unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - known
    return f"there is no {', '.join(sorted(unknown))}" if unknown else None


def test_the_settings_page_has_every_setting_with_its_default() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text()
    assert settings_table() in page, f"the table should be:\n{settings_table()}"
    assert all(f"`{name}`" in page for name in known_variables())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_named_exist(page: Path) -> None:
    named = set(re.findall(rf"{PREFIX}[A-Z][A-Z_]*", page.read_text()))
    assert named <= known_variables()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_shown_exist(page: Path) -> None:
    problems = [
        f"{line!r}: {problem}"
        for line in _command_lines(page)
        for arguments in _lorry_arguments(line)
        if (problem := _problem(arguments))
    ]
    assert problems == []


def test_commands_are_found_in_the_docs() -> None:
    found = {
        arguments[0]
        for page in PAGES
        for line in _command_lines(page)
        for arguments in _lorry_arguments(line)
    }
    assert {"up", "api", "worker", "steward", "migrate", "jobs", "keys", "models"} <= found


@pytest.mark.parametrize("line", ["lorry fly", "X=1 lorry jobs list --colour", "K=$(lorry key x)"])
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    ((arguments),) = _lorry_arguments(line)
    assert _problem(arguments)


def test_every_error_code_is_explained() -> None:
    page = (ROOT / "docs/reference/errors.md").read_text()
    codes = {code.value for code in ErrorCode}
    kinds: list[type[LorryError]] = [LorryError, *LorryError.__subclasses__()]
    codes |= {kind.code for kind in kinds}
    assert {code for code in codes if f"| `{code}` |" not in page} == set()


def test_every_metric_is_explained() -> None:
    page = (ROOT / "docs/reference/metrics.md").read_text()
    sources = [*ROOT.glob("api/*.py"), *ROOT.glob("workers/*.py")]
    named = {n for source in sources for n in re.findall(r'"(lorry_[a-z_]+)"', source.read_text())}
    assert named
    assert {name for name in named if not re.search(rf"`{name}(_total)?`", page)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        path, _, fragment = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert fragment in {_anchor(heading) for heading in headings}, target


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs/index.md"
    linked = {(index.parent / target).resolve() for target in _LINK.findall(index.read_text())}
    assert {page for page in PAGES if page.is_relative_to(index.parent)} - linked == {index}


def test_files_named_in_code_spans_exist() -> None:
    folders = "api|cli|core|db|migrations|workers|tests|benchmarks|deploy|docs"
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
            assert (ROOT / name).exists() or "r0009" in name, f"{page.name}: {name}"


def test_make_targets_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for line in _command_lines(page):
            for name in re.findall(r"(?:^|[ ;])make ([a-z-]+)", line):
                assert name in targets, f"{page.name}: make {name}"


if __name__ == "__main__":
    print(settings_table())
