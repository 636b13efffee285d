"""hga_attention: Triton kernels of the backward pass: rows, and dQ. Those of dK and dV: :mod:`.triton_backward_keys`.

For query t, key j, with P = exp(scale q_t . k_j - lse_t) over the pairs with j in J_t and 0 elsewhere:

    delta_t = out_t . dout_t - dlse_t         dV_j = sum_t P dout_t            dS = P (dout_t . v_j - delta_t)
    dQ_t    = scale sum_j dS k_j              dK_j = scale sum_t dS q_t

    row_levels     delta, and the level that P is relative to: lse; +inf for a row that passes nothing on, so that all
                   of its P are 0; NaN for a row that is no number, so that all of its P are
    sound_tokens   which keys and values are finite
    list_queries   dQ: the tiles and lists of the forward pass, see :mod:`.triton_lists`

A row is a query and a head. No sum is split between programs that run at the same time, so results are bitwise
repeatable. Offsets in memory are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention.triton_backward_steps import LOG2E
from ..attention.triton_forward import dot, load_rows
from .triton_forward import FAR, finite_rows, places
from .triton_lists import bounds

# Sizes differ from call to call; their values are no reason to compile again.
SIZES = ("start", "stop", "queries", "tokens", "heads", "group", "entries", "chunk_size", "keep_first", "keep_last")


@triton.jit
def weights(scores, level, factor, FUSED: tl.constexpr):
    """P; NaN where a score or a level is.

    FUSED: factor and level are in powers of 2, one multiply-add per score. Otherwise they are natural, which spares
    float32 the rounding of the level's conversion.
    """
    if FUSED:
        return tl.exp2(scores * factor - level)
    x = scores * factor - level
    # the rounding of a huge level must not exceed the range of exp; a minimum would lose NaN
    return tl.exp(tl.where(x > 0.0, 0.0, x))


@triton.jit(do_not_specialize=["queries", "heads"])
def row_levels(
    q,
    out,
    grad_out,
    lse,
    grad_lse,
    positions,
    delta,
    level,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_lb,
    stride_lh,
    stride_lt,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_pb,
    stride_pt,
    queries,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FUSED: tl.constexpr,
):
    """delta, level float32 [B, T, Hq], for ``heads`` query heads. Grid: (tiles of T Hq rows, B).

    A row that sees nothing or of which nothing is asked (dout = 0, dlse = 0) passes nothing on, whatever it holds.
    """
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = (i // heads).to(tl.int64)
    h = (i % heads).to(tl.int64)
    here = t < queries
    d = tl.arange(0, BLOCK_D)
    PARTIAL: tl.constexpr = HEAD_DIM < BLOCK_D
    index = tl.load(positions + b * stride_pb + t * stride_pt, mask=here, other=-1)
    here = here & (index >= 0)
    do_rows = grad_out + b * stride_gb + t * stride_gt + h * stride_gh
    do = load_rows(do_rows, here, d, HEAD_DIM, PARTIAL, True).to(tl.float32)
    through = tl.load(grad_lse + b * stride_mb + h * stride_mh + t * stride_mt, mask=here, other=0.0).to(tl.float32)
    asked = here & ((tl.max((do != 0.0).to(tl.int32), 1) > 0) | (through != 0.0))
    o = load_rows(out + b * stride_ob + t * stride_ot + h * stride_oh, asked, d, HEAD_DIM, PARTIAL, True)
    x = load_rows(q + b * stride_qb + t * stride_qt + h * stride_qh, asked, d, HEAD_DIM, PARTIAL, True)
    own = tl.load(lse + b * stride_lb + h * stride_lh + t * stride_lt, mask=asked, other=0.0).to(tl.float32)
    total = tl.sum(o.to(tl.float32) * do, 1) - through
    sound = finite_rows(x, asked) & (total - total == 0.0) & (own - own == 0.0)
    if FUSED:
        own *= LOG2E
    to = (b * queries + t) * heads + h
    inside = t < queries
    tl.store(delta + to, tl.where(sound, total, 0.0), mask=inside)
    tl.store(level + to, tl.where(sound, own, tl.where(asked, float("nan"), float("inf"))), mask=inside)


@triton.jit(do_not_specialize=["tokens", "heads"])
def sound_tokens(
    k,
    v,
    sound,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    tokens,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sound uint8 [B, S, Hkv]: 1 where key and value of a token are finite. Grid: (tiles of S Hkv, B)."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = (i // heads).to(tl.int64)
    h = (i % heads).to(tl.int64)
    inside = n < tokens
    d = tl.arange(0, BLOCK_D)
    PARTIAL: tl.constexpr = HEAD_DIM < BLOCK_D
    good = inside
    good = finite_rows(
        load_rows(k + b * stride_kb + n * stride_kn + h * stride_kh, good, d, HEAD_DIM, PARTIAL, True), good
    )
    good = finite_rows(
        load_rows(v + b * stride_vb + n * stride_vn + h * stride_vh, good, d, HEAD_DIM, PARTIAL, True), good
    )
    tl.store(sound + (b * tokens + n) * heads + h, good.to(tl.uint8), mask=inside)


@triton.jit
def queries_step(
    q,
    do,
    levels,
    deltas,
    k_rows,
    v_rows,
    good,
    seen,
    acc,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FUSED: tl.constexpr,
):
    """One tile of keys into dQ / scale.

    A token that is not ``good`` makes NaN of the rows that see it, and is left out of the product, where 0 * NaN would
    reach the others.
    """
    d = tl.arange(0, BLOCK_D)
    k = load_rows(k_rows, good, d, HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    v = load_rows(v_rows, good, d, HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    zero = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
    p = weights(dot(q, tl.trans(k), zero), levels[:, None], factor, FUSED)
    p = tl.where(good[None, :], p, float("nan"))
    ds = tl.where(seen, p * (dot(do, tl.trans(v), zero) - deltas[:, None]), 0.0)
    return dot(ds.to(k.dtype), k, acc)


@triton.jit(do_not_specialize=SIZES)
def list_queries(
    q,
    k,
    v,
    sound,
    grad_out,
    level,
    delta,
    positions,
    columns,
    ids,
    sums,
    counts,
    dq,
    scale,
    factor,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_pb,
    stride_pt,
    stride_cb,
    start,
    stop,
    queries,
    tokens,
    heads,
    group,
    entries,
    chunk_size,
    keep_first,
    keep_last,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    FUSED: tl.constexpr,
):
    """dq [B, T, Hq, D] contiguous, of queries [start, stop); lists as in the forward pass. Grid: (tiles, Hkv, B)."""
    SIZE: tl.constexpr = BLOCK_M // PACK
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    head = kv_head * group + row % PACK
    t = (start + tile * SIZE + row // PACK).to(tl.int64)
    here = (t < stop) & (row % PACK < group)
    to = (b * queries + t) * heads * group + head
    levels = tl.load(level + to, mask=here, other=float("inf"))
    deltas = tl.load(delta + to, mask=here, other=0.0)
    asking = levels != float("inf")
    index = tl.load(positions + b * stride_pb + t * stride_pt, mask=asking, other=-1).to(tl.int32)
    row_sinks, row_window = bounds(index, chunk_size, keep_first, keep_last)
    row_sinks = tl.where(asking, row_sinks, 0)
    sinks = tl.max(row_sinks, 0)
    reach = tl.max(index, 0) + 1
    window = tl.minimum(tl.min(tl.where(asking, row_window, FAR), 0), reach)
    slot = (b * heads + kv_head) * tl.num_programs(0) + tile
    listed = tl.load(counts + slot) * GROUP_SIZE
    # lists name what rows of which nothing is asked have opened too
    high = tl.where(reach > 0, sinks + listed + reach - window, 0)

    d = tl.arange(0, BLOCK_D)
    usable = levels - levels == 0.0
    q_rows = q + b * stride_qb + t * stride_qt + head * stride_qh
    do_rows = grad_out + b * stride_gb + t * stride_gt + head * stride_gh
    q_tile = load_rows(q_rows, usable, d, HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    do_tile = load_rows(do_rows, usable, d, HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    k_base = k + b * stride_kb + kv_head * stride_kh
    v_base = v + b * stride_vb + kv_head * stride_vh
    own_sound = sound + b * tokens * heads + kv_head
    own_columns = None if columns is None else columns + b * stride_cb
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(0, high, BLOCK_N):
        column, present, seen = places(
            at + tl.arange(0, BLOCK_N),
            high,
            sinks,
            window,
            listed,
            ids + slot * entries,
            sums + slot * entries,
            own_columns,
            row,
            row_sinks,
            row_window,
            index,
            GROUP_SIZE,
            BLOCK_M,
        )
        acc = queries_step(
            q_tile,
            do_tile,
            levels,
            deltas,
            k_base + column * stride_kn,
            v_base + column * stride_vn,
            tl.load(own_sound + column * heads, mask=present, other=0) != 0,
            seen & asking[:, None],
            acc,
            factor,
            HEAD_DIM,
            BLOCK_D,
            FUSED,
        )
    kept = here[:, None] & (d[None, :] < HEAD_DIM)
    tl.store(dq + to[:, None] * HEAD_DIM + d[None, :], (acc * scale).to(dq.dtype.element_ty), mask=kept)
