"""hga_attention: Triton kernels of dK and dV, formulas in :mod:`.triton_backward`.

    near_keys     what is always seen: one program per block of keys, and the queries that see it in the order of their
                  indices, where they are neighbours. Windows; then sinks, which all later queries see: their queries
                  are cut into ``splits``
    route_pairs   (group, row) of all routes as one integer each, to be sorted: rows of a group are then neighbours
    listed_keys   groups: one program per group and RUN pairs, every row of which has opened the group. What a group has
                  beyond its first RUN pairs goes to ``parts``
    add_parts     those, in their order

dK and dV are float32 in the order of indices. Every number has one program at a time that adds to it: results are
bitwise repeatable. Offsets in memory are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention.triton_forward import dot, load_rows
from .triton_backward import weights
from .triton_forward import finite_rows
from .triton_lists import bounds

#: of a pair that is none
NO_PAIR = tl.constexpr(2**63 - 1)

# Sizes differ from call to call; their values are no reason to compile again.
NEAR_SIZES = ("queries", "tokens", "heads", "group", "splits", "chunk_size", "keep_first", "keep_last")
PAIR_SIZES = ("start", "stop", "queries", "heads", "group", "groups", "width", "shift", *NEAR_SIZES[-3:])
LISTED_SIZES = ("start", "queries", "tokens", "heads", "group", "groups", "owners", "shift")
PART_SIZES = ("tokens", "heads", "groups", "owners", "shift")


@triton.jit
def load_keys(
    k,
    v,
    token,
    inside,
    columns,
    stride_kn,
    stride_vn,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys and values of tokens [N], [N, BLOCK_D]; the key is NaN where either is not finite, and so are its scores."""
    column = tl.where(inside, token, 0).to(tl.int64)
    if columns is not None:
        column = tl.load(columns + column, mask=inside, other=0)
    d = tl.arange(0, BLOCK_D)
    keys = load_rows(k + column * stride_kn, inside, d, HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    values = load_rows(v + column * stride_vn, inside, d, HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    good = finite_rows(keys, inside) & finite_rows(values, inside)
    return tl.where((inside & ~good)[:, None], float("nan"), keys.to(tl.float32)).to(keys.dtype), values


@triton.jit
def keys_step(
    acc_k,
    acc_v,
    k,
    v,
    q_rows,
    do_rows,
    levels,
    deltas,
    seen,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FUSED: tl.constexpr,
):
    """One tile of rows into dK / scale and dV. Tiles are [keys, rows]: P and dS stay in registers as left operands.

    ``seen``: by which rows, of those that ask.
    """
    d = tl.arange(0, BLOCK_D)
    # a row that is no number has P = NaN for what it sees, and for the rest 0, which times NaN would not be 0
    usable = levels - levels == 0.0
    q = load_rows(q_rows, usable, d, HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    do = load_rows(do_rows, usable, d, HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    seen = seen & (levels != float("inf"))[None, :]
    zero = tl.zeros((k.shape[0], levels.shape[0]), tl.float32)
    p = tl.where(seen, weights(dot(k, tl.trans(q), zero), levels[None, :], factor, FUSED), 0.0)
    acc_v = dot(p.to(do.dtype), do, acc_v)
    ds = tl.where(seen, p * (dot(v, tl.trans(do), zero) - deltas[None, :]), 0.0)
    return dot(ds.to(q.dtype), q, acc_k), acc_v


@triton.jit(do_not_specialize=NEAR_SIZES)
def near_keys(
    q,
    k,
    v,
    grad_out,
    level,
    delta,
    ordered,
    order,
    ranges,
    columns,
    dk,
    dv,
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
    stride_cb,
    queries,
    tokens,
    heads,
    group,
    splits,
    chunk_size,
    keep_first,
    keep_last,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    FUSED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """dk, dv float32 [splits, B, tokens, Hkv, D]: what the first ``tokens`` are to windows, or SINKS, as sinks.

    ordered, order int64 [B, T]: indices of the queries, rising, and which queries those are; ranges int64
    [B, 2, blocks]: of those, the queries from the first to the last that see a block. Grid: (blocks * splits, Hkv, B).
    """
    SIZE: tl.constexpr = BLOCK_M // PACK
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    blocks = tl.num_programs(0) // splits
    kv_head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < tokens
    own_columns = None if columns is None else columns + b * stride_cb
    keys, values = load_keys(
        k + b * stride_kb + kv_head * stride_kh,
        v + b * stride_vb + kv_head * stride_vh,
        token,
        inside,
        own_columns,
        stride_kn,
        stride_vn,
        HEAD_DIM,
        BLOCK_D,
    )
    low = tl.load(ranges + b * 2 * blocks + block).to(tl.int32)
    high = tl.load(ranges + (b * 2 + 1) * blocks + block).to(tl.int32)
    run = tl.cdiv(tl.cdiv(high - low, splits), SIZE) * SIZE
    low += split * run
    high = tl.minimum(low + run, high)

    row = tl.arange(0, BLOCK_M)
    head = kv_head * group + row % PACK
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for at in range(low, high, SIZE):
        place = at + row // PACK
        here = (place < high) & (row % PACK < group)
        index = tl.load(ordered + b * queries + place, mask=here, other=-1).to(tl.int32)
        t = tl.load(order + b * queries + place, mask=here, other=0)
        row_sinks, row_window = bounds(index, chunk_size, keep_first, keep_last)
        if SINKS:
            seen = token[:, None] < row_sinks[None, :]
        else:
            seen = (token[:, None] >= row_window[None, :]) & (token[:, None] <= index[None, :])
        from_row = (b * queries + t) * heads * group + head
        acc_k, acc_v = keys_step(
            acc_k,
            acc_v,
            keys,
            values,
            q + b * stride_qb + t * stride_qt + head * stride_qh,
            grad_out + b * stride_gb + t * stride_gt + head * stride_gh,
            tl.load(level + from_row, mask=here, other=float("inf")),
            tl.load(delta + from_row, mask=here, other=0.0),
            seen,
            factor,
            HEAD_DIM,
            BLOCK_D,
            FUSED,
        )
    d = tl.arange(0, BLOCK_D)
    slab = split.to(tl.int64) * tl.num_programs(2) + b
    to = ((slab * tokens + token[:, None]) * heads + kv_head) * HEAD_DIM + d[None, :]
    kept = inside[:, None] & (d[None, :] < HEAD_DIM)
    tl.store(dk + to, acc_k * scale, mask=kept)
    tl.store(dv + to, acc_v, mask=kept)


@triton.jit(do_not_specialize=PAIR_SIZES)
def route_pairs(
    routes,
    level,
    positions,
    pairs,
    stride_rb,
    stride_rt,
    stride_rh,
    stride_pb,
    stride_pt,
    start,
    stop,
    queries,
    heads,
    group,
    groups,
    width,
    shift,
    chunk_size,
    keep_first,
    keep_last,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PACK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """pairs int64 [B, stop - start, Hq, width]: ((b Hkv + kv head) groups + group) 2^shift + row, or NO_PAIR.

    Only rows that ask, and groups of a query's own pool, as in the forward pass. Rows of a kv head count from
    ``start``, PACK to a query. Grid: (tiles of (stop - start) Hq rows, B).
    """
    b = tl.program_id(1).to(tl.int64)
    all_heads = heads * group
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = (start + i // all_heads).to(tl.int64)
    h = i % all_heads
    w = tl.arange(0, WIDTH)
    here = t < stop
    asked = tl.load(level + (b * queries + t) * all_heads + h, mask=here, other=float("inf")) != float("inf")
    index = tl.load(positions + b * stride_pb + t * stride_pt, mask=asked, other=-1).to(tl.int32)
    at = routes + b * stride_rb + t * stride_rt + h.to(tl.int64) * stride_rh
    found = tl.load(at[:, None] + w[None, :], mask=asked[:, None] & (w < width)[None, :], other=-1)
    sinks, window = bounds(index, chunk_size, keep_first, keep_last)
    inside = (found >= (sinks // GROUP_SIZE)[:, None]) & (found < (window // GROUP_SIZE)[:, None])
    owner = ((b * heads + h // group) * groups)[:, None] + found
    row = (t - start) * PACK + h % group
    pair = tl.where(inside & (found >= 0), (owner << shift) | row[:, None], NO_PAIR)
    to = ((b * (stop - start) + (t - start)) * all_heads + h) * width
    tl.store(pairs + to[:, None] + w[None, :], pair, mask=here[:, None] & (w < width)[None, :])


@triton.jit
def further_run(slot, pairs, starts, owners, shift, RUN: tl.constexpr):
    """(owner, its first pair, first pair of the run, end of its pairs): the run of an owner that begins in
    [slot RUN, (slot + 1) RUN) and is not its first one; empty if there is none.

    Runs of an owner begin RUN apart, and its second one RUN after its first pair: no two begin in the same slot, and
    pair slot RUN is of the same owner.
    """
    position = slot.to(tl.int64) * RUN
    owner = tl.load(pairs + position) >> shift
    some = owner < owners
    begin = tl.load(starts + owner, mask=some, other=0)
    stop = tl.load(starts + owner + 1, mask=some, other=0)
    low = begin + tl.cdiv(position - begin, RUN) * RUN
    return owner, begin, tl.where(low == begin, stop, low), stop


@triton.jit(do_not_specialize=LISTED_SIZES)
def listed_keys(
    q,
    k,
    v,
    grad_out,
    level,
    delta,
    pairs,
    starts,
    columns,
    dk,
    dv,
    parts,
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
    stride_cb,
    start,
    queries,
    tokens,
    heads,
    group,
    groups,
    owners,
    shift,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    RUN: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Adds to dk, dv [B, tokens, Hkv, D] float32, or writes parts float32 [slots, 2, GROUP_SIZE, D].

    pairs int64, rising; starts int64 [owners + 1]: where those of a group of a kv head (``owners``) begin. Grid:
    (owners + slots, blocks of a group).
    """
    pid = tl.program_id(0)
    first = pid < owners
    slot = tl.where(first, 0, pid - owners)
    owner, _, low, stop = further_run(slot, pairs, starts, owners, shift, RUN)
    if first:
        owner = pid.to(tl.int64)
        low = tl.load(starts + owner)
        stop = tl.load(starts + owner + 1)
    high = tl.minimum(low + RUN, stop)
    if low < high:
        own = owner % groups
        kv_head = owner // groups % heads
        b = owner // groups // heads
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < GROUP_SIZE
        token = own * GROUP_SIZE + n
        own_columns = None if columns is None else columns + b * stride_cb
        keys, values = load_keys(
            k + b * stride_kb + kv_head * stride_kh,
            v + b * stride_vb + kv_head * stride_vh,
            token,
            inside,
            own_columns,
            stride_kn,
            stride_vn,
            HEAD_DIM,
            BLOCK_D,
        )
        acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for at in range(low, high, BLOCK_M):
            i = at + tl.arange(0, BLOCK_M)
            here = i < high
            pair = tl.load(pairs + i, mask=here, other=-1)
            # a route that names a group twice opens it once
            here = here & (pair != tl.load(pairs + i - 1, mask=here & (i > 0), other=-1))
            row = (pair & ((1 << shift.to(tl.int64)) - 1)).to(tl.int32)
            t = tl.where(here, start + row // PACK, 0).to(tl.int64)
            head = kv_head * group + row % PACK
            from_row = (b * queries + t) * heads * group + head
            acc_k, acc_v = keys_step(
                acc_k,
                acc_v,
                keys,
                values,
                q + b * stride_qb + t * stride_qt + head * stride_qh,
                grad_out + b * stride_gb + t * stride_gt + head * stride_gh,
                tl.load(level + from_row, mask=here, other=float("inf")),
                tl.load(delta + from_row, mask=here, other=0.0),
                inside[:, None],
                factor,
                HEAD_DIM,
                BLOCK_D,
                FUSED,
            )
        d = tl.arange(0, BLOCK_D)
        kept = inside[:, None] & (d[None, :] < HEAD_DIM)
        acc_k *= scale
        if first:
            to = ((b * tokens + token[:, None]) * heads + kv_head) * HEAD_DIM + d[None, :]
            tl.store(dk + to, tl.load(dk + to, mask=kept, other=0.0) + acc_k, mask=kept)
            tl.store(dv + to, tl.load(dv + to, mask=kept, other=0.0) + acc_v, mask=kept)
        else:
            to = (slot.to(tl.int64) * (2 * GROUP_SIZE) + n[:, None]) * HEAD_DIM + d[None, :]
            tl.store(parts + to, acc_k, mask=kept)
            tl.store(parts + GROUP_SIZE * HEAD_DIM + to, acc_v, mask=kept)


@triton.jit(do_not_specialize=PART_SIZES)
def add_parts(
    pairs,
    starts,
    parts,
    dk,
    dv,
    tokens,
    heads,
    groups,
    owners,
    shift,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds ``parts`` of :func:`listed_keys` to dk, dv. Grid: (slots, blocks of GROUP_SIZE D numbers)."""
    owner, begin, low, stop = further_run(tl.program_id(0), pairs, starts, owners, shift, RUN)
    if (low < stop) & (low == begin + RUN):
        own = owner % groups
        kv_head = owner // groups % heads
        b = owner // groups // heads
        e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        there = e < GROUP_SIZE * HEAD_DIM
        acc_k = tl.zeros((COLUMNS,), tl.float32)
        acc_v = tl.zeros((COLUMNS,), tl.float32)
        for at in range(low, stop, RUN):
            part = parts + at // RUN * (2 * GROUP_SIZE * HEAD_DIM) + e
            acc_k += tl.load(part, mask=there, other=0.0)
            acc_v += tl.load(part + GROUP_SIZE * HEAD_DIM, mask=there, other=0.0)
        token = own * GROUP_SIZE + e // HEAD_DIM
        to = ((b * tokens + token) * heads + kv_head) * HEAD_DIM + e % HEAD_DIM
        tl.store(dk + to, tl.load(dk + to, mask=there, other=0.0) + acc_k, mask=there)
        tl.store(dv + to, tl.load(dv + to, mask=there, other=0.0) + acc_v, mask=there)
