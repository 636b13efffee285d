"""attention in Triton: which segment, queries and keys a program works on. Shared by forward and backward.

Positions count the S tokens of k; query row t stands at position ``first_query + t``, first_query = S - T.
Segment i holds positions [start, stop); its queries also see the ``back`` positions before ``start`` (recurrence),
which belong to the segment before it, of the same document. So the token keys of a segment are one run,
[start - back, stop), and the queries that see a key of it are one run too: those of its own segment, and for a key at
``stop - recurrence_len`` or later those up to ``reach``, the stop of the next segment of the document (``reach ==
stop``: there is none).

A tile is a run of at most ``size`` positions of one segment: queries in the forward and for dQ (``queries=True``: only
positions from first_query on are cut, counted from the first of them), keys for dK and dV. Tiles are numbered by
segment, and within a segment from its start, or from its end (``reverse``: causal queries near the end see most, and
the longest work should start first). Per-segment results (gradients of slots) are summed over the segment's tiles in
that order: :func:`tiles_of`.

    cut = Cut.of(q, k, segment_len, recurrence_len, cu_seqlens, slots)      segments; nothing is launched
    tiles = cut.tiles(size)                                                 one small kernel if packed, else nothing
    kernel[(tiles.count, ...)](..., **tiles.arguments, SIZE=size, PACKED=cut.packed, REVERSE=True)
    segment, first, start, stop, back, reach = tile_of(...)                 in the kernel; first >= stop: no such tile

Without ``cu_seqlens`` all of it is arithmetic on the program's number. With it, :func:`place_tiles` writes one row of
int32 per tile, on the device that holds ``cu_seqlens``: nothing is read back. The number of tiles is then a bound, and
surplus tiles have first = stop = 0. Contents that are no offsets of S tokens give wrong segments, but positions stay
within [0, S) and segments within [0, segments).

Positions are int32 (S < 2^30); offsets in memory are to be computed in int64 by the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: numbers per tile in the table: segment, first, start, stop, back, reach, and two unused for alignment
COLUMNS = tl.constexpr(8)

# Documents and tiles that one step of place_tiles compares.
BLOCK_DOCUMENTS = 64
BLOCK_TILES = 64

LARGEST_LENGTH = 2**30


@dataclass(frozen=True)
class Tiles:
    """Tiles of one size.

    Args:
        count: programs to launch along the tile axis; a bound if packed.
        per_segment: tiles of a full segment. Unpacked: tile x lies in segment ``first_segment + x // per_segment``.
        table: int32 [count, 8] if packed, else None.
        runs: int32 [segments, 2], the tiles [begin, end) of each segment, if packed and asked for, else None.
        arguments: what :func:`tile_of` takes, by the names of its parameters.
    """

    count: int
    per_segment: int
    first_segment: int
    table: Tensor | None
    runs: Tensor | None
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Cut:
    """Segments of one call.

    Args:
        queries, tokens: T and S.
        first_query: S - T, the position of query row 0.
        segment_len: at least 1 and at most S (for S > 0), also where the call gave none.
        recurrence_len: tokens of the previous segment that are seen.
        segments: N, or a bound of it if packed and no slots tell it.
        cu_seqlens: int32 [docs + 1] or None.
    """

    queries: int
    tokens: int
    first_query: int
    segment_len: int
    recurrence_len: int
    segments: int
    cu_seqlens: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        segment_len: int,
        recurrence_len: int,
        cu_seqlens: Tensor | None,
        slots: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    ) -> Cut:
        """``slots``: (global_k, local_k, prefix_mask), whose N is the number of segments where there is one."""
        t, s = q.shape[1], k.shape[1]
        length = max(min(segment_len or s, s), 1)
        if cu_seqlens is None:
            n = -(-s // length)
        else:
            global_k, local_k, prefix_mask = slots
            known = [x.shape[1] for x in (local_k, global_k) if x is not None and x.ndim == 5]
            known += [] if prefix_mask is None else [prefix_mask.shape[-1]]
            documents = max(cu_seqlens.shape[0] - 1, 0)
            n = known[0] if known else min(s // length + documents, s)
        return cls(t, s, s - t, length, recurrence_len, n, cu_seqlens)

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def tiles(self, size: int, *, queries: bool = True, reverse: bool = True, runs: bool = False) -> Tiles:
        """Cut into tiles of ``size`` positions: of the queries, or (``queries=False``) of all tokens.

        ``reverse`` must be what the kernel passes to :func:`tile_of` as REVERSE; ``runs``: for :func:`tiles_of`.
        """
        first = self.first_query if queries else 0
        if self.cu_seqlens is None:
            first_segment = first // self.segment_len
            per_segment = -(-min(self.tokens - first, self.segment_len) // size)
            count = (self.segments - first_segment) * per_segment
            return self._tiles(count, per_segment, first_segment, first, None, None)
        per_segment = -(-self.segment_len // size)
        # a segment has at most one tile that is not full, and none has more tiles than a full one
        count = min(self.segments * per_segment, self.tokens // size + self.segments)
        table = torch.empty(count, COLUMNS.value, dtype=torch.int32, device=self.cu_seqlens.device)
        # a segment that does not exist has none
        found = table.new_zeros(self.segments, 2) if runs else None
        if count:
            place_tiles[(triton.cdiv(count, BLOCK_TILES),)](
                self.cu_seqlens,
                table,
                found,
                self.cu_seqlens.shape[0] - 1,
                count,
                self.tokens,
                self.segments,
                self.segment_len,
                self.recurrence_len,
                per_segment,
                SIZE=size,
                REVERSE=reverse,
                DOCUMENTS=BLOCK_DOCUMENTS,
                TILES=BLOCK_TILES,
                num_warps=4,
            )
        return self._tiles(count, per_segment, 0, 0, table, found)

    def _tiles(
        self,
        count: int,
        per_segment: int,
        first_segment: int,
        first: int,
        table: Tensor | None,
        runs: Tensor | None,
    ) -> Tiles:
        arguments = {
            "tile_table": table,
            "tiles_per_segment": per_segment,
            "first_segment": first_segment,
            "first_query": first,
            "segment_len": self.segment_len,
            "recurrence_len": self.recurrence_len,
            "tokens": self.tokens,
        }
        return Tiles(count, per_segment, first_segment, table, runs, arguments)


@triton.jit
def tile_of(
    tile,
    tile_table,
    tiles_per_segment,
    first_segment,
    first_query,
    segment_len,
    recurrence_len,
    tokens,
    SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """(segment, first, start, stop, back, reach) of a tile; its positions are [first, min(first + SIZE, stop))."""
    if PACKED:
        row = tile_table + tile.to(tl.int64) * COLUMNS
        segment = tl.load(row)
        first = tl.load(row + 1)
        start = tl.load(row + 2)
        stop = tl.load(row + 3)
        back = tl.load(row + 4)
        reach = tl.load(row + 5)
    else:
        segment = first_segment + tile // tiles_per_segment
        inside = tile % tiles_per_segment
        if REVERSE:
            inside = tiles_per_segment - 1 - inside
        start = segment * segment_len
        stop = tl.minimum(start + segment_len, tokens)
        first = tl.maximum(start, first_query) + inside * SIZE
        back = tl.where(segment > 0, recurrence_len, 0)
        reach = tl.where(recurrence_len > 0, tl.minimum(stop + segment_len, tokens), stop)
    return segment, first, start, stop, back, reach


@triton.jit
def tiles_of(
    segment,
    runs,
    tiles_per_segment,
    first_segment,
    first_query,
    segment_len,
    tokens,
    SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """[begin, end): the query tiles of a segment, those that do not exist left out."""
    if PACKED:
        begin = tl.load(runs + segment * 2)
        end = tl.load(runs + segment * 2 + 1)
    else:
        start = segment * segment_len
        stop = tl.minimum(start + segment_len, tokens)
        existing = tl.cdiv(tl.maximum(stop - tl.maximum(start, first_query), 0), SIZE)
        begin = tl.maximum(segment - first_segment, 0) * tiles_per_segment
        if REVERSE:
            begin += tiles_per_segment - existing
        end = begin + existing
    return begin, end


@triton.jit
def place_tiles(
    cu_seqlens,
    table,
    runs,
    documents,
    count,
    tokens,
    segments,
    segment_len,
    recurrence_len,
    tiles_per_segment,
    SIZE: tl.constexpr,
    REVERSE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """table [count, 8] and, where given, runs [segments, 2]: tiles of packed documents, by running sums over those."""
    x = tl.program_id(0) * TILES + tl.arange(0, TILES)
    d = tl.arange(0, DOCUMENTS)
    # of the documents that end at or before tile x: how many tiles and segments they have, and where the last one ends
    tiles_before = tl.zeros((TILES,), tl.int32)
    segments_before = tl.zeros((TILES,), tl.int32)
    begin = tl.zeros((TILES,), tl.int32)
    end = tl.zeros((TILES,), tl.int32)
    known = tl.zeros((TILES,), tl.int32)
    all_tiles = 0
    all_segments = 0
    for base in range(0, documents, DOCUMENTS):
        here = base + d < documents
        a = tl.load(cu_seqlens + base + d, mask=here, other=0)
        b = tl.load(cu_seqlens + base + d + 1, mask=here, other=0)
        a = tl.minimum(tl.maximum(a, 0), tokens)
        b = tl.minimum(tl.maximum(b, a), tokens)
        length = tl.where(here, b - a, 0)
        full = length // segment_len
        rest = length - full * segment_len
        tile_count = full * tiles_per_segment + tl.cdiv(rest, SIZE)
        segment_count = full + (rest > 0).to(tl.int32)
        tile_stop = all_tiles + tl.cumsum(tile_count, 0)
        segment_stop = all_segments + tl.cumsum(segment_count, 0)
        passed = here[:, None] & (tile_stop[:, None] <= x[None, :])
        tiles_before = tl.maximum(tiles_before, tl.max(tl.where(passed, tile_stop[:, None], 0), 0))
        segments_before = tl.maximum(segments_before, tl.max(tl.where(passed, segment_stop[:, None], 0), 0))
        mine = here[:, None] & (tile_stop[:, None] > x[None, :]) & ((tile_stop - tile_count)[:, None] <= x[None, :])
        begin += tl.sum(tl.where(mine, a[:, None], 0), 0)
        end += tl.sum(tl.where(mine, b[:, None], 0), 0)
        known += tl.sum(mine.to(tl.int32), 0)
        all_tiles += tl.sum(tile_count, 0)
        all_segments += tl.sum(segment_count, 0)

    inside = x - tiles_before
    number = inside // tiles_per_segment
    inside = inside - number * tiles_per_segment
    segment = segments_before + number
    start = begin + number * segment_len
    stop = tl.minimum(start + segment_len, end)
    tiles = tl.cdiv(stop - start, SIZE)
    valid = (known > 0) & (segment < segments)
    if runs is not None:
        opens = valid & (inside == 0) & (x < count)
        tl.store(runs + segment * 2, x, mask=opens)
        tl.store(runs + segment * 2 + 1, tl.minimum(x + tiles, count), mask=opens)
    if REVERSE:
        inside = tiles - 1 - inside
    first = start + inside * SIZE
    back = tl.where(number > 0, recurrence_len, 0)
    reach = tl.where(recurrence_len > 0, tl.minimum(stop + segment_len, end), stop)
    row = table + x.to(tl.int64) * COLUMNS
    stored = x < count
    tl.store(row, tl.where(valid, segment, 0), mask=stored)
    tl.store(row + 1, tl.where(valid, first, 0), mask=stored)
    tl.store(row + 2, tl.where(valid, start, 0), mask=stored)
    tl.store(row + 3, tl.where(valid, stop, 0), mask=stored)
    tl.store(row + 4, tl.where(valid, back, 0), mask=stored)
    tl.store(row + 5, tl.where(valid, reach, 0), mask=stored)
