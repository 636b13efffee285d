"""Attention of the contract by one dense score matrix: truth in float64, plain PyTorch in any other dtype.

It shares nothing with the package's implementations but the cut into segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..segments import spans
from .case import Inputs, Outputs


def dense_attention(x: Inputs, options: dict[str, Any]) -> Outputs:
    """(out, lse) of ``attention(**x, **options)``: matmul, softmax in float32 at least, matmul in the inputs' dtype."""
    q, k, v = x["q"], x["k"], x["v"]
    b, t, hq, d = q.shape
    s, hkv = k.shape[1:3]
    cut = spans(s, options.get("segment_len"), options.get("cu_seqlens"))
    n = len(cut)
    device = q.device
    column = torch.arange(s, device=device)
    segment = torch.zeros(s, dtype=torch.long, device=device)
    reach = torch.zeros(s, dtype=torch.long, device=device)
    for i, span in enumerate(cut):
        segment[span.start : span.stop] = i
        reach[span.start : span.stop] = span.start - (0 if span.first else options.get("recurrence_len", 0))
    mask = options.get("attention_mask")
    token = torch.ones(b, s, dtype=torch.bool, device=device) if mask is None else mask != 0
    rows = slice(s - t, s)
    seen = (column[None, :] >= reach[rows, None]) & (segment[None, :] <= segment[rows, None])
    if options.get("causal", True):
        seen &= column[None, :] <= column[rows, None]
    seen = seen[None] & token[:, None, :]

    keys, values, visible = [], [], []
    slot_seen = options.get("prefix_mask")
    for name in ("global", "local"):
        slot_k, slot_v = x.get(f"{name}_k"), x.get(f"{name}_v")
        if slot_k is None or slot_v is None:
            continue
        if slot_k.ndim == 4:
            slot_k, slot_v = (y[:, None].expand(-1, n, -1, -1, -1) for y in (slot_k, slot_v))
        own = segment[rows, None] == torch.arange(n, device=device)[None, :]
        own = own[None].expand(b, -1, -1)
        if slot_seen is not None:
            own = own & slot_seen.expand(b, -1)[:, None, :]
        keys.append(slot_k.flatten(1, 2))
        values.append(slot_v.flatten(1, 2))
        visible.append(own.repeat_interleave(slot_k.shape[2], 2))
    seen = torch.cat((*visible, seen), 2) & token[:, rows, None]
    keys.append(k)
    values.append(v)
    all_k, all_v = (torch.cat(y, 1).repeat_interleave(hq // hkv, 2).transpose(1, 2) for y in (keys, values))
    scores = (q.transpose(1, 2) @ all_k.transpose(2, 3)) * options.get("scale", d**-0.5)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~seen[:, None], -torch.inf)
    some = seen.any(-1)[:, None, :, None]
    weights = torch.softmax(torch.where(some, scores, 0.0), -1)
    out = torch.where(some, weights.to(q.dtype) @ all_v, 0.0)
    return out.transpose(1, 2), torch.logsumexp(scores, -1)


def seeded(seed: int, device: torch.device) -> Any:
    """normal(*shape): float64 numbers of one stream, the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    return normal
