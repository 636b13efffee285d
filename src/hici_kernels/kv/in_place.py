"""Attention over pages where they lie: nothing that a call opens is copied. Serves calls without gradients on the CPU.

csrc/cpu/hga_history.h lists the pages of a call, csrc/cpu/hga_attention.h attends over them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..config import HGAConfig
from ..ops.hga_attention.pages import attend_pages
from ..ops.merge_attention.op import merge_forward
from .layer import LayerState
from .layout import Layout

#: Bytes of pages of a list that are attended at once, the same in every tier and under every limit, so that all give
#: the same bits.
LIST_BYTES = 64 << 20


class Lists(NamedTuple):
    """Pages by row and kv head, as :func:`~hici_kernels.ops.hga_attention.pages.pages_attention` takes them.

    k, v: addresses, still to be filled in at the entries ``at``, which are the pages ``number`` of records.
    """

    k: Tensor
    v: Tensor
    chunks: Tensor
    offsets: Tensor
    at: Tensor
    number: Tensor


def serves(config: HGAConfig, layout: Layout, q: Tensor, impl: str) -> bool:
    """Whether a call is attended in place. Depends on the call and what came before it, never on the tier."""
    return (
        impl in ("", "cpu")
        and q.device.type == "cpu"
        and q.shape[1] > 0
        and q.shape[0] > 0
        and q.dtype != torch.float64
        and not layout.cold
        and q.stride(3) == 1
        and _native.status() is None
    )


def like_pages(recent: dict[str, Tensor], layout: Layout) -> bool:
    """Whether tokens of a kv head lie side by side, as in a page, keys and values alike."""
    k, v = recent["k"], recent["v"]
    return k.stride(1) == v.stride(1) == layout.head_dim and k.stride(3) == v.stride(3) == 1


def by_heads(x: Tensor) -> Tensor:
    """A copy of [B, S, H, D] that lies [B, H, S, D]."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2)


def longest(config: HGAConfig, r: int, queries: int, width: int, last: int) -> int:
    """Pages of a list at most: of ``queries`` of ``r`` heads with ``width`` groups each, of index at most ``last``."""
    windows = config.keep_first + config.keep_last + 2 + queries // config.chunk_size
    return min(windows + queries * r * width, last // config.chunk_size + 1)


def lists(
    state: LayerState, config: HGAConfig, pages: int, recent: dict[str, Tensor], place: Tensor, routes: Tensor
) -> Lists:
    """What the queries at ``place`` [B, T] see: sinks, what ``routes`` [B, T, Hq, w] open, window and own chunk."""
    b, t, hq, width = routes.shape
    kv_heads = recent["k"].shape[2]
    room = b * kv_heads * longest(config, hq // kv_heads, t, width, int(place.max()))
    space = torch.empty((5, room), dtype=torch.int64)
    k, v, chunks, at, number = space.unbind()
    offsets = torch.empty(b * kv_heads + 1, dtype=torch.int64)
    counts = torch.empty(2, dtype=torch.int64)
    _native.library().hga_history_pages(
        routes,
        place,
        state.base,
        state.records,
        pages,
        config.chunk_size,
        config.group_size,
        config.keep_first,
        config.keep_last,
        state.buffers.get("sinks.k"),
        state.buffers.get("sinks.v"),
        recent["k"],
        recent["v"],
        k,
        v,
        chunks,
        offsets,
        at,
        number,
        counts,
    )
    n, cold = counts.tolist()
    return Lists(k[:n], v[:n], chunks[:n], offsets, at[:cold], number[:cold])


def only(found: Lists, begin: int, end: int, first: int, count: int) -> Lists:
    """Pages [begin, end) of the ``count`` lists from ``first`` on."""
    here = (found.at >= begin) & (found.at < end)
    return Lists(
        found.k[begin:end],
        found.v[begin:end],
        found.chunks[begin:end],
        (found.offsets[first : first + count + 1] - begin).clamp(0, end - begin),
        found.at[here] - begin,
        found.number[here],
    )


def attend(
    found: Lists,
    addresses: Tensor,
    config: HGAConfig,
    layout: Layout,
    q: Tensor,
    place: Tensor,
    routes: Tensor,
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Results and lse. ``addresses`` of the pages ``found.number``; wide: results in float32."""
    if len(found.at):
        found.k[found.at] = addresses
        found.v[found.at] = addresses + layout.data_bytes // 2
    return attend_pages(
        q,
        found.k,
        found.v,
        found.chunks,
        found.offsets,
        place,
        routes,
        (len(found.offsets) - 1) // len(place),
        config.group_size,
        config.chunk_size,
        config.keep_first,
        config.keep_last,
        layout.head_dim,
        layout.head_dim,
        layout.head_dim**-0.5,
        wide=wide,
    )


def merge(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Results of two parts of a list, in float32."""
    out, lse = merge_forward([x[0], y[0]], [x[1], y[1]], "")
    return out, lse
