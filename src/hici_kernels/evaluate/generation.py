"""Greedy continuation without a cache's rules: what retrieval tasks need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .memory import memory_for
from .models import Evaluated


@torch.no_grad()
def continue_greedily(evaluated: Evaluated, ids: list[int], count: int, stop: tuple[int, ...] = ()) -> list[int]:
    """``count`` tokens after ``ids`` (fewer when a ``stop`` token or the model's own end of text comes, which is left
    out), by the model's cache. Nothing else of the model's generation settings (penalties, beams) has a say.

    Raises:
        ValueError: naming the length of ``ids``, where that does not fit into memory.
    """
    prompt = torch.tensor([ids], device=evaluated.device)
    model: Any = evaluated.model
    with memory_for(len(ids)), _greedy(model, stop) as ends:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count)
    new = out[0, len(ids) :].tolist()
    for i, token in enumerate(new):
        if token in ends:
            return new[:i]
    return new


@contextlib.contextmanager
def _greedy(model: nn.Module, stop: tuple[int, ...]) -> Iterator[set[int]]:
    """The model with generation settings that only end texts; yields the tokens that do."""
    from transformers import GenerationConfig, PreTrainedModel

    # settings that a call leaves out are taken from the model's
    inner: Any = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    own = inner.generation_config
    end = getattr(own, "eos_token_id", None)
    ends = {*stop, *(end if isinstance(end, list) else [] if end is None else [end])}
    inner.generation_config = GenerationConfig(do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=0)
    try:
        yield ends
    finally:
        inner.generation_config = own
