"""local_slots: cases.

FLOPs, as stated by the formula: 4 S H E (two projections) + 4 S M E (scores and weighted sum). An implementation that
folds the projections into the slots spends fewer and is still rated by these. Bytes: hidden and weights once, slots
out.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..ops.local_slots.api import local_slots
from ..segments import spans
from .case import Case, Inputs, Outputs
from .shapes import LLAMA3_8B, TINY, Layer, normal

M = 8
WIDE, NARROW = "H 4096", "H 512"


def make(layer: Layer, b: int, s: int, segment_len: int, width: int, heads: int, dtype: torch.dtype) -> Case:
    h, n = layer.hidden, len(spans(s, segment_len, None))
    size = torch.finfo(dtype).bits // 8

    def inputs() -> Inputs:
        return {
            "hidden": normal(0, b, s, h),
            "slot_queries": normal(1, M, width),
            "k_weight": normal(2, width, h) / h**0.5,
            "v_weight": normal(3, width, h) / h**0.5,
        }

    def call(x: Inputs, impl: str | None) -> Outputs:
        return (local_slots(**x, num_heads=heads, segment_len=segment_len, impl=impl),)

    def plain(x: Inputs) -> Outputs:
        found = []
        for span in spans(s, segment_len, None):
            tokens = x["hidden"][:, span.start : span.stop]
            split = (b, span.stop - span.start, heads, width // heads)
            k = (tokens @ x["k_weight"].T).view(split).transpose(1, 2)
            v = (tokens @ x["v_weight"].T).view(split).transpose(1, 2)
            q = x["slot_queries"].view(M, heads, -1).transpose(0, 1).expand(b, -1, -1, -1)
            found.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, M, width))
        return (torch.stack(found, 1),)

    return Case(
        op="local_slots",
        name=layer.name,
        dtype=dtype,
        shape=f"batch {b}, {s} tokens, segments of {segment_len}, H {h}, E {width}, {heads} heads, M {M}",
        inputs=inputs,
        call=call,
        plain=plain,
        flops=4 * b * s * width * (h + M),
        bytes=size * (b * s * h + 2 * width * h + M * width + b * n * M * width),
        differentiable=("hidden", "slot_queries", "k_weight", "v_weight"),
    )


def cases(suite: str) -> list[Case]:
    both = (torch.float32, torch.bfloat16)
    if suite == "quick":
        return [make(TINY, 2, 1000, 256, 64, 4, dtype) for dtype in both]
    if suite == "cpu":
        hosts = [LLAMA3_8B._replace(name=name, hidden=hidden) for name, hidden in ((WIDE, 4096), (NARROW, 512))]
        return [make(host, 1, 4096, 4096, 512, 8, dtype) for host in hosts for dtype in both]
    return [make(LLAMA3_8B, 1, 2048, 512, 512, 8, dtype) for dtype in both]
