"""The simulated engine keeps the contract that the drain relies on."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from core.errors import UsageError
from tests.engine.contract import Answers, EngineContract, FoldContract, request
from workers.engine.protocol import Engine, EngineDead, EngineLimits, FoldRefused, LocalAdapter
from workers.engine.simulated import SimulatedEngine
from workers.engine.simulated_clock import StepClock


@pytest_asyncio.fixture
async def simulated() -> AsyncIterator[SimulatedEngine]:
    engine = SimulatedEngine.from_flags("sim", [])
    await engine.start()
    yield engine
    await engine.close()


class TestSimulatedEngine(EngineContract):
    @pytest.fixture
    def engine(self, simulated: SimulatedEngine) -> Engine:
        return simulated

    @pytest.fixture
    def fresh_engine(self, simulated: SimulatedEngine) -> Engine:
        return simulated

    async def test_it_says_that_it_is_simulated(self, engine: Engine) -> None:
        assert engine.info.name == "simulated"

    async def test_death_aborts_what_runs(self, simulated: SimulatedEngine) -> None:
        answers = Answers()
        simulated.submit([request({"prompt": "a", "max_tokens": 500})], answers.done)
        simulated.die("of a test")
        assert await simulated.wait_dead() == "of a test"
        assert set(answers.calls.values()) == {1}
        with pytest.raises(EngineDead):
            await simulated.load_adapter(LocalAdapter(1, "1-a", "/", "a"))


class TestSimulatedFold(FoldContract):
    @pytest_asyncio.fixture
    async def folding(self) -> AsyncIterator[SimulatedEngine]:
        engine = SimulatedEngine.from_flags("sim", ["--sim-fold-ms", "2"], fold=True)
        await engine.start()
        yield engine
        await engine.close()

    async def test_a_folded_step_takes_less_time(
        self, folding: SimulatedEngine, adapters: list[LocalAdapter]
    ) -> None:
        await folding.load_adapter(adapters[0])
        as_lora = folding.step_seconds
        await folding.fold(adapters[0].lora_int_id)
        assert folding.step_seconds == pytest.approx(0.75 * as_lora)
        await folding.fold(None)
        assert folding.step_seconds == as_lora

    async def test_a_step_with_a_wrong_adapter_is_its_end(
        self, folding: SimulatedEngine, adapters: list[LocalAdapter]
    ) -> None:
        for adapter in adapters[:2]:
            await folding.load_adapter(adapter)
        answers = Answers()
        body = {"prompt": "a", "max_tokens": 40}
        folding.submit([request(body, adapter=adapters[1])], answers.done)
        folding.folded = adapters[0].lora_int_id  # as if something had gone wrong
        assert "others computed" in await folding.wait_dead()
        await answers.wait(1)

    async def test_a_fold_that_fails_half_way_is_its_end(
        self, adapters: list[LocalAdapter]
    ) -> None:
        fails = str(adapters[0].lora_int_id)
        engine = SimulatedEngine.from_flags("sim", ["--sim-fold-fails", fails], fold=True)
        await engine.start()
        await engine.load_adapter(adapters[0])
        with pytest.raises(EngineDead):
            await engine.fold(adapters[0].lora_int_id)
        assert "half-way" in await engine.wait_dead()

    async def test_it_does_not_fold_unless_told_so(self, simulated: SimulatedEngine) -> None:
        assert simulated.info.fold_refusal
        with pytest.raises(FoldRefused, match="off"):
            await simulated.fold(1)


def test_a_flag_it_does_not_take_is_refused() -> None:
    with pytest.raises(UsageError, match="--tensor-parallel-size"):
        SimulatedEngine.from_flags("sim", ["--tensor-parallel-size", "2"])


class Time:
    """A time that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_step_takes_longer_the_more_sequences_compute() -> None:
    time = Time()
    clock = StepClock(0.008, 0.001, time)
    clock.computing = 2
    time.now += 1.0
    assert clock.advance() == pytest.approx(100)
    clock.computing = 42
    time.now += 1.0
    assert clock.advance() == pytest.approx(120)
    assert clock.seconds_until(140) == pytest.approx(1.0)


def test_no_step_is_made_while_an_adapter_is_loaded() -> None:
    time = Time()
    clock = StepClock(0.01, now=time)
    clock.computing = 1
    clock.pause(0.5)
    assert clock.seconds_until(10) == pytest.approx(0.6)
    time.now += 0.3
    assert clock.advance() == 0
    time.now += 0.3
    assert clock.advance() == pytest.approx(10)


def test_an_idle_engine_makes_no_steps() -> None:
    time = Time()
    clock = StepClock(0.01, now=time)
    time.now += 60
    assert clock.advance() == 0


class Loads(StepClock):
    """Counts the pauses for loads."""

    count = 0

    def pause(self, seconds: float) -> None:
        self.count += 1
        super().pause(seconds)


async def test_only_an_adapter_that_is_not_resident_costs_a_load() -> None:
    """The slots are the engine's: the least recently used adapter leaves for another."""
    loads = Loads(0.001)
    limits = EngineLimits(max_model_len=100, max_num_seqs=2, max_loras=2, max_lora_rank=8)
    engine = SimulatedEngine("sim", limits, clock=loads, load_seconds=0.001)
    await engine.start()
    for number in (1, 2, 1, 3, 1, 2):
        await engine.load_adapter(LocalAdapter(number, f"{number}-a", "/", "a"))
    await engine.close()
    assert loads.count == 4  # 1, 2, 3 in place of 2, and 2 in place of 3
