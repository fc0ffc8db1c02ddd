"""From a request's messages or prompt to the token ids that the engine runs on."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.generation import GenerationRequest
from core.request_body import RESERVED_TEMPLATE_KWARGS

_LOOP_OVER_PARTS = re.compile(r"""\bin\s+message(\.content|\[['"]content['"]\])""")


class PromptRenderer:
    """Renders like `vllm serve`. Not safe for several threads at once.

    Args:
        tokenizer: the base model's, or None where vLLM was told to do without one.
        chat_template: the operator's, in place of the tokenizer's own.
        vocab_size: token ids beyond it would take the engine down.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._vocab_size = vocab_size

    def token_ids(self, request: GenerationRequest, adapter_template: str | None) -> list[int]:
        """The prompt's tokens.

        Args:
            request: the job's endpoint and body.
            adapter_template: the chat template that came with the adapter, if any.

        Raises:
            ValueError: the request cannot be rendered; the message is for the user.
        """
        if request.endpoint == "chat":
            return self._chat(request.body, adapter_template or self._chat_template)
        prompt = request.body["prompt"]
        if isinstance(prompt, str):
            return list(self._need_tokenizer("a text prompt").encode(prompt))
        return self._checked(prompt)

    def _chat(self, body: Mapping[str, Any], template: str | None) -> list[int]:
        tokenizer = self._need_tokenizer("messages")
        source = template or _own_template(tokenizer)
        extra = dict(body.get("chat_template_kwargs") or {})
        if taken := sorted(RESERVED_TEMPLATE_KWARGS & extra.keys()):
            raise ValueError(f"chat_template_kwargs: {', '.join(taken)} cannot be set there")
        conversation = _conversation(body["messages"], source)
        try:
            rendered = tokenizer.apply_chat_template(
                conversation,
                chat_template=template,
                tokenize=True,
                return_dict=False,
                **{"add_generation_prompt": True, **extra},
            )
        except Exception as error:  # a template may raise anything, also on purpose
            if source is None:
                raise ValueError(
                    "the model has no chat template: send `prompt` instead of `messages`, or "
                    "start the worker with --chat-template"
                ) from error
            raise ValueError(f"the chat template refused the messages: {error}") from error
        return list(rendered)

    def _need_tokenizer(self, what: str) -> Any:
        if self._tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer, and the worker runs with --skip-tokenizer-init: send "
                "`prompt` as token ids"
            )
        return self._tokenizer

    def _checked(self, ids: Sequence[int]) -> list[int]:
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"prompt: token id {token} is outside the vocabulary (0 to "
                    f"{self._vocab_size - 1})"
                )
        return list(ids)


def adapter_chat_template(folder: Path) -> str | None:
    """The chat template that an adapter's folder carries, or None.

    Raises:
        ValueError: its tokenizer_config.json cannot be read.
    """
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"tokenizer_config.json is not JSON: {error}") from error
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several, each with a name
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next(
            (one.get("template") for one in named if one.get("name") == "default"), None
        )
    return template if isinstance(template, str) else None


def _own_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _conversation(messages: Sequence[Mapping[str, Any]], template: str | None) -> list[Any]:
    lists = template is not None and _wants_lists(template)
    talk = [{**message, "content": _content(message.get("content"), lists)} for message in messages]
    if template is None or '"developer"' in template or "'developer'" in template:
        return talk
    if not any(message["role"] == "developer" for message in talk):
        return talk
    for message in talk:
        if message["role"] == "developer":
            message["role"] = "system"
    return _one_system_message(talk, lists)


def _wants_lists(template: str) -> bool:
    """Whether a template can only loop over a message's parts (most take a plain text too)."""
    return bool(_LOOP_OVER_PARTS.search(template)) and "is string" not in template


def _content(content: str | Sequence[Mapping[str, Any]] | None, lists: bool) -> Any:
    parts = [content] if isinstance(content, str) else [_text(part) for part in content or ()]
    if lists:
        return [{"type": "text", "text": text} for text in parts]
    return "\n".join(parts)


def _text(part: Mapping[str, Any]) -> str:
    if part.get("type") != "text":
        raise ValueError(f"messages: content of type {part.get('type')!r} is not supported")
    return str(part["text"])


def _one_system_message(talk: list[Any], lists: bool) -> list[Any]:
    """Templates that know no developer often take a system message only at the start."""
    system = [message for message in talk if message["role"] == "system"]
    if len(system) == 1 and talk[0] is system[0]:
        return talk
    rest = [message for message in talk if message["role"] != "system"]
    texts = [message["content"] for message in system if message["content"]]
    merged = list(itertools.chain(*texts)) if lists else "\n\n".join(texts)
    return [{"role": "system", "content": merged}, *rest]
