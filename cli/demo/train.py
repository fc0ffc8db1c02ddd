"""Train the demo's adapters: a few dozen own-written examples each, on the CPU, in minutes.

    python -m cli.demo.train [--base FOLDER] [--out FOLDER] [--only NAME] [--steps N]

The same versions on the same machine give the same files: the seed fixes weights and order.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM

from cli.demo.base import DEMO_BASE, ensure_base

HERE = Path(__file__).parent
NAMES = ("sql", "pirate", "json")
TARGETS = ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]
RANK, ALPHA, SEED, BATCH, STEPS, WARMUP, RATE = 4, 16, 7, 6, 72, 6, 2e-3
_IGNORED = -100


def read_examples(name: str) -> list[dict[str, str]]:
    """Return the training examples of one adapter: `prompt` and `answer` each."""
    lines = (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def train(name: str, base: Path, out: Path, steps: int) -> None:
    """Train the adapter `name` on `base` and write its two files to the folder `out`."""
    torch.manual_seed(SEED)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    llama: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model: Any = get_peft_model(llama, config)
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.0)
    examples = [_encode(tokenizer, example) for example in read_examples(name)]
    batches = _batches(examples, steps, random.Random(SEED))
    started = time.monotonic()
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:  # a short rise, then a straight fall to zero
            group["lr"] = RATE * min(step / WARMUP, (steps - step + 1) / (steps - WARMUP + 1))
        loss = _loss(llama, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"{name} {step}/{steps} loss {loss.item():.3f}", flush=True)
    print(f"{name} took {time.monotonic() - started:.0f} s", flush=True)
    _save(model, out)


def _encode(tokenizer: Any, example: dict[str, str]) -> tuple[list[int], list[int]]:
    chat = [{"role": "user", "content": example["prompt"]}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    asked_ids = tokenizer(asked, add_special_tokens=False).input_ids
    answer = tokenizer(example["answer"] + tokenizer.eos_token, add_special_tokens=False)
    return asked_ids, answer.input_ids


def _batches(examples: list[Any], steps: int, order: random.Random) -> list[list[Any]]:
    stream: list[Any] = []
    while len(stream) < steps * BATCH:
        stream += order.sample(examples, len(examples))
    return [stream[at * BATCH : (at + 1) * BATCH] for at in range(steps)]


def _loss(llama: Any, batch: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    width = max(len(asked) + len(answer) for asked, answer in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), _IGNORED)
    for row, (asked, answer) in enumerate(batch):
        end = len(asked) + len(answer)
        ids[row, :end] = torch.tensor(asked + answer)
        labels[row, len(asked) : end] = torch.tensor(answer)
    # Padding is on the right, where causal attention never looks: no mask is needed. And the
    # vocabulary is a fifth of this model, so only the positions that count go through it.
    hidden = llama.model(input_ids=ids).last_hidden_state[:, :-1]
    counts = labels[:, 1:] != _IGNORED
    return cross_entropy(llama.lm_head(hidden[counts]), labels[:, 1:][counts])


def _save(model: PeftModel, out: Path) -> None:
    for weight in model.parameters():
        if weight.requires_grad:  # half the size, and the answers stay the same
            weight.data = weight.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = DEMO_BASE  # not this machine's folder
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:  # PEFT would write its own README.md too
        model.save_pretrained(scratch, save_embedding_layers=False)
        shutil.copyfile(
            Path(scratch, "adapter_model.safetensors"), out / "adapter_model.safetensors"
        )
        config = json.loads(Path(scratch, "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"].sort()  # PEFT keeps a set, whose order changes from run to run
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Train the adapters named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m cli.demo.train", description=__doc__)
    parser.add_argument("--base", type=Path, help="folder of the base model; made if not given")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(2)
    base = args.base or ensure_base(Path.home() / ".cache" / "lorry", print)
    for name in [args.only] if args.only else NAMES:
        train(name, base, args.out / name, args.steps)


if __name__ == "__main__":
    main()
