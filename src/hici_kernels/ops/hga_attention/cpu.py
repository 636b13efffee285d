"""hga_attention in C++: csrc/cpu/hga_attention.h says how a call becomes lists of runs, kernels/hga_*.cpp how those are
attended.

Sums in float32. Results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..hga_route import cpu as router
from ..hga_summaries import cpu as summariser
from ..hga_summaries.supers import super_chunk_keys


def unavailable() -> str | None:
    return _native.status()


def rejects(q: Tensor, *rest: object) -> str | None:
    if not q.is_cpu:
        return f"it serves CPU tensors, q is on {q.device}"
    if q.dtype == torch.float64:
        return "it serves float32, bfloat16 and float16, q is float64"
    return None


def tokens(
    q: Tensor, k: Tensor, positions: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(index of each query [B, T], -1 = sees nothing; column of each token [B, S]); None = as they stand."""
    t, s = q.shape[1], k.shape[1]
    if attention_mask is not None:
        mask = attention_mask != 0
        if not mask.all():
            place = mask.cumsum(1)
            index = place[:, s - t :] - 1 if positions is None else positions.to(torch.int64)
            exists = mask[:, s - t :] & (index >= 0) & (index < place[:, -1:])
            columns = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
            return torch.where(exists, index, -1).contiguous(), columns.contiguous()
    if positions is None:
        return None, None
    index = positions.to(torch.int64)
    return torch.where((index >= 0) & (index < s), index, -1).contiguous(), None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor | None,
    attention_mask: Tensor | None,
    routes: Tensor | None,
    group_size: int,
    chunk_size: int,
    keep_first: int,
    keep_last: int,
    topk_chunks: int,
    topk_groups: int,
    routing: str,
    route_block: int,
    share: str,
    super_chunk: int,
    topk_supers: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, T, Hq, D], lse [B, Hq, T], routes [B, T, Hq, w])."""
    b, t, hq, _ = q.shape
    index, columns = tokens(q, k, positions, attention_mask)
    if routes is None:
        chunk_keys, group_keys = summariser.of_rows(k, inv_freq, None, columns, chunk_size, group_size)
        at = index
        if at is None:
            s = k.shape[1]
            at = torch.arange(s - t, s).expand(b, t)
        routes = router.forward(
            q,
            chunk_keys,
            group_keys,
            at,
            0,
            chunk_size,
            keep_first,
            keep_last,
            topk_chunks,
            topk_groups,
            routing,
            route_block,
            share,
            super_chunk,
            topk_supers,
            super_chunk_keys(chunk_keys, super_chunk) if super_chunk else None,
        )
    else:
        routes = routes.clone(memory_format=torch.contiguous_format)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((b, hq, t), dtype=torch.float32)
    _native.library().hga_attention_forward(
        q,
        k,
        v,
        index,
        columns,
        routes,
        group_size,
        chunk_size,
        keep_first,
        keep_last,
        scale,
        out,
        lse,
        *_native.execution(),
    )
    return out, lse, routes


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor | None,
    attention_mask: Tensor | None,
    routes: Tensor,
    group_size: int,
    chunk_size: int,
    keep_first: int,
    keep_last: int,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v) with the routes held fixed."""
    index, columns = tokens(q, k, positions, attention_mask)
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    if grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    _native.library().hga_attention_backward(
        grad_out,
        grad_lse.contiguous(),
        out,
        lse,
        q,
        k,
        v,
        index,
        columns,
        routes.contiguous(),
        group_size,
        chunk_size,
        keep_first,
        keep_last,
        rest[-1],
        *gradients,
        *_native.execution(),
    )
    return gradients  # type: ignore[return-value]
