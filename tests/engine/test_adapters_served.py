"""Adapters through the whole stack on the real engine: `lorry up`, the CLI, `POST /v1/jobs`.

One stack for all tests of this file, with four slots and ranks up to 64.
"""

import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cli.client import Client, Refused
from cli.demo.base import DEMO_BASE
from cli.demo.prompts import DEMO_PROMPTS
from cli.demo.train import read_examples
from cli.pack import packed
from tests.engine.test_demo_adapters import FOLDER, NAMES
from tests.engine.test_peft_parity import Peft
from tests.support.adapters import ATTENTION, Draft
from tests.support.bad_adapters import BAD
from tests.support.bad_archives import BAD_ARCHIVES, BAD_PICKLES
from tests.support.deployment import _free_port
from tests.support.good_adapters import GOOD
from tests.support.processes import REPOSITORY, LorryUp, environment, lorry, until
from tests.support.scale import Scale

pytestmark = [pytest.mark.vllm, pytest.mark.processes, pytest.mark.timeout(900)]

SLOTS, RANK = 4, 64
_FLAGS = ("--max-loras", str(SLOTS), "--max-lora-rank", str(RANK), "--max-model-len", "512")
_ASKED: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
_QUESTION = [{"role": "user", "content": "Name three fruits."}]
_PARITY_TOKENS = 20


@dataclass(frozen=True)
class Served:
    """A stack on the real engine."""

    up: LorryUp
    metrics_port: int
    http: httpx2.Client
    client: Client

    def add(self, name: str, source: Path) -> dict[str, Any]:
        """Add an adapter as the command line does, and wait until it is ready."""
        with packed(str(source)) as archive, archive.open("rb") as content:
            self.client.upload("/v1/adapters", archive.name, content, {"name": name})
        return self.ready(name)

    def ready(self, name: str) -> dict[str, Any]:
        """The newest version of an adapter, once it is ready."""

        def newest() -> dict[str, Any] | None:
            version: dict[str, Any] = self.client.get(f"/v1/adapters/{name}")["newest"]
            assert version["state"] != "rejected", version["findings"]
            return version if version["state"] == "ready" else None

        return until(newest, 120, f"{name} is ready")

    def submit(self, model: str, **fields: Any) -> dict[str, Any]:
        response = self.http.post("/v1/jobs", json={**_ASKED, "model": model, **fields})
        assert response.status_code == 202, response.text
        job: dict[str, Any] = response.json()
        return job

    def response(self, job: dict[str, Any]) -> dict[str, Any]:
        """A job's first choice, once it has succeeded."""

        def final() -> dict[str, Any] | None:
            found: dict[str, Any] = self.client.get(f"/v1/jobs/{job['id']}", wait=30)
            return found if found["finished_at"] is not None else None

        found = until(final, 300, f"{job['id']} ends")
        assert found["state"] == "succeeded", found
        choice: dict[str, Any] = found["response"]["choices"][0]
        return choice

    def ask(self, model: str, **fields: Any) -> str:
        """An answer, with nothing else in the engine."""
        text: str = self.response(self.submit(model, **fields))["text"]
        return text

    def chat(self, model: str) -> str:
        """The answer to a question, likewise: every good adapter gives one of its own."""
        body = {"model": model, "messages": _QUESTION, "max_tokens": 8, "temperature": 0}
        response = self.http.post("/v1/jobs", json=body)
        text: str = self.response(response.json())["message"]["content"]
        return text

    def metric(self, name: str) -> float:
        text = httpx2.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        found = re.search(rf"^{name}(?:\{{[^}}]*\}})? ([\d.e+]+)", text, re.MULTILINE)
        assert found, name
        return float(found.group(1))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    folder.chmod(0o755)
    port = _free_port()
    settings = {
        "LORRY_METRICS_PORT": str(port),
        "LORRY_CACHE_DIR": str(folder / "cache"),
        "LORRY_QUANTUM_SECONDS": "1",
        "LORRY_POLL_SECONDS": "0.2",  # a probe is looked for so often
    }
    arguments = (str(base_model), "--served-model-name", DEMO_BASE, *_FLAGS)
    with LorryUp(folder / "data", *arguments, **settings) as up:
        up.wait_ready(240)
        with httpx2.Client(base_url=up.url, timeout=60) as http, Client(up.url) as client:
            yield Served(up, port, http, client)


