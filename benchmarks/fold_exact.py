"""Is a folded adapter the same adapter? Greedy answers and their log probabilities, side by side.

    python -m benchmarks.fold_exact --make-reference FILE        (PEFT in float32, on a CPU)
    python -m benchmarks.fold_exact --make-base FOLDER           (the base in bfloat16, in pieces)
    python -m benchmarks.fold_exact --reference FILE [--dtype bfloat16] [--flags "…"]

The demo's base and its three adapters. The reference holds, for every prompt, the greedy answer of
PEFT in float32 with the log probability of each of its tokens. Then the engine answers each prompt
with the adapter as LoRA and with the adapter folded. Printed, a JSON line for each adapter: the
share of greedy answers that are token for token the same in both modes; and for each mode the
share equal to the reference, and by how much at most (and on average) the log probability of a
token differs from the reference, as long as the tokens before it are the same.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import uvloop

import cli.demo
from benchmarks.bare import report
from core.generation import Completion, GenerationRequest, Outcome
from core.settings import Settings
from workers.engine.protocol import Engine, EngineRequest, LocalAdapter
from workers.engine.vllm_engine import VllmEngine

ADAPTERS: Final = ("sql", "pirate", "json")
FOLDER: Final = Path(cli.demo.__file__).parent / "adapters"
TOKENS: Final = 32
#: Asked of every adapter besides its own examples.
MORE: Final = (
    "Name three fruits.", "What is the capital of France?", "Tell me about the sea.",
    "How do I boil an egg?", "List the users who are older than thirty.", "Who are you?",
    "Write one sentence about winter.", "What comes after Monday?", "Explain gravity to a child.",
    "Give me the names of two rivers.", "Count to five.", "What is a queue?",
)  # fmt: skip


def prompts(adapter: str) -> list[str]:
    """What an adapter is asked."""
    lines = (FOLDER.parent / "data" / f"{adapter}.jsonl").read_text(encoding="utf-8").splitlines()
    learnt = [json.loads(line)["prompt"] for line in lines]
    return [*dict.fromkeys([*MORE, *learnt])][:40]


def make_reference(base: Path, file: Path) -> None:
    """Answer every prompt with PEFT in float32, and write the answers with their probabilities."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    found: dict[str, list[dict[str, Any]]] = {}
    for adapter in ADAPTERS:
        llama = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(llama, str(FOLDER / adapter)).float().eval()
        found[adapter] = []
        for text in prompts(adapter):
            talk = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(
                talk, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            with torch.inference_mode():
                made = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=TOKENS,
                    min_new_tokens=TOKENS,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
                logits = model(input_ids=made).logits[0, ids.shape[1] - 1 : -1]
            # the end token is never made (min_new_tokens), so its probability is no part of it
            answer = made[0, ids.shape[1] :]
            chosen = logits.double().log_softmax(-1).gather(1, answer[:, None])[:, 0]
            found[adapter].append(
                {"prompt": ids[0].tolist(), "answer": answer.tolist(), "logprobs": chosen.tolist()}
            )
        print(adapter, len(found[adapter]), flush=True)
    file.write_text(json.dumps(found))


def make_base(base: Path, folder: Path) -> None:
    """The base in bfloat16, in files of at most 50 MB, for a machine that is hard to reach."""
    import torch
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    llama.save_pretrained(folder, max_shard_size="50MB")


async def compare(options: argparse.Namespace) -> None:
    """Start the engine; ask every prompt in both modes."""
    reference = json.loads(options.reference.read_text())
    flags = ["--max-model-len", "1024", "--max-num-seqs", "64", "--dtype", options.dtype]
    # without a tokenizer the engine names tokens by their ids
    flags += ["--skip-tokenizer-init", "--no-enable-prefix-caching", *options.flags.split()]
    engine = VllmEngine.from_flags(str(base_folder(options)), flags, fold=True)
    await engine.start()
    report(name="engine", version=engine.info.version, fold_refusal=engine.info.fold_refusal)
    before = await engine.fold_digest()
    for number, name in enumerate(ADAPTERS, start=1):
        adapter = LocalAdapter(number, f"{number}-{name}", str(FOLDER / name), name)
        await engine.load_adapter(adapter)
        cases = reference[name]
        lora = await ask(engine, adapter, cases)
        await engine.fold(number)
        folded = await ask(engine, adapter, cases)
        await engine.fold(None)
        again = await ask(engine, adapter, cases)
        same = sum(a["answer"] == b["answer"] for a, b in zip(lora, folded, strict=True))
        noise = sum(a["answer"] == b["answer"] for a, b in zip(lora, again, strict=True))
        report(
            name=name,
            prompts=len(cases),
            folded_equals_lora=round(same / len(cases), 4),
            lora_equals_lora_again=round(noise / len(cases), 4),
            lora=against(cases, lora),
            folded=against(cases, folded),
        )
    report(name="digest", same=await engine.fold_digest() == before)
    await engine.close()


def against(cases: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
    """How a mode's answers differ from the reference's."""
    gaps: list[float] = []
    equal = 0
    for case, made in zip(cases, answers, strict=True):
        equal += made["answer"] == case["answer"]
        for place, token in enumerate(case["answer"]):
            if place >= len(made["answer"]) or made["answer"][place] != token:
                break
            gaps.append(abs(made["logprobs"][place] - case["logprobs"][place]))
    return {
        "equal": round(equal / len(cases), 4),
        "largest": round(max(gaps), 5),
        "mean": round(sum(gaps) / len(gaps), 6),
        "tokens": len(gaps),
    }


async def ask(engine: Engine, adapter: LocalAdapter, cases: Sequence[Any]) -> list[dict[str, Any]]:
    """Greedy answers with the log probability of each token."""
    made: dict[str, Completion] = {}
    done = asyncio.Event()
    sent = [_request(number, adapter, case) for number, case in enumerate(cases)]

    def ended(request: EngineRequest, outcome: Outcome) -> None:
        assert isinstance(outcome, Completion), outcome
        made[request.request_id] = outcome
        if len(made) == len(sent):
            done.set()

    engine.submit(sent, ended)
    await done.wait()
    answers = []
    for request in sent:
        steps = made[request.request_id].choices[0].logprobs or []
        answers.append(
            {
                "answer": [int(step.chosen.token.removeprefix("token_id:")) for step in steps],
                "logprobs": [step.chosen.logprob for step in steps],
            }
        )
    return answers


def _request(number: int, adapter: LocalAdapter, case: Any) -> EngineRequest:
    body = {
        "prompt": case["prompt"],
        "max_tokens": TOKENS,
        "min_tokens": TOKENS,
        "temperature": 0,
        "logprobs": 1,
    }
    name = f"exact-{adapter.lora_int_id}-{number}"
    return EngineRequest(name, GenerationRequest("completion", body), adapter, "")


def base_folder(options: argparse.Namespace) -> Path:
    """The demo's base model."""
    if options.base:
        return Path(options.base)
    from cli.demo.base import ensure_base

    return ensure_base(Settings().cache_folder(), print)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make-reference", type=Path)
    parser.add_argument("--make-base", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--base", help="the folder of the demo's base; made where it is not given")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--flags", default="", help="more flags for the engine, in one argument")
    options = parser.parse_args()
    if options.make_reference:
        make_reference(base_folder(options), options.make_reference)
    elif options.make_base:
        make_base(base_folder(options), options.make_base)
    elif options.reference:
        uvloop.run(compare(options))
    else:
        parser.error("give --make-reference FILE, --make-base FOLDER or --reference FILE")


if __name__ == "__main__":
    main()
