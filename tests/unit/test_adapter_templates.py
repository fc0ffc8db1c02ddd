"""The chat template that comes with an adapter: found, or passed over; never the worker's end."""

import json
from pathlib import Path
from typing import Any

import pytest

from workers.engine.vllm_render import adapter_chat_template

_NAMED = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]


@pytest.mark.parametrize(
    ("said", "found"),
    [("one", "one"), (_NAMED, "d"), (_NAMED[:1], None), (None, None), (3, None), (["one"], None)],
)
def test_the_template_of_a_tokenizer_config(said: Any, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
    assert adapter_chat_template(tmp_path) == found


def test_a_byte_order_mark_is_read_as_at_the_upload(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(b'\xef\xbb\xbf{"chat_template": "one"}')
    assert adapter_chat_template(tmp_path) == "one"
