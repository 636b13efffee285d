"""What routed attention reads, counted exactly from the routes it returned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import HGAConfig

__all__ = ["PairCount", "StepBytes", "count_pairs", "dense_step_bytes", "regions", "step_bytes"]


@dataclass(frozen=True)
class PairCount:
    """(query, key) pairs over all query heads of one attention call.

    Attributes:
        seen: pairs whose score entered the softmax.
        causal: pairs that dense causal attention computes.
        scored: dot products with chunk and group keys that served the choice alone.
    """

    seen: int
    causal: int
    scored: int

    def __add__(self, other: PairCount) -> PairCount:
        return PairCount(self.seen + other.seen, self.causal + other.causal, self.scored + other.scored)

    @property
    def density(self) -> float:
        """Share of the causal pairs that was computed, in (0, 1]."""
        return self.seen / self.causal


@dataclass(frozen=True)
class StepBytes:
    """Bytes one decode step reads in one layer, each kv head's data counted once however many heads share it.

    Attributes:
        scan: chunk keys of the pool.
        groups: group keys of the picked chunks.
        opened: K and V of the opened groups.
        windows: K and V of sinks, local window and the query's own chunk.
    """

    scan: int
    groups: int
    opened: int
    windows: int

    def __add__(self, other: StepBytes) -> StepBytes:
        return StepBytes(
            self.scan + other.scan,
            self.groups + other.groups,
            self.opened + other.opened,
            self.windows + other.windows,
        )

    @property
    def total(self) -> int:
        return self.scan + self.groups + self.opened + self.windows


def regions(index: Tensor, config: HGAConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(n, f, l) of tokens ``index``: own chunk, end of the sinks, start of the local window, all in chunks.

    n = index // C;  f = min(F, n);  l = min(max(F, n - W), n). The pool is chunks [f, l).
    """
    own = torch.div(index, config.chunk_size, rounding_mode="floor")
    sinks = own.clamp(max=config.keep_first)
    local = torch.minimum((own - config.keep_last).clamp(min=config.keep_first), own)
    return own, sinks, local


def count_pairs(routes: Tensor, config: HGAConfig) -> PairCount:
    """Pairs of a prefill whose T queries are tokens 0..T-1.

    Query p sees f C + (opened groups) gs + (p + 1 - l C) keys and, to choose, scores (l - f) chunk keys and
    min(Kc, l - f) M group keys, per query head.

    Args:
        routes: [B, T, Hq, Kg] group ids, unused entries -1.
        config: the configuration the routes come from.
    """
    b, t, hq, _ = routes.shape
    index = torch.arange(t)
    _, sinks, local = regions(index, config)
    fixed = sinks * config.chunk_size + index + 1 - local * config.chunk_size
    opened = int((routes >= 0).sum()) * config.group_size
    pool = local - sinks
    scored = pool + pool.clamp(max=config.topk_chunks) * config.groups_per_chunk
    rows = b * hq
    return PairCount(
        seen=rows * int(fixed.sum()) + opened,
        causal=rows * (t * (t + 1) // 2),
        scored=rows * int(scored.sum()) if config.topk_chunks and config.topk_groups else 0,
    )


def _distinct(ids: Tensor, kv_heads: int) -> int:
    """Distinct non-negative ids per kv head, summed; ids [1, 1, Hq, n]."""
    per_kv = ids[0, 0].reshape(kv_heads, -1)
    return sum(int(torch.unique(row[row >= 0]).numel()) for row in per_kv)


def step_bytes(
    routes: Tensor, candidates: Tensor, config: HGAConfig, *, length: int, kv_heads: int, head_dim: int, itemsize: int
) -> StepBytes:
    """Bytes the step at token ``length - 1`` reads in one layer, one row.

    Args:
        routes: [1, 1, Hq, Kg], the groups this token opened.
        candidates: [1, 1, Hq, n], all groups of the chunks it picked (its route with unlimited topk_groups).
        config: the configuration of the routes.
        length: tokens in the cache, the step's own included.
        kv_heads, head_dim, itemsize: of the cache; itemsize in bytes.
    """
    index = torch.tensor(length - 1)
    _, sinks, local = (int(x) for x in regions(index, config))
    key = head_dim * itemsize
    fixed = sinks * config.chunk_size + length - local * config.chunk_size
    picks = bool(config.topk_chunks and config.topk_groups)
    return StepBytes(
        scan=(local - sinks) * kv_heads * key if picks else 0,
        groups=_distinct(candidates, kv_heads) * key if picks else 0,
        opened=_distinct(routes, kv_heads) * config.group_size * 2 * key,
        windows=fixed * kv_heads * 2 * key,
    )


def dense_step_bytes(*, length: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of K and V that dense attention reads in one layer at token ``length - 1``."""
    return length * kv_heads * 2 * head_dim * itemsize
