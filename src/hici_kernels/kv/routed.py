"""From routes to the pages that must be at hand, and attention over them.

Nothing here gathers the history: a call attends over a compact row of tokens

    [ sinks | U groups that its routes open among the records, per kv head | tail and tokens of the call ]

in which every kv head has its own groups in the middle part. Chunk numbers are moved so that the operation sees the
same sinks, window and opened groups as over the whole row: the rest of its arguments stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .on_device import upload

#: Queries of a call that counts as decoding. On an accelerator the groups it brings together have as much room as its
#: size asks for, whatever the routes say: so the host need not read them, and every tier makes the same row of tokens.
DECODE_QUERIES = 16
#: Tokens of opened groups per kv head that one attention call may bring together. A call over more queries is cut in
#: halves until it needs no more, so that memory is bounded however long the history is. The same in every tier.
GATHERED_TOKENS = 8192


class Opened(NamedTuple):
    """Groups of records that the queries of a call open: entry i is group ``group`` (of the row) for kv head ``head``
    of row ``row``, and stands at ``place`` among the groups of that head; ``most`` = the largest number of any head."""

    row: Tensor
    head: Tensor
    group: Tensor
    place: Tensor
    most: int
    slots: Tensor  # like the routes: place of every cold entry, -1 elsewhere


def opened(routes: Tensor, base: Tensor, kv_heads: int, groups_per_chunk: int) -> Opened:
    """Of routes [B, T, Hq, w] (int64, CPU); groups of chunks below base [B] lie in records."""
    b, _, hq, _ = routes.shape
    cold = (routes >= 0) & (routes < (base * groups_per_chunk)[:, None, None, None])
    space = max(1, int(base.max()) * groups_per_chunk) if b else 1
    owner = torch.arange(b)[:, None] * kv_heads + torch.arange(hq) // (hq // kv_heads)
    keys = (owner[:, None, :, None] * space + routes)[cold]
    distinct, inverse = _distinct(keys, b * kv_heads * space)
    owner = distinct // space
    place = torch.arange(len(distinct)) - torch.searchsorted(distinct, owner * space)
    slots = torch.full_like(routes, -1)
    slots[cold] = place[inverse]
    count = int(place.max()) + 1 if len(place) else 0
    return Opened(owner // kv_heads, owner % kv_heads, distinct % space, place, count, slots)


def room(base: Tensor, keep_first: int, per_chunk: int, entries: int) -> int:
    """Groups, of whole chunks, that ``entries`` routed groups of a kv head in records can be at most."""
    stored = (int(base.max()) - keep_first) * per_chunk if len(base) else 0
    return max(0, min(-(-entries // per_chunk) * per_chunk, stored))


def _distinct(keys: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """(sorted distinct keys, index of each key among them); keys in [0, bound)."""
    if len(keys) < bound // 8:
        return keys.unique(return_inverse=True)
    marks = torch.zeros(bound, dtype=torch.bool)
    marks[keys] = True
    return marks.nonzero().flatten(), (marks.cumsum(0) - 1)[keys]


def cuts(queries: int, size: int) -> list[slice]:
    """Ranges of at most ``size`` of so many queries."""
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]


def tiles(
    routes: Tensor, base: Tensor, kv_heads: int, groups_per_chunk: int, most: int, given: list[slice] | None = None
) -> Iterator[tuple[slice, Opened]]:
    """Ranges of queries with what they open: those ``given``, or such that they open at most ``most`` groups per kv
    head (or are one query)."""
    todo = [slice(0, routes.shape[1])] if given is None else given[::-1]
    while todo:
        rows = todo.pop()
        found = opened(routes[:, rows], base, kv_heads, groups_per_chunk)
        if given is None and found.most > most and rows.stop - rows.start > 1:
            middle = (rows.start + rows.stop) // 2
            todo += [slice(middle, rows.stop), slice(rows.start, middle)]
        else:
            yield rows, found


class Compact(NamedTuple):
    """Where the parts of every row stand: [0, sinks) chunks, ``between`` chunks of opened groups, then the tail."""

    sinks: Tensor  # [B]
    between: Tensor  # [B]
    shift: Tensor  # [B] chunks by which the tail has moved

    @classmethod
    def of(cls, base: Tensor, keep_first: int, chunks: int) -> Compact:
        # a row without records keeps its own numbers: its window may reach down to the sinks
        between = torch.where(base > keep_first, chunks, 0)
        sinks = base.clamp(max=keep_first)
        return cls(sinks, between, sinks + between - base)

    def routes(self, routes: Tensor, slots: Tensor, groups_per_chunk: int) -> Tensor:
        """Both [B, T, Hq, w] on one device, ``slots`` = places among the opened groups, -1 = elsewhere."""
        at = upload(torch.stack((self.shift, self.sinks)) * groups_per_chunk, routes.device)[:, :, None, None, None]
        return torch.where(routes < 0, -1, torch.where(slots < 0, routes + at[0], slots + at[1])).to(torch.int32)

    def positions(self, place: Tensor, chunk_size: int) -> Tensor:
        return torch.where(place < 0, -1, place + (self.shift * chunk_size)[:, None])

    def join(self, sinks: Tensor | None, middle: Tensor | None, recent: Tensor, lengths: list[int], c: int) -> Tensor:
        """One tensor [B, S', H, D] of sinks, opened groups and the rest ([B, R, H, D], ``lengths`` of it)."""
        b = recent.shape[0]
        first, between = self.sinks.tolist(), self.between.tolist()
        if b == 0 or (len(set(first)) == 1 and len(set(between)) == 1):
            parts = [recent]
            if b and between[0] and middle is not None:
                parts.insert(0, middle)
            if b and first[0] and sinks is not None:
                parts.insert(0, sinks[:, : first[0] * c])
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        rows = []
        for i, length in enumerate(lengths):
            row = [recent[i, :length]]
            if between[i] and middle is not None:
                row.insert(0, middle[i])
            if first[i] and sinks is not None:
                row.insert(0, sinks[i, : first[i] * c])
            rows.append(torch.cat(row))
        longest = max(len(row) for row in rows)
        return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, 0, 0, longest - len(row))) for row in rows])


def spread(found: Opened, groups: Tensor, batch: int, kv_heads: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, count group_size, Hkv, D] of the opened groups [n, 2, group_size, D], 0 where a head opens
    fewer than ``count``."""
    _, _, size, d = groups.shape
    middle = groups.new_zeros(2, batch, count, size, kv_heads, d)
    row, place, head = (upload(x, groups.device) for x in (found.row, found.place, found.head))
    for part in range(2):
        middle[part][row, place, :, head] = groups[:, part]
    keys, values = middle.flatten(2, 3)
    return keys, values
