"""Attention over pages where they lie: nothing that a call opens is copied. Serves calls without gradients on the CPU.

csrc/cpu/hga_history.h turns routes into lists of pages, csrc/cpu/hga_attention.h attends over them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..config import HGAConfig
from ..ops.hga_attention.pages import GROUPS, attend_pages
from .layer import LayerState
from .layout import Layout

#: Queries attended at once: who sees which group is a mask for every query, head and page.
QUERIES = 128
#: More queries than these are attended fewer at a time where their masks, or the pages of one kv head, would take more
#: bytes. The same in every tier.
FEW, MASK_BYTES, LIST_BYTES = 16, 64 << 20, 64 << 20
#: Bytes of masks that no limit counts.
SMALL_BYTES = 1 << 20


class Lists(NamedTuple):
    """Pages by row and kv head, as :func:`~hici_kernels.ops.hga_attention.pages.pages_attention` takes them.

    k, v: addresses, still to be filled in at the entries ``at``, which are the pages ``number`` of records.
    """

    k: Tensor
    v: Tensor
    starts: Tensor
    offsets: Tensor
    visible: Tensor
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
        and config.groups_per_chunk <= GROUPS
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


def lists(
    state: LayerState,
    config: HGAConfig,
    pages: int,
    recent: dict[str, Tensor],
    place: Tensor,
    routes: Tensor,
) -> Lists:
    """What the queries at ``place`` [B, T] see: sinks, what ``routes`` [B, T, Hq, w] open, window and own chunk."""
    b, t, hq, width = routes.shape
    kv_heads = recent["k"].shape[2]
    r, c = hq // kv_heads, config.chunk_size
    windows = config.keep_first + config.keep_last + 2 + t // c
    room = b * kv_heads * min(windows + t * r * width, int(place.max()) // c + 1)
    space = torch.empty((5, room), dtype=torch.int64)
    k, v, starts, at, number = space.unbind()
    offsets = torch.empty(b * kv_heads + 1, dtype=torch.int64)
    visible = torch.empty((room, t, r), dtype=torch.int64)
    counts = torch.empty(2, dtype=torch.int64)
    _native.library().hga_history_pages(
        routes,
        place,
        state.base,
        state.records,
        pages,
        c,
        config.group_size,
        config.keep_first,
        config.keep_last,
        state.buffers.get("sinks.k"),
        state.buffers.get("sinks.v"),
        recent["k"],
        recent["v"],
        k,
        v,
        starts,
        offsets,
        visible,
        at,
        number,
        counts,
    )
    n, cold = counts.tolist()
    return Lists(k[:n], v[:n], starts[:n], offsets, visible[:n], at[:cold], number[:cold])


def too_large(found: Lists, layout: Layout) -> bool:
    """Whether the queries of these lists should be attended fewer at a time."""
    longest = int((found.offsets[1:] - found.offsets[:-1]).max())
    return found.visible.nbytes > MASK_BYTES or longest * layout.page_bytes > LIST_BYTES


def only(found: Lists, first: int, last: int) -> Lists:
    """Lists [first, last) as they are, all others empty: what each of them gives stays the same to the bit."""
    begin, end = int(found.offsets[first]), int(found.offsets[last])
    here = (found.at >= begin) & (found.at < end)
    return Lists(
        found.k[begin:end],
        found.v[begin:end],
        found.starts[begin:end],
        (found.offsets - begin).clamp(0, end - begin),
        found.visible[begin:end],
        found.at[here] - begin,
        found.number[here],
    )


def attend(found: Lists, addresses: Tensor, config: HGAConfig, layout: Layout, q: Tensor, place: Tensor) -> Tensor:
    """``addresses`` of the pages ``found.number``."""
    if len(found.at):
        found.k[found.at] = addresses
        found.v[found.at] = addresses + layout.data_bytes // 2
    out, _ = attend_pages(
        q,
        found.k,
        found.v,
        found.starts,
        found.offsets,
        found.visible,
        place,
        layout.kv_heads,
        config.chunk_size,
        config.group_size,
        layout.head_dim,
        layout.head_dim,
        layout.head_dim**-0.5,
    )
    return out
