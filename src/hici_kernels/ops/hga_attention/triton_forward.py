"""hga_attention: Triton kernels of the forward pass.

A program computes a tile of up to 64 rows: queries and the heads of one kv group. Its keys are one run of places,

    [0, sinks)              tokens 0 .. of the sinks that some row has
    [.., + count * size)    tokens of the groups of its list, see :mod:`.triton_lists`
    [.., total)             tokens from the first window of a row to the last index of one

read BLOCK_N at a time where they lie, each by the rows that see it: row bits for groups, an index compared for the
rest. With s = q . k:  m, mass, acc = max s, sum 2^(c (s - m)), sum 2^(c (s - m)) v;  c = scale log2 e.

Few rows and many keys (decoding): places are cut into ``splits`` runs, one program each, whose normalised results
:func:`merge_splits` joins by lse, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention.triton_forward import dot, load_rows
from .triton_lists import bounds, index_of

# Sizes differ from call to call; their values are no reason to compile again.
SIZES = (
    "first",
    "start",
    "stop",
    "queries",
    "heads",
    "group",
    "splits",
    "entries",
    "chunk_size",
    "keep_first",
    "keep_last",
)
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def finite_rows(x, seen):
    """Rows of x [N, D] that are ``seen`` and hold numbers only."""
    return seen & (tl.max((x.to(tl.float32) - x.to(tl.float32) != 0.0).to(tl.int32), 1) == 0)


@triton.jit
def places(
    v,
    stop,
    sinks,
    window,
    listed,
    ids,
    sums,
    columns,
    row,
    row_sinks,
    row_window,
    row_index,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(column of the token, whether there is one, by which rows it is seen) at places v [N].

    sinks: tokens of sinks; listed: tokens of the list; window: the first token of the windows.
    """
    inside = v < stop
    x = v - sinks
    of_list = inside & (x >= 0) & (x < listed)
    entry = tl.where(of_list, x // GROUP_SIZE, 0)
    group = tl.load(ids + entry, mask=of_list, other=0)
    bits = tl.load(sums + entry, mask=of_list, other=0)
    bits -= tl.load(sums + entry - 1, mask=of_list & (entry > 0), other=0)
    of_window = inside & (x >= listed)
    token = tl.where(x < 0, v, tl.where(of_list, group * GROUP_SIZE + x % GROUP_SIZE, window + x - listed))
    word = (bits & 0xFFFFFFFF).to(tl.uint32)[None, :]
    if BLOCK_M > 32:
        word = tl.where(row[:, None] < 32, word, ((bits >> 32) & 0xFFFFFFFF).to(tl.uint32)[None, :])
    opened = ((word >> (row % 32).to(tl.uint32)[:, None]) & 1) != 0
    sink = tl.where(inside & (x < 0), token, FAR)[None, :]
    near = tl.where(of_window, token, FAR)[None, :]
    seen = opened | (sink < row_sinks[:, None]) | ((near >= row_window[:, None]) & (near <= row_index[:, None]))
    column = tl.where(inside, token, 0).to(tl.int64)
    if columns is not None:
        column = tl.load(columns + column, mask=inside, other=0)
    return column, inside, seen


@triton.jit
def step(
    q,
    q_e,
    k_rows,
    v_rows,
    present,
    seen,
    m,
    mass,
    acc,
    acc_e,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """One tile of keys into (m, mass, acc).

    CAREFUL: a token whose value is not finite makes NaN of the rows that see it, and is left out of the product, where
    0 * NaN would reach the others.
    """
    d = tl.arange(0, BLOCK_D)
    e = BLOCK_D + tl.arange(0, BLOCK_E if BLOCK_E > 0 else 1)
    partial: tl.constexpr = HEAD_DIM < BLOCK_D
    partial_e: tl.constexpr = HEAD_DIM < BLOCK_D + BLOCK_E
    k = load_rows(k_rows, present, d, HEAD_DIM, partial, True)
    qk = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    if BLOCK_E > 0:
        k_e = load_rows(k_rows, present, e, HEAD_DIM, partial_e, True)
        qk += dot(q_e, tl.trans(k_e), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    v = load_rows(v_rows, present, d, HEAD_DIM, partial, True)
    if BLOCK_E > 0:
        v_e = load_rows(v_rows, present, e, HEAD_DIM, partial_e, True)
    if CAREFUL:
        good = finite_rows(v, present)
        if BLOCK_E > 0:
            good = good & finite_rows(v_e, present)
            v_e = tl.where(good[:, None], v_e, 0.0).to(v.dtype)
        v = tl.where(good[:, None], v, 0.0).to(v.dtype)
        qk = tl.where(good[None, :], qk, float("nan"))
    qk = tl.where(seen, qk, float("-inf"))
    m_new = tl.maximum(m, tl.max(qk, 1))
    # rows that have seen nothing yet: -inf minus -inf is no number
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2((qk - base[:, None]) * factor)
    decay = tl.exp2((m - base) * factor)
    mass = mass * decay + tl.sum(p, 1)
    p = p.to(v.dtype)
    acc = dot(p, v, acc * decay[:, None])
    if BLOCK_E > 0:
        acc_e = dot(p, v_e, acc_e * decay[:, None])
    return m_new, mass, acc, acc_e


@triton.jit
def walk(
    low,
    high,
    q,
    q_e,
    k_base,
    v_base,
    stride_kn,
    stride_vn,
    sinks,
    window,
    listed,
    ids,
    sums,
    columns,
    row,
    row_sinks,
    row_window,
    row_index,
    factor,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """(m, mass, acc, acc_e) over the places [low, high)."""
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc_e = tl.zeros((BLOCK_M, BLOCK_E), tl.float32) if BLOCK_E > 0 else 0.0
    for v0 in range(low, high, BLOCK_N):
        v = v0 + tl.arange(0, BLOCK_N)
        column, present, seen = places(
            v,
            high,
            sinks,
            window,
            listed,
            ids,
            sums,
            columns,
            row,
            row_sinks,
            row_window,
            row_index,
            GROUP_SIZE,
            BLOCK_M,
        )
        m, mass, acc, acc_e = step(
            q,
            q_e,
            k_base + column * stride_kn,
            v_base + column * stride_vn,
            present,
            seen,
            m,
            mass,
            acc,
            acc_e,
            factor,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_E,
            CAREFUL,
        )
    return m, mass, acc, acc_e


@triton.jit(do_not_specialize=SIZES)
def attend_lists(
    q,
    k,
    v,
    positions,
    columns,
    ids,
    sums,
    counts,
    out,
    lse,
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
    stride_pb,
    stride_pt,
    stride_cb,
    first,
    start,
    stop,
    queries,
    heads,
    group,
    splits,
    entries,
    chunk_size,
    keep_first,
    keep_last,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PACK: tl.constexpr,
    SIGN: tl.constexpr,
):
    """out [splits, B, T, Hq, D] (q's dtype, or float32 for more than one), lse [splits, B, Hq, T] float32, contiguous.

    Of queries [start, stop). ``positions`` (int [B, T], -1 = sees nothing; None: first + t) and ``columns`` (int64
    [B, S], None = j) may be absent; lists have room for ``entries``. ``scale`` is positive, factor = scale log2 e, and
    SIGN multiplies q (0: all scores are 0). Grid: (tiles * splits, Hkv, B).
    """
    SIZE: tl.constexpr = BLOCK_M // PACK
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    kv_head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    head = kv_head * group + row % PACK
    t = start + tile * SIZE + row // PACK
    here = (t < stop) & (row % PACK < group)
    index = index_of(t, b, here, positions, first, stride_pb, stride_pt)
    asking = index >= 0
    row_sinks, row_window = bounds(index, chunk_size, keep_first, keep_last)
    row_sinks = tl.where(asking, row_sinks, 0)
    sinks = tl.max(row_sinks, 0)
    reach = tl.max(index, 0) + 1
    window = tl.minimum(tl.min(tl.where(asking, row_window, FAR), 0), reach)
    slot = (b * heads + kv_head) * (tl.num_programs(0) // splits) + tile
    listed = tl.load(counts + slot) * GROUP_SIZE
    high = sinks + listed + reach - window
    run = tl.cdiv(tl.cdiv(high, splits), BLOCK_N) * BLOCK_N
    low = split * run
    high = tl.minimum(low + run, high)

    q_rows = q + b * stride_qb + t.to(tl.int64) * stride_qt + head * stride_qh
    q_tile = load_rows(q_rows, asking, tl.arange(0, BLOCK_D), HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    q_tile_e = 0.0
    if BLOCK_E > 0:
        q_tile_e = load_rows(
            q_rows, asking, BLOCK_D + tl.arange(0, BLOCK_E), HEAD_DIM, HEAD_DIM < BLOCK_D + BLOCK_E, True
        )
    if SIGN < 1:
        q_tile = (q_tile.to(tl.float32) * SIGN).to(q_tile.dtype)
        if BLOCK_E > 0:
            q_tile_e = (q_tile_e.to(tl.float32) * SIGN).to(q_tile.dtype)
    k_base = k + b * stride_kb + kv_head * stride_kh
    v_base = v + b * stride_vb + kv_head * stride_vh
    own_columns = None if columns is None else columns + b * stride_cb
    m, mass, acc, acc_e = walk(
        low,
        high,
        q_tile,
        q_tile_e,
        k_base,
        v_base,
        stride_kn,
        stride_vn,
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
        factor,
        GROUP_SIZE,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_E,
        CAREFUL=False,
    )
    # something that is no number has reached a row, perhaps one that does not see it: once more, with care
    broken = tl.max(tl.max((acc - acc != 0.0).to(tl.int32), 1), 0)
    if BLOCK_E > 0:
        broken = tl.maximum(broken, tl.max(tl.max((acc_e - acc_e != 0.0).to(tl.int32), 1), 0))
    if broken > 0:
        m, mass, acc, acc_e = walk(
            low,
            high,
            q_tile,
            q_tile_e,
            k_base,
            v_base,
            stride_kn,
            stride_vn,
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
            factor,
            GROUP_SIZE,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_E,
            CAREFUL=True,
        )

    some = mass != 0.0
    inverse = 1.0 / tl.where(some, mass, 1.0)
    slab = split.to(tl.int64) * tl.num_programs(2) + b
    all_heads = heads * group
    query = t.to(tl.int64)
    value = tl.where(some, m * scale + tl.log(tl.where(some, mass, 1.0)), float("-inf"))
    tl.store(lse + (slab * all_heads + head) * queries + query, value, mask=here)
    out_rows = out + ((slab * queries + query) * all_heads + head) * HEAD_DIM
    d = tl.arange(0, BLOCK_D)
    kept = here[:, None] & (d[None, :] < HEAD_DIM)
    tl.store(out_rows[:, None] + d[None, :], (acc * inverse[:, None]).to(out.dtype.element_ty), mask=kept)
    if BLOCK_E > 0:
        e = BLOCK_D + tl.arange(0, BLOCK_E)
        kept = here[:, None] & (e[None, :] < HEAD_DIM)
        tl.store(out_rows[:, None] + e[None, :], (acc_e * inverse[:, None]).to(out.dtype.element_ty), mask=kept)
