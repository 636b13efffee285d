"""Share of the causal (query, key) pairs that a method computes, by its rules."""

from __future__ import annotations

from typing import Any

import torch

from .. import segments
from ..config import HGAConfig, HiCIConfig
from ..demo.counting import regions
from ..nn.prefix import uses_global, uses_local


def density_of(method: str, config: Any, length: int) -> float:
    """Pairs of one head over S = ``length`` tokens, divided by S (S + 1) / 2. Slots count as keys, building them not.

    HGA: what its budgets allow (a query near the start has fewer candidates); scoring of routes not counted.
    """
    causal = length * (length + 1) // 2
    if not causal or method in ("none", "dca"):
        return 1.0
    return (_hici(config, length) if method == "hici" else _hga(config, length)) / causal


def _hici(config: HiCIConfig, length: int) -> int:
    g = config.resolve_segment_len(length)
    slots = config.global_slots * uses_global(config) + config.num_local_slots * uses_local(config)
    spans = segments.spans(length, g, None)
    shifted = config.context_mode in ("causal_shift", "causal_shift_g")
    total = 0
    for i, span in enumerate(spans):
        n = span.stop - span.start
        off = (shifted and i == 0) or (config.single_segment == "off" and len(spans) == 1)
        total += n * (n + 1) // 2 + n * ((0 if off else slots) + (min(config.recurrence_len, g) if i else 0))
    return total


def _hga(config: HGAConfig, length: int) -> int:
    index = torch.arange(length)
    _, sinks, local = regions(index, config)
    fixed = sinks * config.chunk_size + index + 1 - local * config.chunk_size
    groups = ((local - sinks).clamp(max=config.topk_chunks) * config.groups_per_chunk).clamp(max=config.topk_groups)
    return int(fixed.sum() + groups.sum() * config.group_size)
