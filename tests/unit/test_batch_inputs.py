"""What people have, made into the lines of a batch."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from cli.batch_inputs import Defaults, in_input_order, write_lines
from core.errors import UsageError

USER = {"role": "user", "content": "Hi"}


def lines(folder: Path, name: str, content: str, **defaults: Any) -> tuple[str, list[Any]]:
    source = folder / name
    source.write_bytes(content.encode())
    target = io.StringIO()
    endpoint, count = write_lines(source, target, Defaults(**{"model": "m", **defaults}))
    found = [json.loads(text) for text in target.getvalue().splitlines() if text]
    assert len(found) == count
    return endpoint, found


@pytest.mark.parametrize(
    ("name", "content", "defaults", "prompt"),
    [
        ("a.txt", "Hi\n", {}, "Hi"),
        ("a.txt", "\ufeffHi\r\n\r\n", {}, "Hi"),
        ("a.txt", "Hi", {"template": "Say {text}!"}, "Say Hi!"),
        ("a.jsonl", '"Hi"\n', {}, "Hi"),
        ("a.jsonl", '{"prompt": "Hi"}\n', {}, "Hi"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "Hi"}]}', {}, "Hi"),
        ("a.jsonl", '{"a": 1, "b": null}', {"template": "{a}-{b}-{{x}}"}, "1--{x}"),
        ("a.csv", "text,n\nHi,1\n", {"template": "{n}: {text}"}, "1: Hi"),
        ("a.csv", "prompt\nHi\n", {}, "Hi"),
        ("a.tsv", "text\tn\nHi\t1\n", {"template": "{text}{n}"}, "Hi1"),
    ],
)
def test_prompts_are_found(
    tmp_path: Path, name: str, content: str, defaults: dict[str, Any], prompt: str
) -> None:
    endpoint, (line,) = lines(tmp_path, name, content, **defaults)
    assert endpoint == line["url"] == "/v1/chat/completions"
    assert line["method"] == "POST"
    assert line["body"] == {"model": "m", "messages": [{"role": "user", "content": prompt}]}


def test_a_batch_line_is_kept_as_it_is(tmp_path: Path) -> None:
    given = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "p"}}
    endpoint, (line,) = lines(tmp_path, "a.jsonl", json.dumps(given), fields={"seed": 1})
    assert endpoint == "/v1/completions"
    assert line == {**given, "body": {"prompt": "p", "model": "m", "seed": 1}}
    given["body"]["model"] = "other"  # type: ignore[index]
    assert lines(tmp_path, "a.jsonl", json.dumps(given))[1] == [given]


def test_completions_and_systems(tmp_path: Path) -> None:
    endpoint, (line,) = lines(tmp_path, "a.txt", "Once", completion=True)
    assert endpoint == "/v1/completions"
    assert line["body"] == {"model": "m", "prompt": "Once"}
    _, (line,) = lines(tmp_path, "a.txt", "Hi", system="Be brief")
    assert line["body"]["messages"] == [{"role": "system", "content": "Be brief"}, USER]


@pytest.mark.parametrize(
    ("name", "content", "defaults", "words"),
    [
        ("a.txt", "\n\n", {}, "no prompts"),
        ("a.jsonl", '{"prompt": "x"}\nnope', {}, "line 2: not JSON"),
        ("a.jsonl", "[1]", {}, "line 1"),
        ("a.jsonl", '{"prompt": "x"}', {"model": None}, "--model"),
        ("a.csv", "a,b\n1,2\n", {}, "--template"),
        ("a.csv", "a,b\n1,2\n", {"template": "{c}"}, "'c'; the columns are a, b"),
    ],
)
def test_what_cannot_be_read_is_said(
    tmp_path: Path, name: str, content: str, defaults: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words.replace("{", r"\{")):
        lines(tmp_path, name, content, **defaults)


def test_results_are_merged_into_the_order_of_the_input() -> None:
    def results(*ids: str | None) -> Any:
        return iter([{"custom_id": custom_id} for custom_id in ids])

    merged = in_input_order("abcdef", results("a", "c", "f"), results("b", None, "d", "e"))
    assert [each["custom_id"] for each in merged] == ["a", "b", None, "c", "d", "e", "f"]
    # without the input, nothing is lost
    merged = in_input_order([], results("a", "c"), results("b"))
    assert [each["custom_id"] for each in merged] == ["a", "c", "b"]


def test_lines_keep_their_places(tmp_path: Path) -> None:
    source, target = tmp_path / "a.txt", io.StringIO()
    source.write_text("\none\n\n\ntwo\n")
    write_lines(source, target, Defaults("m"))
    numbers = [n for n, text in enumerate(target.getvalue().split("\n"), 1) if text]
    assert numbers == [2, 5]


def test_odd_content_is_no_crash(tmp_path: Path) -> None:
    long = "word " * 100_000
    _, (row,) = lines(tmp_path, "long.csv", f"prompt\n{long}\n")
    assert row["body"]["messages"][0]["content"] == long
    _, (lone,) = lines(tmp_path, "lone.jsonl", '"a\\ud800"\n')
    assert lone["body"]["messages"][0]["content"] == "a\ud800"
    (tmp_path / "latin.txt").write_bytes(b"one\ntw\xf6\n")
    with pytest.raises(UsageError, match=r"latin.txt, line 2: not UTF-8"):
        write_lines(tmp_path / "latin.txt", io.StringIO(), Defaults("m"))
    with pytest.raises(UsageError, match=r"deep.jsonl, line 1: not JSON"):
        lines(tmp_path, "deep.jsonl", "[" * 100_000 + "\n")