def test_every_bad_adapter_is_refused_and_the_worker_lives(
    served: Served, tmp_path: Path, scale: Scale
) -> None:
    """Every sixth by default; test_adapter_admission.py and test_adapter_archives.py have all."""
    before = served.ask(DEMO_BASE)
    known = {job["id"] for job in served.client.get("/v1/jobs")["data"]}
    bad = BAD | BAD_ARCHIVES | BAD_PICKLES
    assert len(bad) >= 40
    wrong = {}
    for number, (name, case) in enumerate(list(bad.items())[:: scale(6, 1)]):
        problem = _refusal(served, case.write(tmp_path / str(number)))
        findings = problem.get("findings") or []
        if not any(f["code"] == case.code and case.word in f["message"] for f in findings):
            wrong[name] = problem
    assert wrong == {}
    missing = served.http.post("/v1/jobs", json={**_ASKED, "model": "bad"})
    assert missing.status_code == 404
    assert served.client.get("/v1/adapters")["data"] == []
    assert {job["id"] for job in served.client.get("/v1/jobs")["data"]} == known  # no job ran
    assert served.ask(DEMO_BASE) == before


def _refusal(served: Served, source: Path) -> dict[str, Any]:
    """The problem that an upload meets: a folder with everything in it, or an archive as it is."""
    archive = source
    if source.is_dir():
        archive = source.with_name(f"{source.name}.tar")
        subprocess.run(["tar", "-cf", archive, "-C", source, "."], check=True)
    with archive.open("rb") as content, pytest.raises(Refused) as refused:
        served.client.upload("/v1/adapters", archive.name, content, {"name": "bad"})
    return refused.value.problem


def test_every_good_adapter_is_accepted_and_answers(
    served: Served, tmp_path: Path, scale: Scale
) -> None:
    """Every fourth by default; test_adapter_formats.py has all of them, without the stack."""
    assert len(GOOD) >= 12
    some = list(GOOD.items())[:: scale(4, 1)]
    plain = served.chat(DEMO_BASE)
    for number, (what, write) in enumerate(some):
        version = served.add(f"good-{number}", write(tmp_path / str(number)))
        assert version["probe"]["differs"] is True, what
        assert version["probe"]["load_seconds"] > 0
        assert version["probe"]["memory_bytes"] > 0
        assert served.chat(f"good-{number}") != plain, what
    listed = served.client.get("/v1/adapters", limit=100)["data"]
    assert len(listed) == len(some)
    assert served.metric("lorry_resident_adapters") == SLOTS
    for number in range(len(some)):
        served.client.delete(f"/v1/adapters/good-{number}")


def test_ranks_8_16_and_64_together_and_128_refused_with_the_remedy(
    served: Served, tmp_path: Path, scale: Scale
) -> None:
    for rank in (8, 16, 64):
        draft = Draft(rank=rank, seed=rank, layers=range(6))
        served.add(f"r{rank}", draft.write(tmp_path / f"r{rank}"))
    alone = {rank: served.ask(f"r{rank}") for rank in (8, 16, 64)}
    assert len(set(alone.values())) == 3
    jobs = [(rank, served.submit(f"r{rank}")) for rank in (8, 16, 64) * scale(4, 10)]
    assert all(served.response(job)["text"] == alone[rank] for rank, job in jobs)

    high = Draft(rank=128, layers=range(1)).write(tmp_path / "r128")
    refused = _cli(served, "adapters", "add", "r128", str(high))
    assert refused.returncode == 1
    assert "retrain with r ≤ 64, or start workers with `--max-lora-rank 128`" in refused.stderr


def test_a_trained_adapter_answers_over_rest_token_by_token_as_in_peft(
    served: Served, base_model: Path, scale: Scale
) -> None:
    """One adapter's prompts by default; test_peft_parity.py has all of them, without the stack."""
    peft, prompts = Peft(base_model), 0
    for name in NAMES[: scale(1, len(NAMES))]:
        done = _cli(served, "adapters", "add", name, str(FOLDER / name))
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{name}@1: ready, current\n"
        asked = [p.prompt for p in DEMO_PROMPTS if p.model == name]
        asked += [example["prompt"] for example in read_examples(name)[:3]]
        _assert_as_peft(served, peft, name, FOLDER / name, asked)
        prompts += len(asked)
    assert prompts >= scale(9, 20)


def test_the_tutorials_adapter_from_its_training_to_its_answer(
    served: Served, base_model: Path, tmp_path: Path, scale: Scale
) -> None:
    """A few steps by default; as many as the tutorial's, and its answers, with --full."""
    steps = scale(3, 60)
    script = REPOSITORY / "docs/tutorial/train_an_adapter.py"
    command = [sys.executable, str(script), str(tmp_path / "tickets"), "--base", str(base_model)]
    subprocess.run([*command, "--steps", str(steps)], env=environment(), check=True, timeout=800)
    done = _cli(served, "adapters", "add", "tickets", str(tmp_path / "tickets"))
    assert (done.returncode, done.stdout) == (0, "tickets@1: ready, current\n"), done.stderr
    asked = ["My dishwasher does not drain the water.", "The gate is stuck open, hurry!"]
    answers = _assert_as_peft(served, Peft(base_model), "tickets", tmp_path / "tickets", asked)
    if steps == 60:
        assert answers[0].startswith('{"product": "dishwasher", "problem": ')


