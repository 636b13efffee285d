"""Attention over pages anywhere in memory: what a cache calls that keeps its history in records of its own.

A page is the keys and values of consecutive tokens of one kv head (a chunk of the history). Who sees which groups of it
is a bitmask per query and query head, so that a page is read once for all heads that opened something in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks, _native
from ...errors import ImplError

#: Groups of a page at most: the bits of a mask.
GROUPS = 64


def pages_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    starts: Tensor,
    offsets: Tensor,
    visible: Tensor,
    positions: Tensor,
    *,
    kv_heads: int,
    page_tokens: int,
    group_size: int,
    k_stride: int,
    v_stride: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention of T queries a row over lists of pages.

    Query t of row b, head h = g * r + i with r = Hq // kv_heads, attends the tokens of index at most positions[b, t] in
    the groups m of the pages x in [offsets[b * kv_heads + g], offsets[b * kv_heads + g + 1]) where bit m of
    visible[x, t, i] is set; token j of page x has index starts[x] + j. One softmax over all of them. Groups that a
    query sees are attended as they are: no token may lie in two pages of a list. Pages may come in any order, which
    decides the order of additions.

    Args:
        q: [B, T, Hq, D], float32, bfloat16 or float16, any strides with a contiguous last dim.
        k_pages, v_pages: int64 [P], addresses (``Tensor.data_ptr()``) of each page's first key and value, in q's dtype.
            Token j lies k_stride (v_stride) elements times j further, its D numbers side by side. The caller keeps the
            memory alive and readable for the tokens that some query sees; other memory is not read, and may hold NaN.
        starts: int64 [P], index of each page's first token.
        offsets: int64 [B * kv_heads + 1], 0 first, P last, not decreasing.
        visible: uint8 or int64 [P, T, r], the bits of a mask: page_tokens // group_size at most 8 or 64.
        positions: int64 [B, T], index of each query; negative = it sees nothing.
        kv_heads, page_tokens, group_size, k_stride, v_stride: sizes, in tokens and elements.
        scale: default D ** -0.5.

    Returns:
        (out [B, T, Hq, D] in q.dtype, lse [B, Hq, T] float32): 0 and -inf for a query that sees nothing. Partial
        results over different pages combine by :func:`merge_attention`. Not differentiable. Deterministic; results do
        not depend on the number of threads.

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
    for name, size in (
        ("kv_heads", kv_heads),
        ("page_tokens", page_tokens),
        ("group_size", group_size),
    ):
        _checks.integer(name, size, 1)
    b, t, hq, d = q.shape
    if hq % kv_heads:
        raise ValueError(f"q has {hq} heads, expected a multiple of kv_heads {kv_heads}")
    if page_tokens % group_size or page_tokens // group_size > GROUPS:
        raise ValueError(f"group_size must divide page_tokens {page_tokens} into at most {GROUPS}, got {group_size}")
    pages = k_pages.shape[0] if isinstance(k_pages, Tensor) and k_pages.ndim == 1 else 0
    for name, x, shape in (
        ("k_pages", k_pages, (pages,)),
        ("v_pages", v_pages, (pages,)),
        ("starts", starts, (pages,)),
        ("offsets", offsets, (b * kv_heads + 1,)),
        ("visible", visible, (pages, t, hq // kv_heads)),
        ("positions", positions, (b, t)),
    ):
        types = (torch.uint8, torch.int64) if name == "visible" else (torch.int64,)
        if not isinstance(x, Tensor) or x.dtype not in types or x.device.type != "cpu":
            expected = " or ".join(str(x).removeprefix("torch.") for x in types)
            raise TypeError(f"{name} must be of type {expected}, on the CPU")
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    bits = 8 * visible.dtype.itemsize
    if page_tokens // group_size > bits:
        raise ValueError(f"visible must have a bit for each of {page_tokens // group_size} groups, got {visible.dtype}")
    if _native.status() is not None:
        raise ImplError(str(_native.status()))
    return attend_pages(
        q,
        k_pages.contiguous(),
        v_pages.contiguous(),
        starts.contiguous(),
        offsets.contiguous(),
        visible.contiguous(),
        positions.contiguous(),
        kv_heads,
        page_tokens,
        group_size,
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
