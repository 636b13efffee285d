"""Names of tensors in published HiCI checkpoints, old and new.

A checkpoint of a training run consists of ``adapter_model`` (LoRA matrices, PEFT names without the adapter's name) and
``trainable_params`` (embeddings, norms and slot modules under the base model's names); a merged one is a model
directory with the slot modules among its weights.
"""

from __future__ import annotations

import re

TRAINABLE = ("embed", "norm", "local_constructor", "global_integrator")
SLOT_MODULES = ("local_constructor", "global_integrator")
PEFT_PREFIX = "base_model.model."

_OLD = (
    (".global_memory.", ".local_constructor."),
    (".hierarchical_aggregator.", ".global_integrator."),
    (".local_constructor.local_queries", ".local_constructor.memory_slots"),
)
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)\.")
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(\.[^.]+)?\.weight$")
# a model without a head has its layers at the top
_LAYER = re.compile(
    r"^(?P<decoder>(?:.*\.)?)layers\.(?P<layer>\d+)\.self_attn\.(?P<name>(?:local_constructor|global_integrator)\..+)$"
)


def canonical(name: str) -> str | None:
    """The name a tensor has in a model with slots; None for one that is a copy kept aside by an adapter."""
    if ".original_module." in name:
        return None
    while name.startswith(PEFT_PREFIX):
        name = name.removeprefix(PEFT_PREFIX)
    name = name.removeprefix("module.")
    name = _WRAPPED.sub(".", name)
    for old, new in _OLD:
        name = name.replace(old, new)
    return name


def is_lora(name: str) -> bool:
    return "lora_" in name


def lora_parts(name: str) -> tuple[str, str]:
    """Module and part ("A" or "B") of a canonical LoRA name."""
    found = _LORA.match(name)
    if found is None:
        raise ValueError(f"{name} is not the name of a LoRA matrix this library knows")
    return found["module"], found["part"]


def is_kept_whole(raw: str) -> bool:
    """Whether the name, as an adapted model has it, is of a module that its adapter trains as a whole."""
    return ".modules_to_save." in raw


def slot_parts(name: str) -> tuple[int, str] | None:
    """Layer and name inside the attention module of a slot tensor, None for any other tensor."""
    found = _LAYER.match(name)
    return None if found is None else (int(found["layer"]), found["name"])


def decoder_prefix(name: str) -> str | None:
    """What stands before ``layers`` in the name of a slot tensor: "model.", or "" in a model without a head."""
    found = _LAYER.match(name)
    return None if found is None else found["decoder"]


def is_trainable(name: str) -> bool:
    """Whether the published recipe trains this tensor besides LoRA."""
    return not is_lora(name) and any(part in name for part in TRAINABLE)
