"""merge_attention: cases.

FLOPs: 2 D per part, row and head. Bytes: parts and their lse once, result out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.merge_attention.api import merge_attention
from .case import Case, Inputs, Outputs
from .shapes import LLAMA3_8B, TINY, Layer, normal


def make(layer: Layer, parts: int, b: int, s: int, dtype: torch.dtype) -> Case:
    size = torch.finfo(dtype).bits // 8
    low = torch.float64 if dtype == torch.float64 else torch.float32

    def lses(x: Inputs) -> list[Tensor]:
        wide = torch.float64 if x["lses"].dtype == torch.float64 else low
        return [y.to(wide) for y in x["lses"]]

    def call(x: Inputs, impl: str | None) -> Outputs:
        return merge_attention(list(x["outs"]), lses(x), impl=impl)

    def plain(x: Inputs) -> Outputs:
        stacked = torch.stack(lses(x))
        weight = stacked.softmax(0).transpose(2, 3).unsqueeze(-1).to(x["outs"].dtype)
        return (weight * x["outs"]).sum(0), stacked.logsumexp(0)

    return Case(
        op="merge_attention",
        name=layer.name,
        dtype=dtype,
        shape=f"{parts} parts, batch {b}, {s} rows, {layer.hq} heads, D {layer.d}",
        inputs=lambda: {"outs": normal(0, parts, b, s, layer.hq, layer.d), "lses": normal(1, parts, b, layer.hq, s)},
        call=call,
        plain=plain,
        flops=2 * parts * b * s * layer.hq * layer.d,
        bytes=b * s * layer.hq * (parts + 1) * (size * layer.d + 4),
        differentiable=("outs", "lses"),
    )


def cases(suite: str) -> list[Case]:
    both = (torch.float32, torch.bfloat16)
    if suite == "quick":
        return [make(TINY, 3, 2, 512, dtype) for dtype in both]
    return [make(LLAMA3_8B, 3, 1, 4096 if suite == "cpu" else 512, dtype) for dtype in both]
