"""hga_summaries: the Triton kernel.

A program forms the summaries of one chunk and kv head in one pass over its keys: the sums of a group, keys turned to
the group's anchor g, then the chunk's from those, turned on from there to its own anchor a:

    sum_j R(a - j) k_j = sum_groups R(a - g) sum_{j in group} R(g - j) k_j

Low halves of the pairs, high halves and the dims beyond rotary_dim are three tiles side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..global_stats.triton_forward import narrow

# Positions differ from call to call.
SIZES = ("chunks", "heads")


@triton.jit
def turn(x, y, angle, slow):
    """R(angle) of the pairs (x, y) that are ``slow``; chosen, not multiplied by 0: a key may be infinite."""
    cos = tl.cos(angle)
    sin = tl.sin(angle)
    return tl.where(slow, x * cos - y * sin, x), tl.where(slow, y * cos + x * sin, y)


@triton.jit
def store_key(
    row, low, high, rest, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr
):
    i = tl.arange(0, PAIRS)
    kind = row.dtype.element_ty
    tl.store(row + i, narrow(low, kind), mask=i < HALF)
    tl.store(row + HALF + i, narrow(high, kind), mask=i < HALF)
    if REST > 0:
        e = 2 * HALF + tl.arange(0, REST)
        tl.store(row + e, narrow(rest, kind), mask=e < HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def summarise(
    k,
    inv_freq,
    positions,
    columns,
    chunk_keys,
    group_keys,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_pb,
    stride_ps,
    stride_lb,
    stride_cb,
    stride_cn,
    stride_ch,
    stride_gb,
    stride_gn,
    stride_gm,
    stride_gh,
    chunks,
    heads,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """chunk_keys [B, n, Hkv, D] and group_keys [B, n, M, Hkv, D]; strides in elements, last dims contiguous.

    ``positions`` and ``columns`` may be None; token j of row b then is column j at position j. Grid: (n * Hkv, B).
    """
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    chunk = (pid // heads).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)

    i = tl.arange(0, PAIRS)
    w = tl.load(inv_freq + i, mask=i < HALF, other=0.0)
    span = CHUNK - 1 if CHUNK > 1 else 1
    fast = (w.to(tl.float64) * span > 0.5) & (i < HALF)
    slow = i >= tl.max(tl.where(fast, i + 1, 0), 0)
    w = w.to(tl.float32)

    base = k + b * stride_kb + head * stride_kh
    start = chunk * CHUNK
    s = tl.arange(0, BLOCK_S)
    kept = (i < HALF)[None, :]
    chunk_low = tl.zeros((PAIRS,), tl.float32)
    chunk_high = tl.zeros((PAIRS,), tl.float32)
    chunk_rest = 0.0
    e = 2 * HALF + tl.arange(0, REST if REST > 0 else 1)
    if REST > 0:
        chunk_rest = tl.zeros((REST,), tl.float32)
    middle = start + (CHUNK - 1) // 2
    if positions is not None:
        middle = tl.load(positions + b * stride_pb + middle * stride_ps).to(tl.int64)
    for m in range(0, CHUNK // GROUP):
        first = start + m * GROUP
        anchor = first + (GROUP - 1) // 2
        if positions is not None:
            anchor = tl.load(positions + b * stride_pb + anchor * stride_ps).to(tl.int64)
        low = tl.zeros((PAIRS,), tl.float32)
        high = tl.zeros((PAIRS,), tl.float32)
        rest = chunk_rest * 0.0
        for s0 in range(0, GROUP, BLOCK_S):
            here = s0 + s < GROUP
            token = first + s0 + s
            column = token
            if columns is not None:
                column = tl.load(columns + b * stride_lb + token, mask=here, other=0)
            position = token
            if positions is not None:
                position = tl.load(positions + b * stride_pb + token * stride_ps, mask=here, other=0).to(tl.int64)
            angle = (anchor - position).to(tl.float32)[:, None] * w[None, :]
            rows = base + column * stride_ks
            seen = here[:, None] & kept
            x = tl.load(rows[:, None] + i[None, :], mask=seen, other=0.0).to(tl.float32)
            y = tl.load(rows[:, None] + HALF + i[None, :], mask=seen, other=0.0).to(tl.float32)
            turned_x, turned_y = turn(x, y, angle, slow[None, :])
            low += tl.sum(turned_x, 0)
            high += tl.sum(turned_y, 0)
            if REST > 0:
                seen = here[:, None] & (e < HEAD_DIM)[None, :]
                rest += tl.sum(tl.load(rows[:, None] + e[None, :], mask=seen, other=0.0).to(tl.float32), 0)
        row = group_keys + b * stride_gb + chunk * stride_gn + m * stride_gm + head * stride_gh
        store_key(row, low / GROUP, high / GROUP, rest / GROUP, HALF, HEAD_DIM, PAIRS, REST)
        turned_x, turned_y = turn(low, high, (middle - anchor).to(tl.float32) * w, slow)
        chunk_low += turned_x
        chunk_high += turned_y
        chunk_rest += rest
    row = chunk_keys + b * stride_cb + chunk * stride_cn + head * stride_ch
    store_key(row, chunk_low / CHUNK, chunk_high / CHUNK, chunk_rest / CHUNK, HALF, HEAD_DIM, PAIRS, REST)
