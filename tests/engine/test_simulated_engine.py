"""The simulated engine keeps the contract that the drain relies on."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from core.errors import UsageError
from tests.engine.contract import Answers, EngineContract, request
from workers.engine.protocol import Engine, EngineDead, LocalAdapter
from workers.engine.simulated import SimulatedEngine


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


def test_a_flag_it_does_not_take_is_refused() -> None:
    with pytest.raises(UsageError, match="--tensor-parallel-size"):
        SimulatedEngine.from_flags("sim", ["--tensor-parallel-size", "2"])
