"""What PEFT computes is what Lorry answers: tokens of trained adapters, numbers of every variant.

Float32 on the CPU on both sides, so that nothing is left to rounding but the order of sums.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.demo.prompts import DEMO_PROMPTS
from cli.demo.train import read_examples
from core.generation import Choice, Completion
from db.adapter_package import Package, PackageLimits, unpack
from tests.engine.contract import ask, chat, complete, request
from tests.engine.test_demo_adapters import FOLDER, NAMES
from tests.support.good_adapters import GOOD
from workers.engine.protocol import Engine, LocalAdapter

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

_TOKENS = 20
#: Those that scale, place or name their weights in a way of their own, up to the engine's rank 16.
_VARIANTS = [
    "rsLoRA",
    "all-linear",
    "rank_pattern and alpha_pattern",
    "EVA",
    "some layers",
    "bfloat16",
    "a float alpha",
    "lm_head",
    "embed_tokens",
    "adapter_model.bin",
]
#: Log-probabilities differ by the order in which sums are taken.
_TOLERANCE = 2e-3


class Peft:
    """PEFT's own model, for one adapter at a time."""

    def __init__(self, base: Path) -> None:
        import torch
        from transformers import AutoTokenizer

        self.torch, self.base = torch, base
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)

    def load(self, folder: Path) -> Any:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        llama = AutoModelForCausalLM.from_pretrained(self.base, dtype=self.torch.float32)
        return PeftModel.from_pretrained(llama, str(folder)).float().eval()

    def ids(self, text: str) -> Any:
        talk = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )

    def greedy(self, model: Any, text: str) -> list[str]:
        """The answer token by token, its end token left out."""
        ids = self.ids(text)
        with self.torch.inference_mode():
            whole = model.generate(
                input_ids=ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        answer = whole[0, ids.shape[1] :].tolist()
        ended = answer[-1] == self.tokenizer.eos_token_id
        return [self.tokenizer.decode([token]) for token in (answer[:-1] if ended else answer)]

    def first_logprobs(self, model: Any, text: str, tokens: int) -> dict[str, float]:
        """The likeliest first tokens of the answer."""
        with self.torch.inference_mode():
            logits = model(input_ids=self.ids(text)).logits[0, -1]
        best = self.torch.log_softmax(logits.double(), -1).topk(tokens)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return {self.tokenizer.decode([token]): value for token, value in pairs}


@pytest.fixture(scope="module")
def peft(base_model: Path) -> Iterator[Peft]:
    yield Peft(base_model)


def _prompts(name: str) -> list[str]:
    new = [prompt.prompt for prompt in DEMO_PROMPTS if prompt.model == name]
    return [*new, *(example["prompt"] for example in read_examples(name)[:3])]


def _choice(outcome: Any) -> Choice:
    assert isinstance(outcome, Completion), outcome
    return outcome.choices[0]


@pytest.mark.parametrize(("number", "name"), list(enumerate(NAMES, start=500)), ids=NAMES)
async def test_a_trained_adapter_answers_token_by_token_as_in_peft(
    vllm_engine: Engine, peft: Peft, number: int, name: str
) -> None:
    adapter = LocalAdapter(number, f"{number}-{name}", str(FOLDER / name), name)
    await vllm_engine.load_adapter(adapter)
    prompts = _prompts(name)
    bodies = [chat(text, temperature=0, max_tokens=_TOKENS, logprobs=True) for text in prompts]
    ours = await ask(vllm_engine, [request(body, adapter=adapter) for body in bodies])
    model = peft.load(FOLDER / name)
    for text, outcome in zip(prompts, ours, strict=True):
        choice = _choice(outcome)
        assert choice.logprobs is not None
        tokens = [step.chosen.token for step in choice.logprobs]
        if choice.finish_reason == "stop":
            tokens.pop()
        assert tokens == peft.greedy(model, text), text
    assert 3 * len(prompts) >= 20
    await vllm_engine.remove_adapter(number)


@pytest.mark.parametrize(("number", "name"), list(enumerate(_VARIANTS, start=600)), ids=_VARIANTS)
async def test_every_variant_means_to_vllm_what_it_means_to_peft(
    vllm_engine: Engine, peft: Peft, tmp_path: Path, number: int, name: str
) -> None:
    package: Package = unpack(GOOD[name](tmp_path / "in"), tmp_path / "out", PackageLimits())
    adapter = LocalAdapter(number, f"{number}-x", str(package.folder), "x")
    await vllm_engine.load_adapter(adapter)
    body = chat("Name three fruits.", temperature=0, max_tokens=1, logprobs=True, top_logprobs=5)
    choice = (await complete(vllm_engine, body, adapter)).choices[0]
    assert choice.logprobs is not None
    ours = {one.token: one.logprob for one in choice.logprobs[0].top}
    theirs = peft.first_logprobs(peft.load(package.folder), "Name three fruits.", 5)
    assert ours == pytest.approx(theirs, abs=_TOLERANCE)
    plain = (await complete(vllm_engine, body)).choices[0]
    assert plain.logprobs is not None
    base = {one.token: one.logprob for one in plain.logprobs[0].top}
    assert base != pytest.approx(ours, abs=10 * _TOLERANCE)
    await vllm_engine.remove_adapter(number)
