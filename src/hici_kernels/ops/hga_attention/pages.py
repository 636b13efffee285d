"""Attention over pages anywhere in memory: what a cache calls that keeps its history in records of its own.

A page is the keys and values of one chunk of the history of one kv head. It is read once for all queries and heads that
see something of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks, _native
from ...errors import ImplError


def pages_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    chunks: Tensor,
    offsets: Tensor,
    positions: Tensor,
    routes: Tensor,
    *,
    kv_heads: int,
    group_size: int,
    chunk_size: int,
    keep_first: int,
    keep_last: int,
    k_stride: int,
    v_stride: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention of T queries a row over the chunks of a history that lie in pages.

    Query t of row b, head h = g * r + i with r = Hq // kv_heads, attends what :func:`hga_attention` attends (sinks, the
    groups that routes[b, t, h] name, window and own chunk up to positions[b, t]) of the chunks of the pages x in
    [offsets[b * kv_heads + g], offsets[b * kv_heads + g + 1]), and nothing of other chunks. One softmax over all of it;
    results over different chunks combine by :func:`merge_attention`.

    Args:
        q: [B, T, Hq, D], float32, bfloat16 or float16, any strides with a contiguous last dim.
        k_pages, v_pages: int64 [P], addresses (``Tensor.data_ptr()``) of each page's first key and value, in q's dtype.
            Token j lies k_stride (v_stride) elements times j further, its D numbers side by side. The caller keeps the
            memory alive and readable for the tokens that some query sees; other memory is not read, and may hold NaN.
        chunks: int64 [P], number of each page's chunk: it holds the tokens from chunks[x] * chunk_size on. Ascending in
            every list.
        offsets: int64 [B * kv_heads + 1], 0 first, P last, not decreasing.
        positions: int64 [B, T], index of each query; negative = it sees nothing.
        routes: int32 [B, T, Hq, w], ids of opened groups as :func:`hga_route` gives them.
        kv_heads, group_size, chunk_size, keep_first, keep_last, k_stride, v_stride: sizes, in tokens, chunks and
            elements.
        scale: default D ** -0.5.

    Returns:
        (out [B, T, Hq, D] in q.dtype, lse [B, Hq, T] float32): 0 and -inf for a query that sees nothing. Not
        differentiable. Deterministic; results do not depend on the number of threads.

    Raises:
        TypeError, ValueError: naming the argument; contents of addresses cannot be checked. ImplError: no native
        library.
    """
    _checks.tensor("q", q, "B, T, Hq, D")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"q must be float32, bfloat16 or float16, got {q.dtype}")
    if q.device.type != "cpu":
        raise ValueError(f"q must be on the CPU, got {q.device}")
    _checks.last_contiguous(q=q)
    for name, size, least in (
        ("kv_heads", kv_heads, 1),
        ("group_size", group_size, 1),
        ("chunk_size", chunk_size, 1),
        ("keep_first", keep_first, 0),
        ("keep_last", keep_last, 0),
    ):
        _checks.integer(name, size, least)
    b, t, hq, d = q.shape
    if hq % kv_heads:
        raise ValueError(f"q has {hq} heads, expected a multiple of kv_heads {kv_heads}")
    if chunk_size % group_size:
        raise ValueError(f"group_size must divide chunk_size {chunk_size}, got {group_size}")
    pages = k_pages.shape[0] if isinstance(k_pages, Tensor) and k_pages.ndim == 1 else 0
    width = routes.shape[3] if isinstance(routes, Tensor) and routes.ndim == 4 else 0
    for name, x, shape in (
        ("k_pages", k_pages, (pages,)),
        ("v_pages", v_pages, (pages,)),
        ("chunks", chunks, (pages,)),
        ("offsets", offsets, (b * kv_heads + 1,)),
        ("positions", positions, (b, t)),
        ("routes", routes, (b, t, hq, width)),
    ):
        dtype = torch.int32 if name == "routes" else torch.int64
        if not isinstance(x, Tensor) or x.dtype != dtype or x.device.type != "cpu":
            raise TypeError(f"{name} must be of type {str(dtype).removeprefix('torch.')}, on the CPU")
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    if _native.status() is not None:
        raise ImplError(str(_native.status()))
    return attend_pages(
        q,
        k_pages.contiguous(),
        v_pages.contiguous(),
        chunks.contiguous(),
        offsets.contiguous(),
        positions.contiguous(),
        routes.contiguous(),
        kv_heads,
        group_size,
        chunk_size,
        keep_first,
        keep_last,
        k_stride,
        v_stride,
        d**-0.5 if scale is None else scale,
    )


def attend_pages(q: Tensor, *rest: object, wide: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`pages_attention` of arguments that are right: all of them, in order, the lists contiguous.

    wide: out in float32, to be merged before it is rounded.
    """
    b, t, hq, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float32 if wide else q.dtype)
    lse = torch.empty((b, hq, t), dtype=torch.float32)
    _native.library().hga_pages_forward(q, *rest, out, lse, *_native.execution())
    return out, lse
