"""attention: cases.

FLOPs: 4 D per query head and visible (query, key) pair. Pairs of a batch row, segments of l_i tokens:
    sum_i l_i (l_i + 1) / 2 + l_i (K + M)                      (causal, without recurrence)
Exponentials: one per pair and query head. Bytes: q, k, v, slots read once, out written once.

torch SDPA at its best gets segments folded into the batch and is_causal=True on the tokens alone: no mask tensor, no
slots (12 keys of 4,108 less to see), and with "expanded" also one copy of K and V per query head made beforehand (its
backward then leaves out their sum).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.attention.api import attention
from ..segments import spans
from .case import PLAIN, Baseline, Case, Inputs, Outputs, Part
from .shapes import LLAMA3_8B, TINY, Layer, drawn

K, M = 4, 8
EXPANDED = "SDPA, expanded"
GROUPED = "SDPA, enable_gqa"
SLOTS = ("global_k", "global_v", "local_k", "local_v")


def pairs(s: int, segment_len: int, slots: int) -> int:
    """Visible (query, key) pairs of one row and head."""
    lengths = [x.stop - x.start for x in spans(s, segment_len, None)]
    return sum(n * (n + 1) // 2 + n * slots for n in lengths)


def heads_part(layer: Layer) -> Part:
    """The first and the last kv head and their query heads: no other head enters their results or gradients."""
    kv = sorted({0, layer.hkv - 1})
    group = layer.hq // layer.hkv
    queries = torch.tensor([g * group + i for g in kv for i in range(group)])
    keys = torch.tensor(kv)

    def inputs(x: Inputs) -> Inputs:
        return {n: t.index_select(-2, queries if n == "q" else keys) for n, t in x.items()}

    def outputs(found: Outputs) -> Outputs:
        return tuple(t.index_select(-2, queries) for t in found)

    return Part(f"kv heads {', '.join(map(str, kv))} of {layer.hkv}, of the timed call itself", inputs, outputs)


def fold(x: Tensor, segment_len: int) -> Tensor:
    """[B, S, heads, D] as contiguous [B * N, heads, segment_len, D]."""
    return x.unflatten(1, (-1, segment_len)).flatten(0, 1).transpose(1, 2).contiguous()


def sdpa_inputs(x: Inputs, segment_len: int, expanded: bool) -> Inputs:
    """What SDPA wants to be given: segments in the batch, and a copy of K and V per query head."""
    q, k, v = (fold(x[n], segment_len) for n in "qkv")
    if expanded:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return {"q": q, "k": k, "v": v}


def sdpa(x: Inputs, grouped: bool) -> Outputs:
    return (F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, enable_gqa=grouped),)


def sdpa_baselines(segment_len: int) -> dict[str, Baseline]:
    tokens = "segments folded into the batch beforehand, tokens only: it computes no slot"
    return {
        EXPANDED: Baseline(
            functools.partial(sdpa, grouped=False),
            functools.partial(sdpa_inputs, segment_len=segment_len, expanded=True),
            backward=True,
            note=f"{tokens}; K and V expanded to every query head beforehand",
        ),
        GROUPED: Baseline(
            functools.partial(sdpa, grouped=True),
            functools.partial(sdpa_inputs, segment_len=segment_len, expanded=False),
            note=tokens,
        ),
    }


def make(layer: Layer, b: int, s: int, segment_len: int, dtype: torch.dtype, *, judged: bool = False) -> Case:
    """judged: against SDPA at its best, on tensors of which only a part is compared with float64."""
    n = len(spans(s, segment_len, None))
    size = torch.finfo(dtype).bits // 8

    def inputs() -> Inputs:
        kv = (layer.hkv, layer.d)
        return {
            "q": drawn(dtype, 0, b, s, layer.hq, layer.d),
            "k": drawn(dtype, 1, b, s, *kv),
            "v": drawn(dtype, 2, b, s, *kv),
            "global_k": drawn(dtype, 3, b, K, *kv),
            "global_v": drawn(dtype, 4, b, K, *kv),
            "local_k": drawn(dtype, 5, b, n, M, *kv),
            "local_v": drawn(dtype, 6, b, n, M, *kv),
        }

    def call(x: Inputs, impl: str | None) -> Outputs:
        return (attention(**x, segment_len=segment_len, impl=impl),)

    def plain(x: Inputs) -> Outputs:
        return assembled(x, segment_len)

    tokens = b * s * (2 * layer.hq * layer.d + 2 * layer.hkv * layer.d)
    slots = b * 2 * layer.hkv * layer.d * (K + n * M)
    seen = layer.hq * b * pairs(s, segment_len, K + M)
    return Case(
        op="attention",
        name=layer.name,
        dtype=dtype,
        shape=f"batch {b}, {s} tokens, segments of {segment_len}, {layer.hq}/{layer.hkv} heads, D {layer.d}, "
        f"{K} global and {M} local slots",
        inputs=inputs,
        call=call,
        plain=plain,
        flops=4 * layer.d * seen,
        bytes=size * (tokens + slots),
        exps=seen,
        differentiable=("q", "k", "v", *SLOTS),
        baselines=sdpa_baselines(segment_len) if judged else {},
        against=EXPANDED if judged else PLAIN,
        part=heads_part(layer) if judged else None,
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
    both = (torch.float32, torch.bfloat16)
    if suite == "quick":
        return [make(TINY, 1, 1024, 256, torch.float32), make(TINY, 2, 1000, 256, torch.bfloat16)]
    if suite == "cpu":
        return [make(LLAMA3_8B, 1, 16384, 4096, dtype, judged=True) for dtype in both]
    return [make(LLAMA3_8B, 1, 1024, 256, dtype) for dtype in both]
