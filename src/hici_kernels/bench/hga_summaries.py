"""hga_summaries: cases.

FLOPs: 14 per key element (chunk and group: a rotation of 6 per pair, so 3 per element, and 4 additions). Bytes: keys
once, summaries out.
"""

from __future__ import annotations

import torch

from ..ops.hga_summaries.api import hga_summaries
from ..rope import Rope
from .case import Case, Inputs, Outputs
from .shapes import LLAMA3_8B, TINY, Layer, normal

C, GROUP = 64, 16


def make(layer: Layer, b: int, s: int, dtype: torch.dtype) -> Case:
    size = torch.finfo(dtype).bits // 8
    rope = Rope.from_theta(1e6, layer.d)
    n = s // C

    def call(x: Inputs, impl: str | None) -> Outputs:
        return hga_summaries(x["k"], rope=rope, chunk_size=C, group_size=GROUP, impl=impl)

    def plain(x: Inputs) -> Outputs:
        k = x["k"][:, : n * C]
        return summary(k, C, rope), summary(k, GROUP, rope).unflatten(1, (n, C // GROUP))

    return Case(
        op="hga_summaries",
        name=layer.name,
        dtype=dtype,
        shape=f"batch {b}, {s} keys, {layer.hkv} kv heads, D {layer.d}, chunks of {C}, groups of {GROUP}",
        inputs=lambda: {"k": normal(0, b, s, layer.hkv, layer.d)},
        call=call,
        plain=plain,
        flops=14 * b * s * layer.hkv * layer.d,
        bytes=size * b * layer.hkv * layer.d * (s + n + n * C // GROUP),
    )


def summary(k: torch.Tensor, length: int, rope: Rope) -> torch.Tensor:
    """The formula over whole tensors: rotate every key to its anchor, average, choose by pair."""
    half = rope.inv_freq.shape[0]
    wide = k.to(torch.float64 if k.dtype == torch.float64 else torch.float32)
    x = wide.unflatten(1, (-1, length))
    offset = (length - 1) // 2 - torch.arange(length)
    angle = offset.to(x.dtype)[:, None, None] * rope.inv_freq.to(x.dtype)
    low, high = x[..., :half], x[..., half:]
    turned = torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1).mean(2)
    fast = torch.nonzero((C - 1) * rope.inv_freq.double() > 0.5)
    cut = int(fast.max()) + 1 if len(fast) else 0
    pair = torch.arange(2 * half) % half
    return torch.where(pair < cut, x.mean(2), turned).to(k.dtype)


def cases(suite: str) -> list[Case]:
    if suite == "cpu":
        return []
    if suite == "quick":
        return [make(TINY, 2, 1000, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return [make(LLAMA3_8B, 1, 4096, dtype) for dtype in (torch.float32, torch.bfloat16)]
