"""hga_route: cases.

FLOPs: 2 D per query head and scored summary: all chunks of the pool, then the M groups of the picked chunks. Bytes:
queries and chunk keys once, the group keys of every group once, ids out.
Ids are compared as numbers: a choice decided by less than float32 resolution would show as an error.
"""

from __future__ import annotations

import torch

from ..config import HGAConfig
from ..ops.hga_route.api import hga_route
from .case import Case, Inputs, Outputs
from .shapes import LLAMA3_8B, TINY, Layer, normal


def pool(p: int, config: HGAConfig) -> int:
    """Chunks strictly between sinks and window of a query at index p."""
    n = p // config.chunk_size
    first = min(config.keep_first, n)
    return min(max(config.keep_first, n - config.keep_last), n) - first


def scored(s: int, config: HGAConfig) -> int:
    """Summaries that all queries of a text of s tokens score, per query head."""
    pools = [pool(p, config) for p in range(s)]
    return sum(x + min(config.topk_chunks, x) * config.groups_per_chunk for x in pools)


def make(layer: Layer, b: int, s: int, config: HGAConfig, dtype: torch.dtype) -> Case:
    size = torch.finfo(dtype).bits // 8
    n, m = s // config.chunk_size, config.groups_per_chunk

    def inputs() -> Inputs:
        return {
            "q": normal(0, b, s, layer.hq, layer.d),
            "chunk_keys": normal(1, b, n, layer.hkv, layer.d),
            "group_keys": normal(2, b, n, m, layer.hkv, layer.d),
        }

    def call(x: Inputs, impl: str | None) -> Outputs:
        return (hga_route(**x, config=config, impl=impl).double(),)

    def plain(x: Inputs) -> Outputs:
        return (chosen(x, config).double(),)

    return Case(
        op="hga_route",
        name=layer.name,
        dtype=dtype,
        shape=f"batch {b}, {s} queries, {layer.hq}/{layer.hkv} heads, D {layer.d}, {n} chunks, picks "
        f"{config.topk_chunks} chunks, {config.topk_groups} groups",
        inputs=inputs,
        call=call,
        plain=plain,
        # the truth is the choice by float32 scores of the same rounded numbers, not by float64 ones
        oracle=lambda x: plain({k: v.to(torch.float64) for k, v in x.items()}),
        flops=2 * layer.d * layer.hq * b * scored(s, config),
        bytes=b * (size * layer.d * (s * layer.hq + n * (1 + m) * layer.hkv) + 4 * s * layer.hq * config.topk_groups),
    )


def chosen(x: Inputs, config: HGAConfig) -> torch.Tensor:
    """Two matrix products and two sorts over all queries at once."""
    q, m = x["q"].double(), config.groups_per_chunk
    t, hq = q.shape[1:3]
    n, hkv = x["chunk_keys"].shape[1:3]
    r = hq // hkv
    own = torch.arange(t) // config.chunk_size
    first, last = own.clamp(max=config.keep_first), (own - config.keep_last).clamp(min=config.keep_first)
    at = torch.arange(n)
    inside = (at >= first[:, None]) & (at < torch.minimum(last, own)[:, None])
    s = torch.einsum("bthd,bchd->bthc", q, x["chunk_keys"].double().repeat_interleave(r, 2)).float()
    s = s.masked_fill(~inside[:, None], -torch.inf)
    picked = s.sort(dim=-1, descending=True, stable=True).indices[..., : config.topk_chunks]
    keep = torch.zeros_like(s, dtype=torch.bool).scatter(-1, picked, True) & inside[:, None]
    groups = x["group_keys"].double().flatten(1, 2).repeat_interleave(r, 2)
    g = torch.einsum("bthd,bchd->bthc", q, groups).float().masked_fill(~keep.repeat_interleave(m, -1), -torch.inf)
    order = g.sort(dim=-1, descending=True, stable=True)
    width = min(config.topk_groups, n * m)
    ids = torch.where(order.values > -torch.inf, order.indices, n * m)[..., :width].sort(-1).values
    ids = torch.where(ids < n * m, ids, -1)
    return torch.nn.functional.pad(ids, (0, config.topk_groups - width), value=-1)


def cases(suite: str) -> list[Case]:
    if suite == "cpu":
        return []
    small = HGAConfig(keep_first=1, keep_last=2, topk_chunks=4, topk_groups=8)
    if suite == "quick":
        return [make(TINY, 1, 1024, small, torch.float32)]
    return [make(LLAMA3_8B, 1, 1024, small, torch.float32)]
