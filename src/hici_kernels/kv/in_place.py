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
from ..ops.merge_attention.op import merge_forward
from .layer import LayerState
from .layout import Layout

#: Queries attended at once, fewer where the masks of one list would take more than MASK_BYTES; pages of a list that do
#: are attended LIST_BYTES at a time. The same in every tier and under every limit, so that all give the same bits.
QUERIES, MASK_BYTES, LIST_BYTES = 1024, 8 << 20, 64 << 20
#: Queries of a call that is attended at once for all rows and kv heads, as long as its masks are small.
FEW = 16


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


def mask_type(config: HGAConfig) -> torch.dtype:
    return torch.uint8 if config.groups_per_chunk <= 8 else torch.int64


def longest(config: HGAConfig, r: int, queries: int, width: int, last: int) -> int:
    """Pages of a list at most: of ``queries`` of ``r`` heads with ``width`` groups each, of index at most ``last``."""
    windows = config.keep_first + config.keep_last + 2 + queries // config.chunk_size
    return min(windows + queries * r * width, last // config.chunk_size + 1)


def mask_bytes(config: HGAConfig, r: int, queries: int, width: int, last: int) -> int:
    """Bytes of the masks of a list at most."""
    return longest(config, r, queries, width, last) * queries * r * mask_type(config).itemsize


def lists(
    state: LayerState,
    config: HGAConfig,
    pages: int,
    recent: dict[str, Tensor],
    place: Tensor,
    routes: Tensor,
    of: tuple[slice, slice] | None = None,
) -> Lists:
    """What the queries at ``place`` [B, T] see: sinks, what ``routes`` [B, T, Hq, w] open, window and own chunk.

    of: the layer's rows and kv heads that place and routes are of; None = all.
    """
    b, t, hq, width = routes.shape
    base, records = state.base, state.records
    given = (state.buffers.get("sinks.k"), state.buffers.get("sinks.v"), recent["k"], recent["v"])
    if of is not None:
        base, records = base[of[0]], records[of[0]]
        given = tuple(None if x is None else x[of[0], :, of[1]] for x in given)  # type: ignore[assignment]
    kv_heads = given[2].shape[2]
    r = hq // kv_heads
    room = b * kv_heads * longest(config, r, t, width, int(place.max()))
    space = torch.empty((5, room), dtype=torch.int64)
    k, v, starts, at, number = space.unbind()
    offsets = torch.empty(b * kv_heads + 1, dtype=torch.int64)
    visible = torch.empty((room, t, r), dtype=mask_type(config))
    counts = torch.empty(2, dtype=torch.int64)
    _native.library().hga_history_pages(
        routes,
        place,
        base,
        records,
        pages,
        config.chunk_size,
        config.group_size,
        config.keep_first,
        config.keep_last,
        *given,
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
    number = number[:cold]
    return Lists(
        k[:n], v[:n], starts[:n], offsets, visible[:n], at[:cold], number if of is None else number + of[1].start
    )


def only(found: Lists, begin: int, end: int) -> Lists:
    """Pages [begin, end) of all lists."""
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


def attend(
    found: Lists, addresses: Tensor, config: HGAConfig, layout: Layout, q: Tensor, place: Tensor, *, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """Results and lse. ``addresses`` of the pages ``found.number``; wide: results in float32."""
    if len(found.at):
        found.k[found.at] = addresses
        found.v[found.at] = addresses + layout.data_bytes // 2
    return attend_pages(
        q,
        found.k,
        found.v,
        found.starts,
        found.offsets,
        found.visible,
        place,
        (len(found.offsets) - 1) // len(place),
        config.chunk_size,
        config.group_size,
        layout.head_dim,
        layout.head_dim,
        layout.head_dim**-0.5,
        wide=wide,
    )


def merge(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Results of two parts of a list, in float32."""
    out, lse = merge_forward([x[0], y[0]], [x[1], y[1]], "")
    return out, lse


def units(batch: int, kv_heads: int, count: int) -> list[tuple[slice, slice]]:
    """Rows and kv heads whose lists are there at once, about ``count`` lists, which what a list gives does not tell."""
    rows = batch if count >= batch else 1
    heads = max(1, min(kv_heads, count // max(1, rows)))
    return [
        (slice(b, min(b + rows, batch)), slice(h, min(h + heads, kv_heads)))
        for b in range(0, batch, rows)
        for h in range(0, kv_heads, heads)
    ]
