"""hga_attention: cases.

FLOPs: 4 D per query head and visible (query, key) pair, counted from the routes: windows, own chunk and opened groups;
the routing itself is counted under hga_route. Bytes: q, k, v once, out once.
"plain PyTorch" attends the same pairs through a mask made from the routes; dense causal SDPA does more work.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..config import HGAConfig
from ..ops.hga_attention.api import hga_attention
from ..rope import Rope
from .case import Baseline, Case, Inputs, Outputs
from .hga_route import pool
from .shapes import LLAMA3_8B, TINY, Layer, normal


def pairs(s: int, config: HGAConfig) -> int:
    """Visible (query, key) pairs of one row and query head, strict routing."""
    total = 0
    for p in range(s):
        between = pool(p, config)
        n = p // config.chunk_size
        groups = min(config.topk_groups, min(config.topk_chunks, between) * config.groups_per_chunk)
        total += (n - between) * config.chunk_size + p % config.chunk_size + 1 + groups * config.group_size
    return total


def make(layer: Layer, b: int, s: int, config: HGAConfig, dtype: torch.dtype) -> Case:
    size = torch.finfo(dtype).bits // 8
    rope = Rope.from_theta(1e6, layer.d)

    def inputs() -> Inputs:
        q, k, v = (
            normal(0, b, s, layer.hq, layer.d),
            normal(1, b, s, layer.hkv, layer.d),
            normal(2, b, s, layer.hkv, layer.d),
        )
        # the choice is made once, from the rounded numbers every side gets
        rounded = [x.to(dtype) for x in (q, k, v)]
        routes = hga_attention(
            rounded[0], rounded[1], rounded[2], config, rope=rope, return_routes=True, impl="reference"
        ).routes
        assert routes is not None
        return {"q": q, "k": k, "v": v, "seen": visible(routes, s, config)}

    def call(x: Inputs, impl: str | None) -> Outputs:
        return (hga_attention(x["q"], x["k"], x["v"], config, rope=rope, impl=impl),)

    return Case(
        op="hga_attention",
        name=layer.name,
        dtype=dtype,
        shape=f"batch {b}, {s} tokens, {layer.hq}/{layer.hkv} heads, D {layer.d}, sinks {config.keep_first}, window "
        f"{config.keep_last}, picks {config.topk_chunks} chunks, {config.topk_groups} groups, "
        f"{100 * pairs(s, config) / (s * (s + 1) / 2):.0f} % of the pairs",
        inputs=inputs,
        call=call,
        plain=masked,
        flops=4 * layer.d * layer.hq * b * pairs(s, config),
        bytes=size * b * s * layer.d * 2 * (layer.hq + layer.hkv),
        differentiable=("q", "k", "v"),
        baselines={"dense causal SDPA": Baseline(dense)},
    )


def visible(routes: torch.Tensor, s: int, config: HGAConfig) -> torch.Tensor:
    """bool [B, Hq, S, S] of the pairs attended."""
    b, _, hq, _ = routes.shape
    groups = -(-s // config.group_size)
    opened = torch.zeros(b, s, hq, groups + 1, dtype=torch.bool)
    opened.scatter_(-1, torch.where(routes < 0, groups, routes).long(), True)
    key, query = torch.arange(s), torch.arange(s)[:, None]
    own = query // config.chunk_size
    first = own.clamp(max=config.keep_first) * config.chunk_size
    last = torch.minimum((own - config.keep_last).clamp(min=config.keep_first), own) * config.chunk_size
    near = (key < first) | (key >= last)
    routed = opened[..., :groups].repeat_interleave(config.group_size, -1)[..., :s].transpose(1, 2)
    return (near | routed) & (key <= query)


def masked(x: Inputs) -> Outputs:
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    return (F.scaled_dot_product_attention(q, k, v, attn_mask=x["seen"], enable_gqa=True).transpose(1, 2),)


def dense(x: Inputs) -> Outputs:
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)


def cases(suite: str) -> list[Case]:
    if suite == "cpu":
        return []
    small = HGAConfig(keep_first=1, keep_last=2, topk_chunks=4, topk_groups=8)
    if suite == "quick":
        return [make(TINY, 1, 1024, small, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return [make(LLAMA3_8B, 1, 1024, small, torch.float32)]
