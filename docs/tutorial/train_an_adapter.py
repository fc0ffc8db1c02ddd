"""Train a LoRA adapter that turns a customer's message into a JSON ticket.

    python docs/tutorial/train_an_adapter.py OUT [--base FOLDER] [--steps N]

Plain PEFT, a few minutes on two cores. Without --base it takes the demo's base model, which
`lorry up` keeps in its cache too.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).with_name("tickets.jsonl")
RANK, RATE, WARMUP, BATCH = 8, 1e-3, 6, 6
NOT_LEARNED = -100  # what PyTorch's cross entropy passes over


def main() -> None:
    """Train, and save what `lorry adapters add` takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    base = options.base or demo_base()

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    examples = [encode(tokenizer, json.loads(line)) for line in EXAMPLES.open(encoding="utf-8")]
    train(model, examples, options.steps)
    model.save_pretrained(options.out)
    print(f"saved to {options.out}")


def demo_base() -> Path:
    """The demo's base model."""
    from platformdirs import user_cache_path

    from cli.demo.base import ensure_base

    return ensure_base(user_cache_path("lorry"), print)


def encode(tokenizer, example: dict) -> tuple[list[int], list[int]]:
    """The message as the chat template renders it, and the answer with its end token."""
    chat = [{"role": "user", "content": example["message"]}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = json.dumps(example["ticket"]) + tokenizer.eos_token
    return list(asked), tokenizer(answer, add_special_tokens=False).input_ids


def train(model, examples: list, steps: int) -> None:
    """Learn the answers, and only the answers."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    order, queue, started = random.Random(1), [], time.monotonic()
    for step in range(1, steps + 1):
        while len(queue) < BATCH:
            queue += order.sample(examples, len(examples))
        batch, queue = queue[:BATCH], queue[BATCH:]
        for group in optimizer.param_groups:  # a short rise, then a straight fall to zero
            group["lr"] = RATE * min(step / WARMUP, (steps - step + 1) / (steps - WARMUP + 1))
        loss = model(**padded(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s")


def padded(batch: list) -> dict[str, torch.Tensor]:
    """Rows of one length: the padding is masked, the question is not learned."""
    width = max(len(asked) + len(answer) for asked, answer in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, NOT_LEARNED)
    for row, (asked, answer) in enumerate(batch):
        end = len(asked) + len(answer)
        ids[row, :end] = torch.tensor(asked + answer)
        mask[row, :end] = 1
        labels[row, len(asked) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


if __name__ == "__main__":
    main()
