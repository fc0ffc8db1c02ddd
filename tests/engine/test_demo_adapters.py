"""The demo's adapters on the real engine: each does its task, alone and beside the others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import cli.demo
from cli.demo.base import DEMO_BASE
from cli.demo.prompts import DEMO_PROMPTS, DemoPrompt, looks_like
from core.generation import Completion
from tests.engine.contract import ask, chat, request
from tests.support.scale import Scale
from workers.engine.protocol import Engine, EngineRequest, LocalAdapter

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

FOLDER = Path(cli.demo.__file__).parent / "adapters"
NAMES = ("sql", "pirate", "json")


@pytest_asyncio.fixture(scope="session")
async def demo_adapters(vllm_engine: Engine) -> dict[str, LocalAdapter]:
    """The three adapters, resident."""
    adapters = {
        name: LocalAdapter(100 + number, f"{100 + number}-{name}", str(FOLDER / name), name)
        for number, name in enumerate(NAMES)
    }
    for adapter in adapters.values():
        await vllm_engine.load_adapter(adapter)
    return adapters


def _greedy(prompt: DemoPrompt, adapter: LocalAdapter | None) -> EngineRequest:
    body = chat(prompt.prompt, temperature=0, max_tokens=prompt.max_tokens)
    return request(body, adapter=adapter)


def _text(outcome: Any) -> str:
    assert isinstance(outcome, Completion), outcome
    return outcome.choices[0].text


async def test_each_adapter_does_its_task_and_the_base_does_not(
    vllm_engine: Engine, demo_adapters: dict[str, LocalAdapter], scale: Scale
) -> None:
    """Half of the demo's prompts by default: `make demo` looks at all of them."""
    asked = [prompt for prompt in DEMO_PROMPTS if prompt.model != DEMO_BASE][:: scale(2, 1)]
    by_adapter = await ask(vllm_engine, [_greedy(p, demo_adapters[p.model]) for p in asked])
    by_base = await ask(vllm_engine, [_greedy(p, None) for p in asked])
    for prompt, adapted, plain in zip(asked, by_adapter, by_base, strict=True):
        assert looks_like(prompt.model, _text(adapted)), (prompt, _text(adapted))
        assert _text(adapted) != _text(plain)
    base_right = sum(looks_like(p.model, _text(o)) for p, o in zip(asked, by_base, strict=True))
    assert base_right <= len(asked) // 4


async def test_adapters_at_once_answer_as_each_alone(
    vllm_engine: Engine, demo_adapters: dict[str, LocalAdapter], scale: Scale
) -> None:
    some = [
        prompt
        for name in ("sql", "pirate")
        for prompt in [each for each in DEMO_PROMPTS if each.model == name][: scale(1, 2)]
    ]
    if not scale.full:
        some = [replace(prompt, max_tokens=16) for prompt in some]
    pairs = [(p, adapter) for p in some for adapter in (None, *demo_adapters.values())]
    alone = [_text((await ask(vllm_engine, [_greedy(*pair)]))[0]) for pair in pairs]
    together = [_text(o) for o in await ask(vllm_engine, [_greedy(*pair) for pair in pairs])]
    assert together == alone
