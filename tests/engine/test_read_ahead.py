"""Adapters read ahead by the real engine: their load needs the files no more, and says no other."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import write_adapter
from tests.engine.contract import complete
from tests.support.waiting import eventually
from workers.engine.protocol import AdapterLoadError, Engine, LocalAdapter

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

_BODY = {"prompt": "The meaning of", "temperature": 0, "max_tokens": 8}


def weights_of(adapter: LocalAdapter) -> Path:
    return Path(adapter.path, "adapter_model.safetensors")


def lose(adapter: LocalAdapter) -> None:
    weights_of(adapter).unlink()


def spoil(adapter: LocalAdapter) -> Callable[[], None]:
    """Break an adapter's weights; returns what mends them."""
    good = weights_of(adapter).read_bytes()
    weights_of(adapter).write_bytes(b"not weights")

    def mend() -> None:
        weights_of(adapter).write_bytes(good)

    return mend


def stall(adapter: LocalAdapter, *, for_good: bool = False) -> Callable[[], None]:
    """Make an adapter's configuration a pipe, which is read once somebody writes to it; returns
    what writes to it, and leaves a file there for who reads it again, or nothing to be read."""
    config = Path(adapter.path, "adapter_config.json")
    text = config.read_text()
    whole = config.rename(config.with_suffix(".whole"))
    os.mkfifo(config)

    def go_on() -> None:
        with config.open("w") as pipe:
            if not for_good:
                whole.replace(config)
            pipe.write(text)

    return go_on


async def read(engine: Engine, *adapters: LocalAdapter) -> None:
    """Have adapters read ahead, and wait until they are."""
    engine.read_ahead(adapters)
    calls: Any = engine._calls.adapters  # type: ignore[attr-defined]

    async def done() -> bool:
        found = await calls.read_ahead(adapters)
        return set(found) == {adapter.lora_int_id for adapter in adapters}

    await eventually(done, "read")


async def test_a_load_takes_what_was_read_ahead(vllm_engine: Engine, tmp_path: Path) -> None:
    usual = write_adapter(tmp_path / "usual", 801)
    await vllm_engine.load_adapter(usual)
    expected = await complete(vllm_engine, _BODY, usual)
    ahead = LocalAdapter(802, "802-ahead", usual.path, "ahead")
    await read(vllm_engine, ahead)
    lose(usual)
    await vllm_engine.load_adapter(ahead)
    assert (await complete(vllm_engine, _BODY, ahead)).choices == expected.choices
    for adapter in (usual, ahead):
        await vllm_engine.remove_adapter(adapter.lora_int_id)
    with pytest.raises(AdapterLoadError):  # it was taken, not kept
        await vllm_engine.load_adapter(ahead)


async def test_what_is_wanted_no_more_is_forgotten(vllm_engine: Engine, tmp_path: Path) -> None:
    first, second = (write_adapter(tmp_path / str(i), i) for i in (811, 812))
    await read(vllm_engine, first)
    await read(vllm_engine, second)
    lose(first)
    with pytest.raises(AdapterLoadError):
        await vllm_engine.load_adapter(first)
    vllm_engine.read_ahead([])


async def test_what_cannot_be_read_ahead_is_left_to_its_load(
    vllm_engine: Engine, tmp_path: Path
) -> None:
    gone = LocalAdapter(821, "821-gone", str(tmp_path / "gone"), "gone")
    broken, whole = (write_adapter(tmp_path / str(i), i) for i in (822, 823))
    mend = spoil(broken)
    calls: Any = vllm_engine._calls.adapters  # type: ignore[attr-defined]

    async def last_is_read() -> bool:  # they are read in this order
        found: list[int] = await calls.read_ahead([gone, broken, whole])
        return found == [823]

    await eventually(last_is_read, "the last one read")
    for adapter in (gone, broken):
        with pytest.raises(AdapterLoadError):
            await vllm_engine.load_adapter(adapter)
    mend()
    for adapter in (broken, whole):
        await vllm_engine.load_adapter(adapter)
        await complete(vllm_engine, _BODY, adapter)
        await vllm_engine.remove_adapter(adapter.lora_int_id)


