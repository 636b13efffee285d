"""attention: cases.

FLOPs: 4 D per query head and visible (query, key) pair. Pairs of a batch row, segments of l_i tokens:
    sum_i l_i (l_i + 1) / 2 + l_i (K + M)                      (causal, without recurrence)
Bytes: q, k, v, slots read once, out written once.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..ops.attention.api import attention
from ..segments import spans
from .case import Case, Inputs, Outputs
from .shapes import LLAMA3_8B, TINY, Layer, normal

K, M = 4, 8


def pairs(s: int, segment_len: int, slots: int) -> int:
    """Visible (query, key) pairs of one row and head."""
    lengths = [x.stop - x.start for x in spans(s, segment_len, None)]
    return sum(n * (n + 1) // 2 + n * slots for n in lengths)


def make(layer: Layer, b: int, s: int, segment_len: int, dtype: torch.dtype) -> Case:
    n = len(spans(s, segment_len, None))
    size = torch.finfo(dtype).bits // 8

    def inputs() -> Inputs:
        kv = (layer.hkv, layer.d)
        return {
            "q": normal(0, b, s, layer.hq, layer.d),
            "k": normal(1, b, s, *kv),
            "v": normal(2, b, s, *kv),
            "global_k": normal(3, b, K, *kv),
            "global_v": normal(4, b, K, *kv),
            "local_k": normal(5, b, n, M, *kv),
            "local_v": normal(6, b, n, M, *kv),
        }

    def call(x: Inputs, impl: str | None) -> Outputs:
        return (attention(**x, segment_len=segment_len, impl=impl),)

    def plain(x: Inputs) -> Outputs:
        return assembled(x, segment_len)

    tokens = b * s * (2 * layer.hq * layer.d + 2 * layer.hkv * layer.d)
    slots = b * 2 * layer.hkv * layer.d * (K + n * M)
    return Case(
        op="attention",
        name=layer.name,
        dtype=dtype,
        shape=f"batch {b}, {s} tokens, segments of {segment_len}, {layer.hq}/{layer.hkv} heads, D {layer.d}, "
        f"{K} global and {M} local slots",
        inputs=inputs,
        call=call,
        plain=plain,
        flops=4 * layer.d * layer.hq * b * pairs(s, segment_len, K + M),
        bytes=size * (tokens + slots),
        differentiable=("q", "k", "v", "global_k", "global_v", "local_k", "local_v"),
    )


def assembled(x: Inputs, segment_len: int) -> Outputs:
    """torch SDPA, one call per segment on concatenated keys and values."""
    outs = []
    for i, span in enumerate(spans(x["q"].shape[1], segment_len, None)):
        at = slice(span.start, span.stop)
        k = torch.cat((x["global_k"], x["local_k"][:, i], x["k"][:, at]), 1).transpose(1, 2)
        v = torch.cat((x["global_v"], x["local_v"][:, i], x["v"][:, at]), 1).transpose(1, 2)
        q = x["q"][:, at].transpose(1, 2)
        t, n = q.shape[2], k.shape[2]
        seen = torch.ones(t, n, dtype=torch.bool).tril(n - t)
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2))
    return (torch.cat(outs, 1),)


def cases(suite: str) -> list[Case]:
    if suite == "quick":
        return [make(TINY, 1, 1024, 256, torch.float32), make(TINY, 2, 1000, 256, torch.bfloat16)]
    return [make(LLAMA3_8B, 1, 1024, 256, dtype) for dtype in (torch.float32, torch.bfloat16)]
