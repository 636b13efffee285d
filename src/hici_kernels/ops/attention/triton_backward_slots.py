"""attention: Triton kernels that add up the gradients of slots, in a fixed order.

:func:`.triton_backward.grad_queries` leaves parts float32 [B, Hq, tiles, 2, K + M, D]: dK and dV of the slots from one
query tile of one head. A segment's gradient is the sum over the heads of the kv head, and for each over the segment's
tiles; that of global slots which all segments share, the sum of those over segments, kept in float32 in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_schedule import tiles_of


@triton.jit
def sum_tiles(
    parts,
    prefix,
    global_dk,
    global_dv,
    local_dk,
    local_dv,
    prefix_b,
    prefix_n,
    global_slots,
    local_slots,
    segments,
    kv_heads,
    group,
    count,
    runs,
    tiles_per_segment,
    first_segment,
    first_query,
    segment_len,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """global_dk, global_dv [B, N, K, Hkv, D], local_dk, local_dv [B, N, M, Hkv, D], contiguous; one row a program."""
    pid = tl.program_id(0)
    slots = global_slots + local_slots
    side = pid % 2
    j = pid // 2 % slots
    g = pid // (2 * slots) % kv_heads
    bn = pid // (2 * slots * kv_heads)
    segment = bn % segments
    b = (bn // segments).to(tl.int64)
    begin, end = tiles_of(
        segment,
        runs,
        tiles_per_segment,
        first_segment,
        first_query,
        segment_len,
        tokens,
        SIZE,
        PACKED,
        REVERSE,
    )
    if HAS_PREFIX:
        # tiles of a segment that sees no slots left nothing
        visible = tl.load(prefix + b * prefix_b + segment.to(tl.int64) * prefix_n) != 0
        end = tl.where(visible, end, begin)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, TILES)
    wide = d < HEAD_DIM
    total = tl.zeros((BLOCK_D,), tl.float32)
    for r in range(0, group):
        head = (b * kv_heads + g) * group + r
        for at in range(begin, end, TILES):
            tile = at + t
            row = ((head * count + tile) * 2 + side) * slots + j
            here = (tile < end)[:, None] & wide[None, :]
            total += tl.sum(tl.load(parts + row[:, None] * HEAD_DIM + d[None, :], mask=here, other=0.0), 0)
    if j < global_slots:
        to = ((bn.to(tl.int64) * global_slots + j) * kv_heads + g) * HEAD_DIM + d
        if side == 0:
            tl.store(global_dk + to, total.to(global_dk.dtype.element_ty), mask=wide)
        else:
            tl.store(global_dv + to, total.to(global_dv.dtype.element_ty), mask=wide)
    else:
        to = ((bn.to(tl.int64) * local_slots + j - global_slots) * kv_heads + g) * HEAD_DIM + d
        if side == 0:
            tl.store(local_dk + to, total.to(local_dk.dtype.element_ty), mask=wide)
        else:
            tl.store(local_dv + to, total.to(local_dv.dtype.element_ty), mask=wide)


@triton.jit
def sum_segments(each_k, each_v, dk, dv, segments, size, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr):
    """each_k, each_v float32 [B, N, size] -> dk, dv [B, size]."""
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    x = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    b = (pid // blocks).to(tl.int64)
    n = tl.arange(0, SEGMENTS)
    known = x < size
    total_k = tl.zeros((BLOCK,), tl.float32)
    total_v = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, segments, SEGMENTS):
        segment = begin + n
        at = (b * segments + segment)[:, None] * size + x[None, :]
        here = (segment < segments)[:, None] & known[None, :]
        total_k += tl.sum(tl.load(each_k + at, mask=here, other=0.0), 0)
        total_v += tl.sum(tl.load(each_v + at, mask=here, other=0.0), 0)
    to = b * size + x
    tl.store(dk + to, total_k.to(dk.dtype.element_ty), mask=known)
    tl.store(dv + to, total_v.to(dv.dtype.element_ty), mask=known)
