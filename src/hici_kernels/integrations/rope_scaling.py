"""Stretching the positions of a model: position interpolation and YaRN."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .. import _checks
from .host import Host, Note


def apply_rope_scaling(model: nn.Module, kind: str, factor: float, **parameters: Any) -> nn.Module:
    """Read ``factor`` times the window a model was trained with by changing its rotation frequencies, in place.

    Args:
        model: a transformers model with one rotary embedding for all layers and default RoPE.
        kind: "linear" = position interpolation (arXiv 2306.15595), every frequency divided by the factor; "yarn"
            (arXiv 2309.00071), low frequencies divided, high ones kept, logits scaled by the attention factor.
        factor: >= 1.
        parameters: further entries of transformers' ``rope_parameters``, such as beta_fast, beta_slow,
            attention_factor, original_max_position_embeddings (default: the model's window).

    The formulas are those of transformers; the model's config is changed with it, so save_pretrained keeps the scaling.
    Apply it before :func:`apply_hga` or :func:`apply_dca`, which read the frequencies. :func:`restore` takes it back.

    Raises:
        TypeError, ValueError: before anything has changed.
    """
    _checks.choice("kind", kind, ("linear", "yarn"))
    _checks.number("factor", factor)
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    host = Host.of(model)
    host.check_free("apply_rope_scaling")
    config: Any = host.decoder.config
    before = copy.deepcopy(config.rope_parameters)
    if "rope_type" not in before:
        raise ValueError(
            f"{type(host.decoder).__name__} has other RoPE parameters per layer type, which is not supported"
        )
    if before["rope_type"] != "default":
        raise ValueError(f"the model's RoPE is scaled already: rope_type {before['rope_type']!r}, expected 'default'")
    scaled = {**before, **parameters, "rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        scaled.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    host.own_config(model)
    config = host.decoder.config
    rotary: Any = host.decoder.rotary_emb
    config.rope_parameters = scaled
    try:
        with torch.device(rotary.inv_freq.device):
            made = type(rotary)(config=config)
    except BaseException:
        config.rope_parameters = before
        raise
    host.decoder.rotary_emb = made
    host.notes.append(Note("apply_rope_scaling", rotary=rotary, rope_parameters=before))
    return model


def linear_factor(host: Host) -> float | None:
    """The factor of a model's linear RoPE scaling; 1 for none, None for another kind."""
    rope = getattr(host.decoder.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    return 1.0 if kind == "default" else float(rope["factor"]) if kind == "linear" else None
