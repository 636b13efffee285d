"""A model made ready: tokens, RoPE factor, slots, LoRA, and which parameters are trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.names import SLOT_MODULES
from ..integrations import apply_hici, apply_rope_scaling, load_hici
from ..integrations.host import Host
from ..integrations.rope_scaling import linear_factor
from .recipe import CEIL_TYPES, Recipe

TOKENS = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def rope_factor(model_type: str, window: int, present: float, recipe: Recipe) -> float:
    """The factor to train with: stated, or context over the window the model has, rounded up where published so."""
    if recipe.rope_factor is not None:
        return float(recipe.rope_factor)
    factor = max(1.0, recipe.context / (window * present))
    return present * (math.ceil(factor) if model_type in CEIL_TYPES else factor)


def add_tokens(model: Any, tokenizer: Any) -> int:
    """Give the tokenizer the special tokens it lacks and the embeddings a row for each; how many were new."""
    added = tokenizer.add_special_tokens({k: v for k, v in TOKENS.items() if getattr(tokenizer, k) is None})
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        ends = (model.get_input_embeddings, model.get_output_embeddings)
        means = [end().weight.detach().float().mean(0) for end in ends]
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for end, mean in zip(ends, means, strict=True):
                end().weight[rows:] = mean.to(end().weight)
    return int(added)


def build(directory: str | Path, recipe: Recipe, checkpoint: Path | None = None) -> tuple[Any, Any]:
    """Model and tokenizer, ready for the trainer.

    Args:
        directory: of the base model. checkpoint: a HiCI checkpoint to go on from; its slots, RoPE factor and LoRA are
            kept, the recipe's ``hici`` may override what is not in its tensors' shapes. Without LoRA in it, that of the
            recipe is added.

    Raises:
        ValueError: the recipe does not fit the model, or asks for other LoRA or RoPE than the checkpoint has.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = checkpoint if checkpoint is not None and (checkpoint / "tokenizer_config.json").is_file() else directory
    tokenizer = AutoTokenizer.from_pretrained(source)
    # what a checkpoint trains is float32 and would be rounded; what stays frozen is cast below
    kind = "float32" if checkpoint is not None else recipe.dtype
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, kind))
    torch.manual_seed(recipe.seed)
    if checkpoint is not None:
        loaded: Any = load_hici(model, checkpoint, **recipe.hici)
        if hasattr(loaded, "get_base_model"):
            adapters = loaded.peft_config
            model = loaded.get_base_model()
            model.peft_config = adapters
            _check_lora(next(iter(adapters.values())), recipe, checkpoint)
        elif recipe.lora_r:
            model = _with_lora(model, recipe)
        factor = linear_factor(Host.of(model))
        if recipe.rope_factor is not None and recipe.rope_factor != factor:
            raise ValueError(f"rope_factor must be None or {factor}, as in {checkpoint}, got {recipe.rope_factor}")
    else:
        if recipe.special_tokens:
            add_tokens(model, tokenizer)
        host = Host.of(model)
        present = linear_factor(host)
        if present is None:
            raise ValueError("the model's RoPE is scaled otherwise than linearly, which the recipe does not know")
        factor = rope_factor(model.config.model_type, model.config.max_position_embeddings, present, recipe)
        if factor != present:
            if present != 1.0:
                raise ValueError(f"the model's RoPE factor is {present}, the recipe asks for {factor}")
            apply_rope_scaling(model, "linear", factor)
        apply_hici(model, recipe.config())
        if recipe.lora_r:
            model = _with_lora(model, recipe)
    _choose(model, recipe)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer


def _with_lora(model: Any, recipe: Recipe) -> Any:
    """LoRA inside the model rather than a model around it: what is trained besides LoRA is then saved as any weight."""
    from peft import LoraConfig, inject_adapter_in_model

    for target in recipe.lora_targets:
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
            raise ValueError(f"lora_targets has {target!r}, which is no module's name")
    lora = LoraConfig(r=recipe.lora_r, lora_alpha=recipe.lora_alpha, lora_dropout=0.0, bias="none",
                      target_modules=list(recipe.lora_targets), task_type="CAUSAL_LM")  # fmt: skip
    model = inject_adapter_in_model(lora, model)
    model.peft_config = {"default": lora}
    return model


def _check_lora(lora: Any, recipe: Recipe, checkpoint: Path) -> None:
    """
    Raises:
        ValueError: the recipe asks for other LoRA than the checkpoint has, which is trained on as it is.
    """
    for name, present in (("lora_r", lora.r), ("lora_alpha", lora.lora_alpha)):
        if getattr(recipe, name) != present:
            raise ValueError(f"{name} must be {present}, as in {checkpoint}, got {getattr(recipe, name)}")
    ends = {str(module).rsplit(".", 1)[-1] for module in lora.target_modules}
    if ends != set(recipe.lora_targets):
        raise ValueError(f"lora_targets must be {sorted(ends)}, as in {checkpoint}, got {sorted(recipe.lora_targets)}")


def _choose(model: nn.Module, recipe: Recipe) -> None:
    everything = not recipe.lora_r
    held = [name for name, _ in model.named_parameters()]
    for part in recipe.trainable:
        if not any(part in name for name in held):
            raise ValueError(f"trainable has {part!r}, which is in no parameter's name")
    for name, p in model.named_parameters():
        named = any(part in name for part in (*recipe.trainable, *SLOT_MODULES))
        p.requires_grad_(everything or "lora_" in name or named)
        p.data = p.data.to(torch.float32 if p.requires_grad else getattr(torch, recipe.dtype))
