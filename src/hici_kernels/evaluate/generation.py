"""Greedy continuation without a cache's rules: what retrieval tasks need."""

from __future__ import annotations

from typing import Any

import torch

from .memory import memory_for
from .models import Evaluated


@torch.no_grad()
def continue_greedily(evaluated: Evaluated, ids: list[int], count: int, stop: tuple[int, ...] = ()) -> list[int]:
    """``count`` tokens after ``ids`` (fewer when a ``stop`` token comes, which is left out), by the model's cache.

    Raises:
        ValueError: naming the length of ``ids``, where that does not fit into memory.
    """
    prompt = torch.tensor([ids], device=evaluated.device)
    model: Any = evaluated.model
    with memory_for(len(ids)):
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=list(stop) or None,
            pad_token_id=0,
        )
    new = out[0, len(ids) :].tolist()
    for i, token in enumerate(new):
        if token in stop:
            return new[:i]
    return new
