"""The HGA operations at one layer of Qwen3-8B, as ``hici tune`` measures them. FLOPs and bytes are what a pass must do
at least: of routed attention those of the tokens that are seen, every group read once for all queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import HGAConfig
from ..ops.hga_attention.api import hga_attention
from ..ops.hga_route.api import budgets, hga_route
from ..ops.hga_summaries.api import hga_summaries
from ..rope import Rope
from .case import Inputs, Outputs
from .gpu_cases import GpuCase, Work

HEADS, KV_HEADS = 32, 8
NO_BACKWARD = Work(0, 0)


def _random(device: torch.device, dtype: torch.dtype, *sizes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator(device).manual_seed(0)
    return [torch.randn(size, generator=g, device=device).to(dtype) for size in sizes]


def summaries_case(tokens: int, dtype: torch.dtype, d: int = 128) -> GpuCase:
    """Summaries of a whole text."""
    c, rope = HGAConfig(), Rope.from_theta(1e6, d)
    sizes: dict[str, Any] = {"chunk_size": c.chunk_size, "group_size": c.group_size}
    numbers = tokens * KV_HEADS * d
    outs = tokens // c.chunk_size * (1 + c.groups_per_chunk) * KV_HEADS * d

    def call(x: Inputs, impl: str) -> Outputs:
        return hga_summaries(x["k"], rope=rope, impl=impl, **sizes)

    return GpuCase(
        op="hga_summaries",
        name=f"{tokens} tokens",
        shape=f"{tokens} tokens, {KV_HEADS} kv heads, D {d}, chunks of {c.chunk_size}, groups of {c.group_size}",
        dtype=dtype,
        inputs=lambda device: dict(zip("k", _random(device, dtype, (1, tokens, KV_HEADS, d)), strict=True)),
        options=sizes,
        call=call,
        forward=Work(5 * numbers, dtype.itemsize * (numbers + outs)),
        backward=NO_BACKWARD,
        arguments=lambda x: (x["k"], rope.inv_freq, None, c.chunk_size, c.group_size),
    )


def route_case(chunks: int, queries: int, dtype: torch.dtype, d: int = 128) -> GpuCase:
    """Routes of the last queries of a history, strict."""
    c = HGAConfig()
    m = c.groups_per_chunk
    names = ("q", "chunk_keys", "group_keys")
    shapes = ((1, queries, HEADS, d), (1, chunks, KV_HEADS, d), (1, chunks, m, KV_HEADS, d))
    scanned = queries * HEADS * (chunks + c.topk_chunks * m)
    read = chunks * KV_HEADS * d + queries * HEADS * (d + c.topk_chunks * m * d)

    def call(x: Inputs, impl: str) -> Outputs:
        return (hga_route(x["q"], x["chunk_keys"], x["group_keys"], c, impl=impl),)

    return GpuCase(
        op="hga_route",
        name=f"{queries} queries over {chunks} chunks",
        shape=f"{queries} queries, {chunks} chunks, {HEADS}/{KV_HEADS} heads, D {d}, {c.topk_chunks} chunks, "
        f"{c.topk_groups} groups",
        dtype=dtype,
        inputs=lambda device: dict(zip(names, _random(device, dtype, *shapes), strict=True)),
        options={"config": c},
        call=call,
        forward=Work(2 * d * scanned, dtype.itemsize * read),
        backward=NO_BACKWARD,
        arguments=lambda x: (*(x[n] for n in names), None, 0, *budgets(c), None),
    )


def routed_case(tokens: int, queries: int, dtype: torch.dtype, d: int = 128) -> GpuCase:
    """Routed attention of the last queries of a text, routes found in the same call."""
    c, rope, names = HGAConfig(), Rope.from_theta(1e6, d), "qkv"
    shapes = ((1, queries, HEADS, d), (1, tokens, KV_HEADS, d), (1, tokens, KV_HEADS, d))
    seen = min((c.keep_first + c.keep_last) * c.chunk_size + c.chunk_size // 2 + c.topk_groups * c.group_size, tokens)
    rest = (c.group_size, *budgets(c), d**-0.5)

    def call(x: Inputs, impl: str) -> Outputs:
        return (hga_attention(x["q"], x["k"], x["v"], c, rope=rope, impl=impl),)

    return GpuCase(
        op="hga_attention",
        name=f"{queries} queries of {tokens} tokens",
        shape=f"{queries} queries, {tokens} tokens, {HEADS}/{KV_HEADS} heads, D {d}, default budgets",
        dtype=dtype,
        inputs=lambda device: dict(zip(names, _random(device, dtype, *shapes), strict=True)),
        options={"config": c},
        call=call,
        forward=Work(4 * d * HEADS * queries * seen, dtype.itemsize * 2 * d * KV_HEADS * min(queries * seen, tokens)),
        backward=NO_BACKWARD,
        arguments=lambda x: (*(x[n] for n in names), rope.inv_freq, None, None, None, *rest),
    )
