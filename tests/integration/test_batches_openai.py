"""A program that has OpenAI's client alone takes batches through Lorry, on either engine."""

import ast
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from platformdirs import user_cache_path

from benchmarks.batches import Memory
from cli.demo.base import ensure_base
from db.database import Database
from tests.support import openai_only
from tests.support.batches import jsonl, line, openai_client, results, settled, submit
from tests.support.deployment import Deployment
from tests.support.jobs import BASE, make_bench
from tests.support.processes import LorryUp, environment
from tests.support.scale import Scale
from tests.support.servers import in_thread
from workers.engine import vllm_environment

pytestmark = pytest.mark.processes

EXAMPLE = Path(__file__).parents[1] / "support/openai_example_batch.jsonl"
EXAMPLE_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
START_SECONDS = 240


def take_through(url: str, source: Path) -> dict[str, Any]:
    """Run the program; returns what it saw."""
    done = subprocess.run(
        [sys.executable, openai_only.__file__, f"{url}/v1", str(source)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def test_the_program_knows_nothing_of_lorry() -> None:
    tree = ast.parse(Path(openai_only.__file__).read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in
             node.names}  # fmt: skip
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {name.partition(".")[0] for name in found}
    assert tops - set(sys.stdlib_module_names) == {"openai"}


def test_a_recorded_output_of_vllm_run_batch_is_read_by_the_same_code() -> None:
    """What vLLM 0.32 wrote for its own example, with the demo's base model."""
    recorded = Path(openai_only.__file__).with_name("vllm_run_batch_output.jsonl")
    answers = openai_only.read_answers(recorded.read_text().splitlines())
    assert set(answers) == {"request-1", "request-2"}
    assert answers["request-1"].choices[0].message.content


@pytest.mark.timeout(600)
def test_fifty_thousand_lines_over_twenty_adapters(
    database_url: str, broker_url: str, tmp_path: Path, scale: Scale
) -> None:
    """Quick: a tenth of it."""
    lines = scale(5_000, 50_000)

    async def prepare() -> None:
        async with Database.connect(database_url) as database:
            await make_bench(database, tmp_path, 20)

    in_thread(prepare)
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(jsonl(line(f"r{n}", f"a{n % 20}", f"Say {n}") for n in range(lines)))
    with Deployment(tmp_path, database_url, broker_url) as deployment:
        api = deployment.start_api()
        deployment.start_steward()
        deployment.start_worker(BASE, "--sim-step-ms=0.2", "--max-loras=20", "--max-num-seqs=1024")
        with Memory() as memory:
            memory.watch("api", api.popen.pid)
            seen = take_through(f"http://127.0.0.1:{deployment.port}", source)
    assert memory.take("whole")["api_mib_whole"] < 300
    assert seen["lines"] == lines
    assert seen["model"] is None
    assert seen["models"] == sorted(f"a{n}" for n in range(20))


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_small_batch_on_the_real_engine(tmp_path: Path) -> None:
    prompts = {
        "sql": "Table films(id, title, genre, year). How many films are there?",
        "pirate": "What is the capital of Italy?",
        "json": "Anna, 31, lives in Rome.",
    }
    lines = [
        line(f"{model}-{n}", model, prompt, max_tokens=12, temperature=0)
        for n in range(3)
        for model, prompt in prompts.items()
    ]
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(jsonl(lines))
    with LorryUp(tmp_path / "data") as lorry:
        lorry.wait_ready(START_SECONDS)
        seen = take_through(lorry.url, source)
    assert seen["lines"] == 9
    assert seen["models"] == ["json", "pirate", "sql"]


@pytest.mark.vllm
@pytest.mark.timeout(1500)
async def test_the_example_of_vllm_run_batch_and_its_output_read_alike(
    database: Database, database_url: str, broker_url: str, tmp_path: Path, scale: Scale
) -> None:
    """The same file through `vllm run-batch` and through Lorry: one reader takes both outputs."""
    if not scale.full:
        pytest.skip("up to 4,000 tokens on a CPU: with --full")
    base = await asyncio.to_thread(ensure_base, user_cache_path("lorry"), print)
    flags = ("--served-model-name", EXAMPLE_MODEL, "--max-model-len", "1100")
    theirs = await asyncio.to_thread(run_batch_of_vllm, base, tmp_path / "out.jsonl", flags)
    with Deployment(tmp_path, database_url, broker_url) as deployment:
        await asyncio.to_thread(deployment.start_api)
        deployment.start_steward()
        worker = deployment.start("worker", str(base), *flags)
        await asyncio.to_thread(worker.wait_log, "ready:", START_SECONDS)
        client = openai_client(deployment)
        batch = await asyncio.to_thread(submit, client, EXAMPLE.read_bytes())
        done = await asyncio.to_thread(settled, client, batch, 600)
        assert done.status == "completed", done
        assert done.model == EXAMPLE_MODEL
        assert set(results(client, done.output_file_id)) == {"request-1", "request-2"}
        ours = client.files.content(str(done.output_file_id)).text
    read = [openai_only.read_answers(text.splitlines()) for text in (theirs, ours)]
    for answers in read:
        assert set(answers) == {"request-1", "request-2"}
        for answer in answers.values():
            assert answer.model == EXAMPLE_MODEL
            assert answer.choices[0].message.content
    for custom_id in read[0]:
        mine, its = read[1][custom_id].usage, read[0][custom_id].usage
        assert mine is not None and its is not None
        assert mine.prompt_tokens == its.prompt_tokens  # the same prompt was made of it


def run_batch_of_vllm(base: Path, output: Path, flags: tuple[str, ...]) -> str:
    """vLLM's own `run-batch` over the example; returns what it wrote."""
    program = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    files = ["-i", str(EXAMPLE), "-o", str(output), "--model", str(base)]
    for_a_cpu = ["--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni"]
    done = subprocess.run(
        [*program, *files, *flags, *for_a_cpu],
        env=environment(**vllm_environment._defaults()),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert output.exists(), (done.stdout + done.stderr)[-4000:]
    return output.read_text()
