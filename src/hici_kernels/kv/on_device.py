"""Attention of few queries whose routes stay on the device, so that no layer waits for the host to read them.

Which groups the routes open, where these lie, and (:mod:`.gather_bank`) which pages have to be fetched is found by
operations whose shapes follow from the sizes of a call and from what the host knows without asking: how long rows are
and where records lie. Lists have room for the most there can be; what is not needed is -1, or the address 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import load, select
from .layout import Layout

NEVER = torch.iinfo(torch.int64).max


def upload(x: Tensor, device: torch.device) -> Tensor:
    """``x`` of the host on the device. A copy from memory that is not pinned would wait for all work before it."""
    if device.type != "cuda" or x.is_cuda or not x.numel():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def refusal(device: torch.device, layout: Layout | None = None) -> str | None:
    """Why a kernel cannot read pages where they lie, for calls on ``device``; None = it can."""
    module, reason = load("gather_rows", "triton")
    if module is None:
        return reason
    found: str | None = module.rejects(torch.empty(0, dtype=torch.int64), module.WORD, device)
    if found is None and layout is not None:
        found = module.rejects(torch.empty(0, dtype=torch.int64), _data_bytes(layout), device)
    return found


def read(
    addresses: Tensor,
    row_bytes: int,
    aligned: bool,
    memory: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Rows at addresses [n] on the device; see gather_rows."""
    given = addresses, row_bytes, addresses.device, aligned, memory, places
    out: Tensor = select("gather_rows", "triton", *given).forward(*given)
    return out


class Opened(NamedTuple):
    """``group`` int64 [B, Hkv, room]: groups that the queries of a call open for a kv head, rising, -1 = none;
    ``slots`` int64 like the routes: the index there of what an entry opens, -1 where that is no record."""

    group: Tensor
    slots: Tensor


def opened(routes: Tensor, below: Tensor, kv_heads: int, room: int) -> Opened:
    """Of routes [B, T, Hq, w]; groups below ``below`` [B] lie in records, at most ``room`` of them are distinct."""
    b, t, hq, w = routes.shape
    by_heads = (b, t, kv_heads, hq // kv_heads * w)
    ids = routes.long().view(by_heads).transpose(1, 2).flatten(2)
    in_records = (ids >= 0) & (ids < below[:, None, None])
    ordered, order = torch.where(in_records, ids, NEVER).sort(dim=-1, stable=True)
    there = ordered != NEVER
    fresh = there.clone()
    fresh[..., 1:] &= ordered[..., 1:] != ordered[..., :-1]
    place = fresh.cumsum(-1) - 1
    # entries without a place of their own go to one more, which is cut off
    group = ids.new_full((b, kv_heads, room + 1), -1)
    group.scatter_(-1, torch.where(fresh, place, room), torch.where(fresh, ordered, -1))
    slots = torch.empty_like(ids).scatter_(-1, order, torch.where(there, place, -1))
    return Opened(group[..., :room], slots.view(b, kv_heads, t, by_heads[3]).transpose(1, 2).reshape(b, t, hq, w))


def pages_of(group: Tensor, records: Tensor, layout: Layout, per_chunk: int) -> Tensor:
    """Pages of groups [B, Hkv, room], -1 = none; ``records`` [B, chunks] of the rows, on the device."""
    chunk = (group // per_chunk).clamp(min=0).flatten(1)
    record = records.gather(1, chunk).view(group.shape)
    head = torch.arange(group.shape[1], device=records.device)[None, :, None]
    return torch.where(group < 0, -1, record * layout.pages + head)


def groups_at(addresses: Tensor, group: Tensor, layout: Layout) -> Tensor:
    """[2, ..., group_size, D] in the layout's dtype: keys and values of group ``group`` [...] of the pages at
    ``addresses`` [...] on the device, 0 where there is none."""
    size = layout.group_size
    data = _pieces(addresses, group, layout, 0, layout.data_bytes // 2, _data_bytes(layout))
    shape = (2, *addresses.shape, size, layout.head_dim)
    if not layout.cold:
        return data.view(layout.dtype).view(shape)
    scale = _pieces(addresses, group, layout, layout.scales_at, layout.chunk_size * 4, size * 4)
    small = data.view(torch.int8).view(shape)
    return (small.float() * scale.view(torch.float32).view(shape[:-1]).unsqueeze(-1)).to(layout.dtype)


def _data_bytes(layout: Layout) -> int:
    """Of the keys of a group; of its values as well."""
    return layout.group_size * layout.head_dim * (1 if layout.cold else layout.dtype.itemsize)


def _pieces(addresses: Tensor, group: Tensor, layout: Layout, start: int, half: int, size: int) -> Tensor:
    """uint8 [2 n, size]: of every page, from byte ``start`` on, piece ``group`` of its keys, then of its values."""
    first = addresses + (start + group * size)
    both = torch.stack((first, first + half))
    aligned = not any(x % 16 for x in (layout.page_bytes, start, half, size))
    return read(torch.where(addresses == 0, 0, both).flatten(), size, aligned)
