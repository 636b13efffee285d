"""hga_attention: the Triton kernel that unites the routes of a tile of queries.

A tile is up to 64 rows: some queries and the heads of one kv group. Its list names every group that a row opened once,
rising, and says which rows did, so that a group is read once for all of them. Entry e of a list is a group id and a
running sum of row bits: bits of e = sums[e] - sums[e - 1] modulo 2^64.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(2**31 - 1)
#: of an id and a row in one int32
ROW_BITS = tl.constexpr(6)
ROW_MASK = tl.constexpr(63)

# Sizes differ from call to call; their values are no reason to compile again.
SIZES = ("first", "start", "stop", "heads", "group", "width", "chunk_size", "keep_first", "keep_last")


@triton.jit
def bounds(p, chunk_size, keep_first, keep_last):
    """(f C, l C) of queries at index p: where their sinks end and their window begins, in tokens."""
    n = p // chunk_size
    f = tl.minimum(n, keep_first)
    return f * chunk_size, tl.minimum(tl.maximum(n - keep_last, keep_first), n) * chunk_size


@triton.jit
def index_of(t, b, here, positions, first, stride_pb, stride_pt):
    """Index of query t in its row, -1 where there is none."""
    index = tl.where(here, first + t, -1)
    if positions is not None:
        index = tl.load(positions + b * stride_pb + t.to(tl.int64) * stride_pt, mask=here, other=-1).to(tl.int32)
    return index


@triton.jit(do_not_specialize=SIZES)
def unite_routes(
    routes,
    positions,
    ids,
    sums,
    counts,
    stride_rb,
    stride_rt,
    stride_rh,
    stride_pb,
    stride_pt,
    first,
    start,
    stop,
    heads,
    group,
    width,
    chunk_size,
    keep_first,
    keep_last,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PACK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ids int32 and sums int64 [B, Hkv, tiles, BLOCK_M * WIDTH], counts int32 [B, Hkv, tiles]; queries [start, stop).

    Only groups of a query's own pool are taken: its sinks and window it sees anyway. Grid: (tiles, Hkv, B).
    """
    SIZE: tl.constexpr = BLOCK_M // PACK
    ENTRIES: tl.constexpr = BLOCK_M * WIDTH
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    e = tl.arange(0, ENTRIES)
    row = e // WIDTH
    head = row % PACK
    t = start + tile * SIZE + row // PACK
    here = (t < stop) & (head < group) & (e % WIDTH < width)
    p = index_of(t, b, here, positions, first, stride_pb, stride_pt)
    at = routes + b * stride_rb + t.to(tl.int64) * stride_rt + (kv_head * group + head).to(tl.int64) * stride_rh
    found = tl.load(at + e % WIDTH, mask=here, other=-1)
    sinks, window = bounds(p, chunk_size, keep_first, keep_last)
    inside = here & (p >= 0) & (found >= sinks // GROUP_SIZE) & (found < window // GROUP_SIZE)
    key = tl.sort(tl.where(inside, (found << ROW_BITS) | row, LARGEST))

    before = tl.gather(key, tl.maximum(e - 1, 0), 0)
    after = tl.gather(key, tl.minimum(e + 1, ENTRIES - 1), 0)
    there = key != LARGEST
    fresh = there & ((e == 0) | (before != key))
    last = there & ((e == ENTRIES - 1) | ((after >> ROW_BITS) != (key >> ROW_BITS)))
    bit = tl.full((ENTRIES,), 1, tl.int64) << (key & ROW_MASK).to(tl.int64)
    total = tl.cumsum(tl.where(fresh, bit, 0), 0)
    place = tl.cumsum(last.to(tl.int32), 0) - 1
    slot = (b * heads + kv_head) * tl.num_programs(0) + tile
    tl.store(ids + slot * ENTRIES + place, key >> ROW_BITS, mask=last)
    tl.store(sums + slot * ENTRIES + place, total, mask=last)
    tl.store(counts + slot, tl.sum(last.to(tl.int32), 0))
