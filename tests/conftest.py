"""Real PostgreSQL and Valkey for every test that asks: one server of each per session.

Every test that takes `database_url` gets a database of its own, cloned from a migrated template.
"""

import os
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer

from db.database import Database
from db.migrate import upgrade
from tests.support.scale import Scale
from tests.support.servers import PostgresServer, ValkeyServer
from tests.support.spread import SharedEngineScheduling, keep_to_own_cores


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="inject every fault as often as `make test-faults` does"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let SIGINT through to the processes that tests start, and keep workers apart.

    A shell ignores it in its background jobs, and a program inherits that: under `make test &` no
    process of ours could be interrupted.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_to_own_cores(config)  # PyTorch, which tests import, counts them once


@pytest.hookimpl(optionalhook=True)  # unknown with `-p no:xdist`
def pytest_xdist_make_scheduler(
    config: pytest.Config, log: Producer
) -> SharedEngineScheduling | None:
    """Let `--dist loadfile` know of the engine that files share."""
    by_file = config.getoption("dist") == "loadfile"
    return SharedEngineScheduling(config, log) if by_file else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests only where there is no GPU."""
    if Path("/dev/nvidia0").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    """How often to inject a fault: quick in CI, with `--full` as often as promised."""
    return Scale(full=bool(request.config.getoption("--full")))


@pytest.fixture(autouse=True, scope="session")
def _no_outside_settings() -> None:
    """Tests set what they need: a developer's own LORRY_ variables must not reach them."""
    for name in [n for n in os.environ if n.startswith("LORRY_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def servers_folder() -> Iterator[Path]:
    # short: a Unix socket's path has at most 107 bytes
    with tempfile.TemporaryDirectory(prefix="lorry-t-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def postgres(servers_folder: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL server for the session."""
    with PostgresServer(servers_folder / "pg") as server:
        yield server


@pytest.fixture(scope="session")
def valkey(servers_folder: Path) -> Iterator[ValkeyServer]:
    """A Valkey server for the session."""
    with ValkeyServer(servers_folder / "vk") as server:
        yield server


@pytest.fixture(scope="session")
def template(postgres: PostgresServer) -> str:
    """The name of a migrated database to clone."""
    postgres.create_database("lorry_template")
    upgrade(postgres.url("lorry_template"))
    return "lorry_template"


@pytest.fixture
def empty_database_url(postgres: PostgresServer) -> Iterator[str]:
    """A database without any schema."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    postgres.create_database(name)
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture
def database_url(postgres: PostgresServer, template: str) -> Iterator[str]:
    """A fresh migrated database."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    postgres.create_database(name, template)
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The fresh database, opened."""
    async with Database.connect(database_url) as opened:
        yield opened


@pytest.fixture
def broker_url(valkey: ValkeyServer) -> str:
    """The session's broker, emptied."""
    valkey.flush()
    return valkey.url
