"""hga_route in C++ (csrc/cpu/hga_route.h): scores stream past and only those that may still win are kept.

Scores are sums in float32 in one order per path; ids do not depend on the number of threads or on the split into calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native

ROUTING = {"strict": 0, "prefix": 1, "block": 2}


def unavailable() -> str | None:
    return _native.status()


def rejects(q: Tensor, *rest: object) -> str | None:
    if not q.is_cpu:
        return f"it serves CPU tensors, q is on {q.device}"
    if q.dtype == torch.float64:
        return "it serves float32, bfloat16 and float16, q is float64"
    return None


def forward(
    q: Tensor,
    chunk_keys: Tensor,
    group_keys: Tensor,
    positions: Tensor | None,
    context: int,
    chunk_size: int,
    keep_first: int,
    keep_last: int,
    topk_chunks: int,
    topk_groups: int,
    routing: str,
    route_block: int,
    share: str,
    super_chunk: int = 0,
    topk_supers: int = 0,
    super_keys: Tensor | None = None,
) -> Tensor:
    """int32 [B, T - context, Hq, min(topk_groups, n M)]."""
    b, t, hq, _ = q.shape
    width = min(topk_groups, chunk_keys.shape[1] * group_keys.shape[2])
    routes = torch.empty((b, t - context, hq, width), dtype=torch.int32)
    if positions is not None:
        positions = positions.to(torch.int64).contiguous()
    _native.library().hga_route(
        q,
        chunk_keys,
        group_keys,
        positions,
        context,
        chunk_size,
        keep_first,
        keep_last,
        min(topk_chunks, chunk_keys.shape[1]),
        topk_groups,
        ROUTING[routing],
        route_block,
        share == "kv",
        super_keys if super_chunk else None,
        super_chunk,
        topk_supers,
        routes,
        *_native.execution(),
    )
    return routes
