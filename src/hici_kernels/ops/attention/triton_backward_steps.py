"""attention: one tile of the backward pass, and how tiles are loaded. Names: :mod:`.triton_backward`."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import dot, widen

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def weights(scores, level, factor, FUSED: tl.constexpr):
    """P. FUSED: factor and level are in powers of 2, one multiply-add per score.

    Otherwise they are natural, which spares float32 the rounding of the level's conversion; and P is at most 1, also
    where the rounding of a huge level exceeds the range of exp.
    """
    if FUSED:
        return tl.exp2(scores * factor - level)
    x = scores * factor - level
    return tl.exp(tl.where(x > 0.0, 0.0, x))  # a minimum would make a number of NaN


@triton.jit
def load_rows(at, rows, columns, MASK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """at [rows, columns]; rows bool [rows]. What is not loaded is 0."""
    if MASK_ROWS:
        if HEAD_DIM == BLOCK_D:
            return tl.load(at, mask=rows[:, None], other=0.0)
        return tl.load(at, mask=rows[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=columns[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def load_tile(
    source,
    start,
    rows,
    MASK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows from ``start`` on. source: (pointers to the tile from row 0, stride), TMA: (descriptor, row 0, column)."""
    if TMA:
        tile = source[0].load([source[1] + start, source[2]])
    else:
        at = source[0] + widen(start) * source[1]
        tile = load_rows(at, rows, tl.arange(0, BLOCK_D), MASK_ROWS, HEAD_DIM, BLOCK_D)
    return tile


@triton.jit
def keys_step(
    dk,
    dv,
    k,
    v,
    q_from,
    do_from,
    level,
    delta,
    start,
    stop,
    n,
    shift,
    own_stop,
    carried,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    FUSED: tl.constexpr,
    RECURRENT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """One query tile from row ``start`` on. Tiles are [keys, rows]: P and dS stay in registers as left operands."""
    m = start + tl.arange(0, BLOCK_M)
    if MASKED:
        rows = m < stop
        levels = tl.load(level + m, mask=rows, other=float("inf"))
        deltas = tl.load(delta + m, mask=rows, other=0.0)
    else:
        rows = m >= 0
        levels = tl.load(level + m)
        deltas = tl.load(delta + m)
    if HAS_MASK:
        rows = levels < float("inf")
    q = load_tile(q_from, start, rows, MASKED or HAS_MASK, HEAD_DIM, BLOCK_D, TMA)
    do = load_tile(do_from, start, rows, MASKED or HAS_MASK, HEAD_DIM, BLOCK_D, TMA)
    zero = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
    seen = rows[None, :]
    if MASKED:
        at = (m + shift)[None, :]
        if CAUSAL:
            seen = seen & (n[:, None] <= at)
        if RECURRENT:
            # rows past the segment belong to the next one, which sees the last tokens of this one
            seen = seen & ((at < own_stop) | (n[:, None] >= carried))
    p = weights(dot(k, tl.trans(q), zero), levels[None, :], factor, FUSED)
    if MASKED or HAS_MASK:
        p = tl.where(seen, p, 0.0)
    dv = dot(p.to(do.dtype), do, dv)
    ds = dot(v, tl.trans(do), zero) - deltas[None, :]
    if MASKED or HAS_MASK:
        # a key that nobody sees may hold anything: P = 0 is not enough
        ds = tl.where(seen, ds, 0.0)
    ds *= p
    dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def queries_step(
    dq,
    q,
    do,
    levels,
    deltas,
    k_from,
    v_from,
    keep_at,
    start,
    stop,
    m,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    FUSED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """One key tile from position ``start`` on; m: positions of the rows."""
    n = start + tl.arange(0, BLOCK_N)
    inside = n >= 0
    if MASKED:
        inside = n < stop
    if HAS_MASK:
        inside = inside & (tl.load(keep_at + n, mask=inside, other=0) != 0)
    k = load_tile(k_from, start, inside, MASKED or HAS_MASK, HEAD_DIM, BLOCK_D, TMA)
    v = load_tile(v_from, start, inside, MASKED or HAS_MASK, HEAD_DIM, BLOCK_D, TMA)
    zero = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
    p = weights(dot(q, tl.trans(k), zero), levels[:, None], factor, FUSED)
    if MASKED or HAS_MASK:
        seen = inside[None, :]
        if MASKED and CAUSAL:
            seen = seen & (n[None, :] <= m[:, None])
        p = tl.where(seen, p, 0.0)
    ds = p * (dot(do, tl.trans(v), zero) - deltas[:, None])
    return dot(ds.to(k.dtype), k, dq)


@triton.jit
def load_slots(
    of_global,
    of_local,
    j,
    g_s,
    l_s,
    global_slots,
    local_slots,
    d,
    HAS_GLOBAL: tl.constexpr,
    HAS_LOCAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Slots j of [global slots, local slots], [SLOTS, BLOCK_D]; 0 past the last one."""
    wide = d[None, :] < HEAD_DIM
    i = j.to(tl.int64)[:, None]
    if HAS_GLOBAL:
        x = tl.load(of_global + i * g_s + d[None, :], mask=(j < global_slots)[:, None] & wide, other=0.0)
        if HAS_LOCAL:
            here = (j >= global_slots) & (j < global_slots + local_slots)
            y = tl.load(of_local + (i - global_slots) * l_s + d[None, :], mask=here[:, None] & wide, other=0.0)
            x = tl.where(here[:, None], y, x)
        return x
    return tl.load(of_local + i * l_s + d[None, :], mask=(j < local_slots)[:, None] & wide, other=0.0)