def _assert_as_peft(
    served: Served, peft: Peft, name: str, folder: Path, asked: Sequence[str]
) -> list[str]:
    """Compare greedy answers with those of PEFT's own `generate`; returns them."""
    bodies = [
        {
            "model": name,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": _PARITY_TOKENS,
            "logprobs": True,
        }
        for text in asked
    ]
    responses = [served.http.post("/v1/jobs", json=body) for body in bodies]
    model = peft.load(folder)
    answers = []
    for text, response in zip(asked, responses, strict=True):
        choice = served.response(response.json())
        tokens = [step["token"] for step in choice["logprobs"]["content"]]
        if choice["finish_reason"] == "stop":
            tokens.pop()
        assert tokens == peft.greedy(model, text), text
        answers.append(choice["message"]["content"])
    return answers


@dataclass
class _Told:
    """Jobs by the version that they were submitted for."""

    jobs: dict[int, list[dict[str, Any]]] = field(default_factory=lambda: {1: [], 2: []})

    def note(self, job: dict[str, Any]) -> None:
        self.jobs[job["adapter_version"]].append(job)


def test_a_new_version_during_a_backlog_mixes_none(
    served: Served, tmp_path: Path, scale: Scale
) -> None:
    """A backlog of 1,000 jobs with --full."""
    told, backlog, later = _Told(), scale(220, 1000), scale(40, 100)
    tokens = scale(6, 4)  # enough that the backlog stands while the version changes
    served.add("moving", Draft(seed=11, layers=range(6)).write(tmp_path / "1"))
    for _ in range(backlog):
        told.note(served.submit("moving", max_tokens=tokens))
    second = Draft(seed=12, layers=range(6)).write(tmp_path / "2")
    done = _cli(served, "adapters", "add", "moving", str(second))
    assert (done.returncode, done.stdout) == (0, "moving@2: ready, current\n"), done.stderr
    last = served.client.get(f"/v1/jobs/{told.jobs[1][-1]['id']}")
    assert last["finished_at"] is None  # the backlog stood while the version changed
    for number in range(later):
        model = "moving@1" if number % 10 == 0 else "moving"
        told.note(served.submit(model, max_tokens=tokens))
    assert {version: len(jobs) for version, jobs in told.jobs.items()} == {
        1: backlog + later // 10,
        2: later - later // 10,
    }
    found = {v: {served.response(job)["text"] for job in jobs} for v, jobs in told.jobs.items()}
    assert found == {v: {served.ask(f"moving@{v}", max_tokens=tokens)} for v in (1, 2)}
    assert found[1] != found[2]


def test_many_adapters_share_few_slots_and_each_answers_as_itself(
    served: Served, tmp_path: Path, scale: Scale
) -> None:
    """The quick version of `python -m benchmarks.many_adapters`."""
    names = [f"many-{number}" for number in range(scale(6, 12))]
    for number, name in enumerate(names):
        draft = Draft(rank=1 + number % 8, modules=ATTENTION, layers=range(8), seed=100 + number)
        draft.tensors = {key: 3 * array for key, array in draft.tensors.items()}
        served.add(name, draft.write(tmp_path / name))
    alone = {name: served.ask(name) for name in [*names, DEMO_BASE]}
    assert len(set(alone.values())) >= scale(5, 10)
    loads, evictions = (
        served.metric(f"lorry_adapter_{what}") for what in ("load_seconds_count", "evictions_total")
    )
    work = [*names * scale(2, 4), *[DEMO_BASE] * scale(4, 8)]
    random.Random(1).shuffle(work)
    jobs = [served.submit(name) for name in work]
    for name, job in zip(work, jobs, strict=True):
        assert served.response(job)["text"] == alone[name], name
    loaded = served.metric("lorry_adapter_load_seconds_count") - loads
    assert loaded >= len(names) - SLOTS
    assert served.metric("lorry_adapter_evictions_total") - evictions == loaded
    rows = served.client.get("/v1/adapters", limit=100)["data"]
    assert all(row["current"]["waiting_jobs"] == 0 for row in rows)


def _cli(served: Served, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return lorry(*arguments, LORRY_URL=served.up.url)
