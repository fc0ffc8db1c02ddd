"""Kill -9 in each phase of a batch: it ends right, and once."""

import asyncio
import io
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import openai
import pytest
from openai.types import Batch

from db.database import Database
from tests.support.batches import Counts, jsonl, line, openai_client, results, settled, submit
from tests.support.deployment import Deployment, Process
from tests.support.jobs import BASE, make_bench
from tests.support.processes import until
from tests.support.scale import Scale
from tests.support.servers import in_thread
from tests.support.settled import assert_one_result_each
from tests.support.waiting import eventually

pytestmark = pytest.mark.processes

LINES = 12_000
#: Longer than the context: they fail.
BAD = 600


@pytest.fixture
def deployment(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Deployment]:
    async def prepare() -> None:
        async with Database.connect(database_url) as database:
            await make_bench(database, tmp_path, 4)

    in_thread(prepare)
    with Deployment(tmp_path, database_url, broker_url, LORRY_LEASE_SECONDS="3") as running:
        yield running


class Watch:
    """Looks at the counts every 100 ms, whatever is being killed, through the database."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._look()), daemon=True)
        self.rows: list[tuple[int, int, int]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    async def _look(self) -> None:
        async with Database.connect(self._url, max_size=1) as database:
            while not self._ended.is_set():
                async with database.connection() as connection:
                    row = await connection.fetchrow("SELECT total, completed, failed FROM batches")
                if row is not None:
                    self.rows.append(tuple(row.values()))
                await asyncio.sleep(0.1)

    def assert_true(self) -> None:
        for before, now in zip(self.rows, self.rows[1:], strict=False):
            assert now[1] + now[2] <= now[0]
            assert before[0] in (0, now[0])
            assert now[1] >= before[1]
            assert now[2] >= before[2]


def value(url: str, statement: str) -> Any:
    """What a statement finds, asked from synchronous code."""
    found: list[Any] = []

    async def run() -> None:
        async with Database.connect(url, max_size=1) as database:
            found.append(await database.fetch_value(statement))

    in_thread(run)
    return found[0]


def test_a_batch_survives_the_death_of_everything(
    deployment: Deployment, database_url: str
) -> None:
    api = deployment.start_api()
    steward = deployment.start_steward()
    client = openai_client(deployment)
    lines = [
        line(f"r{n}", f"a{n % 4}", "word " * (9000 if n % 20 == 0 else 2), max_tokens=8)
        for n in range(LINES)
    ]
    content = jsonl(lines)
    with Watch(database_url) as watch:
        batch = submit(client, content)

        _kill_when(steward, database_url, "SELECT EXISTS (SELECT FROM batch_lines)")
        assert value(database_url, "SELECT count(*) FROM jobs") == 0
        steward = deployment.start_steward()
        worker = deployment.start_worker(BASE, "--sim-step-ms=2")

        _kill_when(worker, database_url, "SELECT completed > 500 FROM batches")
        deployment.start_worker(BASE, "--sim-step-ms=1")
        _kill_when(api, database_url, "SELECT completed > 3000 FROM batches")
        _kill_when(
            steward, database_url, "SELECT EXISTS (SELECT FROM files WHERE purpose <> 'batch')"
        )
        assert value(database_url, "SELECT status FROM batches") == "finalizing"
        deployment.start_api()
        deployment.start_steward()
        done = settled(client, batch, each=Counts())
    watch.assert_true()
    assert done.status == "completed"
    counts = done.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (LINES, LINES - BAD, BAD)
    answers, errors = results(client, done.output_file_id), results(client, done.error_file_id)
    assert len(answers) == LINES - BAD
    assert len(errors) == BAD
    assert set(answers) | set(errors) == {each["custom_id"] for each in lines}
    # what the killed one had begun to write is nobody's, and is swept
    assert len(client.files.list(purpose="batch_output").data) == 2
    _forget_writers(database_url)
    until(
        lambda: value(database_url, "SELECT count(*) = 0 FROM files WHERE state = 'writing'"),
        20,
        "the sweep",
    )
    until(lambda: len(_stored(deployment)) == 3, 20, f"{_stored(deployment)}")


#: When a phase is under way.
PHASES = {
    "upload": "SELECT EXISTS (SELECT FROM files WHERE state = 'writing')",
    "validation": "SELECT EXISTS (SELECT FROM batch_lines)",
    "running": "SELECT completed > 300 FROM batches",
    "finalising": "SELECT EXISTS (SELECT FROM files WHERE purpose <> 'batch')",
}
#: An upload is held behind these bytes, with which its file has begun to be written.
HELD = 2 * 1024 * 1024
#: What the tests above do not meet already.
QUICK = {("api", "validation"), ("steward", "running"), ("worker", "finalising")}
ROUNDS = 3


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", ["api", "steward", "worker"])
@pytest.mark.timeout(600)
def test_whoever_is_killed_in_whatever_phase_the_batch_ends_right_and_once(
    deployment: Deployment, database_url: str, scale: Scale, victim: str, phase: str
) -> None:
    """Every process in every phase with `--full`, thrice, at moments that differ."""
    rounds = scale(int((victim, phase) in QUICK), ROUNDS)
    if not rounds:
        pytest.skip("with --full")
    starts: dict[str, Callable[[], Process]] = {
        "api": deployment.start_api,
        "steward": deployment.start_steward,
        "worker": lambda: deployment.start_worker(BASE, "--sim-step-ms=1"),
    }
    alive = {name: start() for name, start in starts.items()}
    client = openai_client(deployment)
    lines = [
        line(f"r{n}", f"a{n % 4}", "word " * (9000 if n % 20 == 0 else 2)) for n in range(4000)
    ]
    content = jsonl(lines)
    chance = random.Random(f"{victim} {phase}")
    for number in range(rounds):
        upload = phase == "upload"
        submitting = _Submission(client, content, chance.randrange(HELD, len(content)))
        if not upload:
            submitting.go_on()
        with Watch(database_url) as watch:
            submitting.start()
            # an upload stands wherever it is held; the others go on for a bit before the kill
            later = 0 if upload else chance.random() * 0.2 * number
            _kill_when(alive[victim], database_url, PHASES[phase], later)
            submitting.go_on()
            alive[victim] = starts[victim]()
            # a client whose request was cut off sends it again
            batch = submitting.result() or submit(client, content)
            done = settled(client, batch, each=Counts())
        watch.assert_true()
        assert done.status == "completed", done
        counts = done.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (4000, 3800, 200)
        answers, errors = results(client, done.output_file_id), results(client, done.error_file_id)
        assert (len(answers), len(errors)) == (3800, 200)
        assert set(answers) | set(errors) == {each["custom_id"] for each in lines}
        assert value(database_url, "SELECT count(*) FROM batches") == 1
        _assert_once(database_url)
        _forget_writers(database_url)
        until(lambda: len(_stored(deployment)) == 3, 30, "the sweep of what was cut off")
        _clear(database_url)


def test_counts_hold_through_failures_a_kill_and_a_cancellation(
    deployment: Deployment, database_url: str
) -> None:
    deployment.start_api()
    deployment.start_steward()
    worker = deployment.start_worker(BASE, "--sim-step-ms=2")
    client = openai_client(deployment)
    lines = [
        line(f"r{n}", f"a{n % 4}", "word " * (9000 if n % 20 == 0 else 2), max_tokens=8)
        for n in range(LINES)
    ]
    seen = Counts()
    with Watch(database_url) as watch:
        batch = submit(client, jsonl(lines))
        looks = threading.Thread(
            target=lambda: settled(client, batch, each=seen, pause=0.1), daemon=True
        )
        looks.start()
        _kill_when(worker, database_url, "SELECT completed > 500 FROM batches")
        deployment.start_worker(BASE, "--sim-step-ms=2")
        _wait_for(database_url, "SELECT completed > 2500 FROM batches")
        client.batches.cancel(batch.id)
        done = settled(client, batch)
        looks.join(30)
    watch.assert_true()
    assert done.status == "cancelled"
    # every 100 ms, by the API and in the database
    assert len(seen.seen) >= 10
    assert len({row[1:] for row in watch.rows}) >= 5
    counts = done.request_counts
    assert counts is not None
    assert counts.total == LINES == counts.completed + counts.failed
    assert seen.seen[-1] == (counts.total, counts.completed, counts.failed)
    answers, errors = results(client, done.output_file_id), results(client, done.error_file_id)
    assert (len(answers), len(errors)) == (counts.completed, counts.failed)
    assert set(answers) | set(errors) == {each["custom_id"] for each in lines}
    codes = Counter(each["error"]["code"] for each in errors.values())
    assert set(codes) == {"context_length_exceeded", "batch_cancelled"}
    _assert_once(database_url)


def test_an_upload_cut_off_by_a_kill_leaves_nothing(
    deployment: Deployment, database_url: str
) -> None:
    api = deployment.start_api()
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b"Content-Length: 90000000\r\n\r\n--b\r\n"
        b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", deployment.port)) as sender:
        sender.sendall(head + b"x" * 8_000_000)
        until(lambda: _stored(deployment), 20, "the first bytes in the store")
        api.kill()
    assert _stored(deployment)
    deployment.start_api()
    client = openai_client(deployment)
    assert client.files.list().data == []
    _forget_writers(database_url)
    deployment.start_steward()
    until(lambda: not _stored(deployment), 20, "the sweep")


def test_an_upload_cut_off_by_its_client_leaves_nothing(
    deployment: Deployment, database_url: str
) -> None:
    deployment.start_api()
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b"Content-Length: 90000000\r\n\r\n--b\r\n"
        b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", deployment.port)) as sender:
        sender.sendall(head + b"x" * 8_000_000)
        until(lambda: _stored(deployment), 20, "the first bytes in the store")
    until(lambda: not _stored(deployment), 20, "the clearing")
    until(lambda: value(database_url, "SELECT count(*) = 0 FROM files"), 20, "no row")


class _Submission(threading.Thread):
    """An upload that stops half-way until it is let go on, and the batch of it."""

    def __init__(self, client: openai.OpenAI, content: bytes, stops_at: int) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._file = _Held(content, stops_at)
        self._batch: Batch | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._batch = submit(self._client, self._file)
        except openai.APIConnectionError:
            return
        except BaseException as error:
            self._error = error

    def go_on(self) -> None:
        """Send the rest."""
        self._file.released.set()

    def result(self) -> Batch | None:
        """The batch; None where the connection was cut."""
        self.join(60)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._batch


class _Held(io.BytesIO):
    """A file whose bytes from `stops_at` on are read once it is released."""

    def __init__(self, content: bytes, stops_at: int) -> None:
        super().__init__(content)
        self._stops_at = stops_at
        self.released = threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self._stops_at and not self.released.wait(60):
            raise TimeoutError("nobody let the upload go on")
        return super().read(size)


def _kill_when(process: Process, url: str, condition: str, later: float = 0) -> None:
    """At the moment when the database says so, or a bit later: some phases are short."""

    async def run() -> None:
        async with Database.connect(url, max_size=1) as database:

            async def holds() -> bool:
                return bool(await database.fetch_value(condition))

            await eventually(holds, condition, 60)
            await asyncio.sleep(later)
            process.popen.kill()

    in_thread(run)
    process.kill()


def _wait_for(url: str, condition: str) -> None:
    until(lambda: value(url, condition), 60, condition)


def _assert_once(url: str) -> None:
    """Each job of the batch is final, with one result."""

    async def run() -> None:
        async with Database.connect(url, max_size=1) as database:
            await assert_one_result_each(database)

    in_thread(run)


def _clear(url: str) -> None:
    """Forget the batch of this round; its files expire."""

    async def run() -> None:
        async with Database.connect(url, max_size=1) as database, database.connection() as c:
            tables = "batches, batch_lines, batch_steps, jobs, job_inputs, job_outputs"
            await c.execute(f"TRUNCATE {tables}, waiting_adapters")
            await c.execute("UPDATE files SET expires_at = now() WHERE state = 'ready'")

    in_thread(run)


def _forget_writers(url: str) -> None:
    async def run() -> None:
        async with Database.connect(url, max_size=1) as database, database.connection() as c:
            await c.execute(
                "UPDATE files SET touched_at = now() - interval '1 hour' WHERE state = 'writing'"
            )

    in_thread(run)


def _stored(deployment: Deployment) -> list[Path]:
    with suppress(FileNotFoundError):
        return [p for p in (deployment.folder / "store" / "files").rglob("*") if p.is_file()]
    return []