async def test_a_load_right_behind_the_call_is_right(vllm_engine: Engine, tmp_path: Path) -> None:
    """Read, being read or not begun: each load brings its own adapter."""
    several = [write_adapter(tmp_path / str(i), i) for i in range(831, 835)]
    for _ in range(3):
        vllm_engine.read_ahead(several)
        answers = []
        for adapter in several:
            await vllm_engine.load_adapter(adapter)
            answers.append((await complete(vllm_engine, _BODY, adapter)).choices)
        for adapter in several:
            await vllm_engine.remove_adapter(adapter.lora_int_id)
        vllm_engine.read_ahead([])
        alone = []
        for adapter in several:
            await vllm_engine.load_adapter(adapter)
            alone.append((await complete(vllm_engine, _BODY, adapter)).choices)
            await vllm_engine.remove_adapter(adapter.lora_int_id)
        assert answers == alone


async def test_an_adapter_comes_back_from_the_engines_memory(
    vllm_engine: Engine, tmp_path: Path
) -> None:
    slots = vllm_engine.info.limits.max_loras
    several = [write_adapter(tmp_path / str(i), i) for i in range(851, 852 + slots)]
    first, last = several[0], several[-1]
    await vllm_engine.load_adapter(first)
    expected = await complete(vllm_engine, _BODY, first)
    for adapter in several[1:]:  # they take every slot
        await vllm_engine.load_adapter(adapter)
    other = await complete(vllm_engine, _BODY, last)
    assert other.choices != expected.choices
    lose(first)
    await read(vllm_engine, first)
    await vllm_engine.load_adapter(first)
    assert (await complete(vllm_engine, _BODY, first)).choices == expected.choices
    assert (await complete(vllm_engine, _BODY, last)).choices == other.choices
    for adapter in several:
        await vllm_engine.remove_adapter(adapter.lora_int_id)


async def test_what_computes_goes_on_while_an_adapter_is_read(
    vllm_engine: Engine, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    slow = write_adapter(tmp_path / "slow", 841)
    go_on = stall(slow)
    calls: Any = vllm_engine._calls.adapters  # type: ignore[attr-defined]
    request = LoRARequest(slow.lora_name, slow.lora_int_id, slow.path)
    loading = asyncio.create_task(calls._added(request, busy=True))
    assert (await complete(vllm_engine, _BODY)).choices
    assert not loading.done()
    await asyncio.to_thread(go_on)
    assert await loading
    await calls.remove(slow.lora_int_id)


async def test_a_file_that_hangs_holds_up_no_other_adapter(
    vllm_engine: Engine, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    hangs, fine = (write_adapter(tmp_path / str(i), i) for i in (861, 862))
    go_on = stall(hangs)
    calls: Any = vllm_engine._calls.adapters  # type: ignore[attr-defined]
    request = LoRARequest(hangs.lora_name, hangs.lora_int_id, hangs.path)
    hanging = asyncio.create_task(calls._added(request, busy=True))
    await vllm_engine.load_adapter(fine)  # the call before it has reached the reader
    await vllm_engine.remove_adapter(fine.lora_int_id)
    again = LoRARequest(fine.lora_name, fine.lora_int_id, fine.path)
    assert await calls._added(again, busy=True)
    assert not hanging.done()
    await asyncio.to_thread(go_on)
    assert await hanging
    for adapter in (hangs, fine):
        await calls.remove(adapter.lora_int_id)


async def test_the_second_of_a_kind_is_not_read_vllms_way(
    vllm_engine: Engine, tmp_path: Path
) -> None:
    """Which would read the configuration a second time, and find nothing more in the pipe."""
    from vllm.lora.request import LoRARequest

    first, second = (write_adapter(tmp_path / str(i), i) for i in (871, 872))
    await vllm_engine.load_adapter(first)
    go_on = stall(second, for_good=True)
    calls: Any = vllm_engine._calls.adapters  # type: ignore[attr-defined]
    request = LoRARequest(second.lora_name, second.lora_int_id, second.path)
    loading = asyncio.create_task(calls._added(request, busy=True))
    await asyncio.to_thread(go_on)
    try:
        assert await asyncio.wait_for(loading, 60)
    finally:
        let_go(second)
    for adapter in (first, second):
        await calls.remove(adapter.lora_int_id)


def let_go(adapter: LocalAdapter) -> None:
    """Whoever still waits for something to be read from a pipe finds its end."""
    with contextlib.suppress(OSError):  # nobody does
        os.close(os.open(Path(adapter.path, "adapter_config.json"), os.O_WRONLY | os.O_NONBLOCK))
