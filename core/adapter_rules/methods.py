"""Which LoRA methods vLLM computes: everything else would be answered wrongly, most of it silently.

The list follows vLLM 0.32's `lora/peft_helper.py`. Older releases read fewer of these fields, which
is why the rules are ours: vLLM 0.24 would load a PiSSA adapter and answer nonsense.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from core.adapter_rules.findings import Finding
from core.invalid import shown

#: These only choose where training starts. EVA too: it leaves the base model's weights alone.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_TASKS = (None, "CAUSAL_LM")
_PLAIN = "retrain with plain LoRA"

#: field -> code, what it is. Set to anything but null, false or nothing, it is refused.
_REFUSED = {
    "use_dora": ("dora", "DoRA (a learned magnitude per weight column)"),
    "lora_bias": ("lora_bias", "a bias on lora_B"),
    "alora_invocation_tokens": ("alora", "Activated LoRA (weights that count from a token on)"),
    "layer_replication": ("layer_replication", "layers of the base repeated"),
    "megatron_config": ("megatron", "Megatron's parallel layers"),
    "trainable_token_indices": ("trainable_tokens", "trained token embeddings"),
    "use_bdlora": ("bdlora", "block-diagonal LoRA"),
    "use_qalora": ("qalora", "QALoRA (pooled inputs)"),
    "kasa_config": ("variant", "KaSA (a truncated base, learned singular values)"),
    "monteclora_config": ("variant", "Monteclora (sampled weights)"),
    "arrow_config": ("variant", "Arrow (a router over several adapters)"),
}

#: Toggles of PEFT that change nothing about what the saved weights mean.
_HARMLESS = {
    "use_rslora",  # another scaling, which vLLM knows
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "runtime_config",
    "velora_config",  # another backward pass
}


def unsupported(fields: Mapping[str, Any]) -> Iterator[Finding]:
    """What a configuration asks of the engine that it cannot do."""
    for name, (code, what) in _REFUSED.items():
        if fields.get(name):
            yield Finding(
                code,
                f"{name} is {shown(fields[name])}: vLLM does not compute {what}; {_PLAIN}, or "
                "merge the adapter into the base model and serve that",
            )
    yield from _bias_and_saved(fields)
    yield from _task(fields)
    yield from _initialisation(fields)
    yield from _unknown_toggles(fields)


def _bias_and_saved(fields: Mapping[str, Any]) -> Iterator[Finding]:
    bias = fields.get("bias", "none")
    if bias != "none":  # not even null, to vLLM
        yield Finding("bias", f"bias is {shown(bias)}, expected 'none': retrain with bias='none'")
    saved = fields.get("modules_to_save") or []
    if not isinstance(saved, list):
        saved = [saved]
    # vLLM takes classification heads, on models that classify; ours generate text
    if saved:
        yield Finding(
            "modules_to_save",
            f"modules_to_save is {', '.join(map(shown, saved[:5]))}, expected none: whole trained "
            f"modules (a resized or retrained embedding, a head) are not an adapter; {_PLAIN} "
            "without them (in LLaMA-Factory, without additional_target)",
        )


def _task(fields: Mapping[str, Any]) -> Iterator[Finding]:
    task = fields.get("task_type")
    if task not in _TASKS:
        yield Finding(
            "task_type",
            f"task_type is {shown(task)}, expected 'CAUSAL_LM': Lorry generates text; an adapter "
            "for another task answers nothing here",
        )


def _initialisation(fields: Mapping[str, Any]) -> Iterator[Finding]:
    init = fields.get("init_lora_weights", True)
    if not isinstance(init, str) or init.lower() in _PLAIN_INITS:
        return
    yield Finding(
        "init_unconverted",
        f"init_lora_weights is {shown(init)}: training began from changed base weights (PiSSA, "
        "OLoRA, CorDA, LoftQ and LoRA-GA do that), so the adapter does not fit the base as it is. "
        "Save it with save_pretrained(…, path_initial_model_for_weight_conversion=…), or set "
        "init_lora_weights to true if the base that is served holds the changed weights",
    )


def _unknown_toggles(fields: Mapping[str, Any]) -> Iterator[Finding]:
    """Switches of a PEFT newer than these rules; its other new fields have harmless defaults."""
    for name, value in fields.items():
        switch = name.startswith("use_") and value is True
        switch |= name.endswith("_config") and bool(value)
        if switch and name not in _HARMLESS and name not in _REFUSED:
            yield Finding(
                "unknown_option",
                f"{name} is {shown(value)}: not known to this release of Lorry, and it may change "
                f"what the weights mean. {_PLAIN.capitalize()}, or remove it if you know better",
            )
