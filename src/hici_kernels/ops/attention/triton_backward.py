"""attention: Triton kernels of the backward pass.

For query t, key j, with P = exp(scale q_t . k_j - lse_t) over the visible pairs and 0 elsewhere:

    delta_t = out_t . dout_t - dlse_t         dV_j = sum_t P dout_t            dS = P (dout_t . v_j - delta_t)
    dQ_t    = scale sum_j dS k_j              dK_j = scale sum_t dS q_t

    query_rows    delta, and the level that P is relative to: lse, or +inf for a query that sees nothing, so that all of
                  its P are 0
    grad_keys     dK, dV of tokens: one program per key tile of a segment, all query tiles that see it, the query heads
                  of its kv head one after the other
    grad_queries  dQ: one program per query tile, slots first, then token keys. On the way the tile's part of dK and dV
                  of the slots, in float32, which :mod:`.triton_backward_slots` adds up

No sum is split between programs that run at the same time, so results are bitwise repeatable. Rows are query rows
0..T-1; row t stands at position t + shift, shift = S - T. Loops run over whole tiles without masks, and over the tiles
on a boundary with them. Offsets in memory are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_backward_steps import LOG2E, keys_step, load_rows, load_slots, queries_step, weights
from .triton_forward import SIZES, dot
from .triton_schedule import tile_of


@triton.jit(do_not_specialize=["queries"])
def query_rows(
    out,
    grad_out,
    lse,
    grad_lse,
    delta,
    level,
    out_b,
    out_t,
    out_h,
    do_b,
    do_t,
    do_h,
    lse_b,
    lse_h,
    lse_t,
    gl_b,
    gl_h,
    gl_t,
    heads,
    queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_LSE_GRADIENT: tl.constexpr,
    FUSED: tl.constexpr,
):
    """delta, level float32 [B, Hq, T]: delta_t = out_t . dout_t - dlse_t and lse_t; a blind query gets 0, inf."""
    tiles = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    bh = pid // tiles
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < queries
    row = m.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    natural = tl.load(lse + b * lse_b + h * lse_h + row * lse_t, mask=inside, other=float("-inf"))
    # what a blind query holds may be anything: it is not read
    sees = natural != float("-inf")
    here = sees[:, None] & (d[None, :] < HEAD_DIM)
    o = tl.load(out + b * out_b + h * out_h + row[:, None] * out_t + d[None, :], mask=here, other=0.0)
    do = tl.load(grad_out + b * do_b + h * do_h + row[:, None] * do_t + d[None, :], mask=here, other=0.0)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_LSE_GRADIENT:
        total -= tl.load(grad_lse + b * gl_b + h * gl_h + row * gl_t, mask=sees, other=0.0).to(tl.float32)
    at = bh.to(tl.int64) * queries + m
    tl.store(delta + at, total, mask=inside)
    if FUSED:
        natural *= LOG2E
    tl.store(level + at, tl.where(sees, natural, float("inf")), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "shift"])
def grad_keys(
    q_descriptor,
    do_descriptor,
    q_row_b,
    q_row_h,
    q_column_h,
    do_row_b,
    do_row_h,
    do_column_h,
    q,
    k,
    v,
    grad_out,
    level,
    delta,
    keep,
    dk,
    dv,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    do_b,
    do_t,
    do_h,
    kv_heads,
    group,
    queries,
    shift,
    scale,
    count,
    tile_table,
    tiles_per_segment,
    first_segment,
    first_query,
    segment_len,
    recurrence_len,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    FUSED: tl.constexpr,
    RECURRENT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dk, dv [B, S, Hkv, D] contiguous; one key tile of one kv head.

    Descriptors, where given, are of q and grad_out as matrices whose row b * row_b + head * row_h + t, from column
    head * column_h on, is query t of a head; whole tiles are copied by them.
    """
    pid = tl.program_id(0)
    tile = pid % count
    bg = pid // count
    b = (bg // kv_heads).to(tl.int64)
    g = bg % kv_heads
    _, first, start, stop, _, reach = tile_of(
        tile,
        tile_table,
        tiles_per_segment,
        first_segment,
        first_query,
        segment_len,
        recurrence_len,
        tokens,
        SIZE=BLOCK_N,
        PACKED=PACKED,
        REVERSE=False,
    )
    if first < stop:
        n = first + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        # tiles on a boundary are lower: their masks take registers
        EDGE: tl.constexpr = BLOCK_M if BLOCK_M < 32 else 32
        TMA: tl.constexpr = q_descriptor is not None
        i = tl.arange(0, BLOCK_M).to(tl.int64)
        edge = tl.arange(0, EDGE).to(tl.int64)
        inside = n < stop
        key = n.to(tl.int64)[:, None]
        keys = load_rows(
            k + b * k_b + g.to(tl.int64) * k_h + key * k_s + d[None, :], inside, d, True, HEAD_DIM, BLOCK_D
        )
        values = load_rows(
            v + b * v_b + g.to(tl.int64) * v_h + key * v_s + d[None, :], inside, d, True, HEAD_DIM, BLOCK_D
        )

        # rows that see a key of the tile: [low, high); all of its keys: [full_low, full_high), in whole tiles
        last = tl.minimum(first + BLOCK_N, stop) - 1
        low = tl.maximum((first if CAUSAL else start) - shift, 0)
        own = stop - shift
        high = own
        whole = own
        carried = stop - recurrence_len
        if RECURRENT:
            high = tl.where(last >= carried, reach - shift, own)
            whole = tl.where(first >= carried, high, own)
        full_low = low
        if CAUSAL:
            full_low = low + tl.cdiv(tl.maximum(last - shift - low, 0), EDGE) * EDGE
        full_high = full_low + tl.maximum(whole - full_low, 0) // BLOCK_M * BLOCK_M
        before = (full_low - low) // EDGE
        masked = before + tl.cdiv(tl.maximum(high - full_high, 0), EDGE)

        factor = scale
        if FUSED:
            factor *= LOG2E
        acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for r in range(0, group):
            h = (g * group + r).to(tl.int64)
            q_head = q + b * q_b + h * q_h + d[None, :]
            do_head = grad_out + b * do_b + h * do_h + d[None, :]
            row = (b * kv_heads * group + h) * queries
            if TMA:
                q_whole = (q_descriptor, (b * q_row_b + h * q_row_h).to(tl.int32), (h * q_column_h).to(tl.int32))
                do_whole = (do_descriptor, (b * do_row_b + h * do_row_h).to(tl.int32), (h * do_column_h).to(tl.int32))
            else:
                q_whole = (q_head + i[:, None] * q_t, q_t, 0)
                do_whole = (do_head + i[:, None] * do_t, do_t, 0)
            for at in range(full_low, full_high, BLOCK_M):
                acc_k, acc_v = keys_step(
                    acc_k,
                    acc_v,
                    keys,
                    values,
                    q_whole,
                    do_whole,
                    level + row,
                    delta + row,
                    at,
                    high,
                    n,
                    shift,
                    stop,
                    carried,
                    factor,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_M,
                    CAUSAL,
                    FUSED,
                    RECURRENT,
                    HAS_MASK,
                    False,
                    TMA,
                )
        # a loop of its own: what it holds in registers is not carried through the one above
        for r in range(0, group):
            h = (g * group + r).to(tl.int64)
            q_head = q + b * q_b + h * q_h + d[None, :]
            do_head = grad_out + b * do_b + h * do_h + d[None, :]
            row = (b * kv_heads * group + h) * queries
            q_edge = (q_head + edge[:, None] * q_t, q_t)
            do_edge = (do_head + edge[:, None] * do_t, do_t)
            for x in range(0, masked):
                at = tl.where(x < before, low + x * EDGE, full_high + (x - before) * EDGE)
                acc_k, acc_v = keys_step(
                    acc_k,
                    acc_v,
                    keys,
                    values,
                    q_edge,
                    do_edge,
                    level + row,
                    delta + row,
                    at,
                    high,
                    n,
                    shift,
                    stop,
                    carried,
                    factor,
                    HEAD_DIM,
                    BLOCK_D,
                    EDGE,
                    CAUSAL,
                    FUSED,
                    RECURRENT,
                    HAS_MASK,
                    True,
                    False,
                )
        acc_k *= scale
        if HAS_MASK:
            seen = tl.load(keep + b * tokens + n, mask=inside, other=0) != 0
            acc_k = tl.where(seen[:, None], acc_k, 0.0)
            acc_v = tl.where(seen[:, None], acc_v, 0.0)
        to = ((b * tokens + key) * kv_heads + g) * HEAD_DIM + d[None, :]
        stored = inside[:, None]
        if HEAD_DIM < BLOCK_D:
            stored = stored & (d[None, :] < HEAD_DIM)
        tl.store(dk + to, acc_k.to(dk.dtype.element_ty), mask=stored)
        tl.store(dv + to, acc_v.to(dv.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=[*SIZES, "shift"])
def grad_queries(
    k_descriptor,
    v_descriptor,
    k_row_b,
    k_row_h,
    k_column_h,
    v_row_b,
    v_row_h,
    v_column_h,
    q,
    k,
    v,
    grad_out,
    level,
    delta,
    keep,
    global_k,
    global_v,
    local_k,
    local_v,
    prefix,
    dq,
    parts,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    do_b,
    do_t,
    do_h,
    gk_b,
    gk_n,
    gk_s,
    gk_h,
    gv_b,
    gv_n,
    gv_s,
    gv_h,
    lk_b,
    lk_n,
    lk_s,
    lk_h,
    lv_b,
    lv_n,
    lv_s,
    lv_h,
    prefix_b,
    prefix_n,
    global_slots,
    local_slots,
    heads,
    group,
    queries,
    shift,
    scale,
    count,
    tile_table,
    tiles_per_segment,
    first_segment,
    first_query,
    segment_len,
    recurrence_len,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    FUSED: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    HAS_LOCAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dq [B, T, Hq, D] contiguous; parts float32 [B, Hq, tiles, 2, K + M, D], dK and dV of the slots, tile by tile.

    Descriptors: of k and v, as in :func:`grad_keys`.
    """
    pid = tl.program_id(0)
    tile = pid % count
    bh = pid // count
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    g = (bh % heads // group).to(tl.int64)
    segment, first, start, stop, back, _ = tile_of(
        tile,
        tile_table,
        tiles_per_segment,
        first_segment,
        first_query,
        segment_len,
        recurrence_len,
        tokens,
        SIZE=BLOCK_M,
        PACKED=PACKED,
        REVERSE=CAUSAL,
    )
    if first < stop:
        m = first + tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        inside = m < stop
        row = (m - shift).to(tl.int64)
        at_row = bh.to(tl.int64) * queries + row
        levels = tl.load(level + at_row, mask=inside, other=float("inf"))
        deltas = tl.load(delta + at_row, mask=inside, other=0.0)
        rows = levels < float("inf")
        q_tile = load_rows(q + b * q_b + h * q_h + row[:, None] * q_t + d[None, :], rows, d, True, HEAD_DIM, BLOCK_D)
        do_tile = load_rows(
            grad_out + b * do_b + h * do_h + row[:, None] * do_t + d[None, :], rows, d, True, HEAD_DIM, BLOCK_D
        )
        factor = scale
        if FUSED:
            factor *= LOG2E
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

        if HAS_GLOBAL or HAS_LOCAL:
            slots = global_slots + local_slots
            shown = slots
            if HAS_PREFIX:
                visible = tl.load(prefix + b * prefix_b + segment.to(tl.int64) * prefix_n) != 0
                shown = tl.where(visible, slots, 0)
            i = segment.to(tl.int64)
            part = parts + (bh.to(tl.int64) * count + tile) * (2 * slots * HEAD_DIM)
            none = tl.zeros((BLOCK_M, SLOTS), tl.float32)
            empty = tl.zeros((BLOCK_D, SLOTS), tl.float32)
            for begin in tl.range(0, shown, SLOTS, num_stages=1):
                j = begin + tl.arange(0, SLOTS)
                slot_k = load_slots(
                    global_k + b * gk_b + i * gk_n + g * gk_h,
                    local_k + b * lk_b + i * lk_n + g * lk_h,
                    j,
                    gk_s,
                    lk_s,
                    global_slots,
                    local_slots,
                    d,
                    HAS_GLOBAL,
                    HAS_LOCAL,
                    HEAD_DIM,
                )
                slot_v = load_slots(
                    global_v + b * gv_b + i * gv_n + g * gv_h,
                    local_v + b * lv_b + i * lv_n + g * lv_h,
                    j,
                    gv_s,
                    lv_s,
                    global_slots,
                    local_slots,
                    d,
                    HAS_GLOBAL,
                    HAS_LOCAL,
                    HEAD_DIM,
                )
                known = j < slots
                seen = rows[:, None] & known[None, :]
                p = weights(dot(q_tile, tl.trans(slot_k), none), levels[:, None], factor, FUSED)
                p = tl.where(seen, p, 0.0)
                ds = p * tl.where(seen, dot(do_tile, tl.trans(slot_v), none) - deltas[:, None], 0.0)
                acc = dot(ds.to(slot_k.dtype), slot_k, acc)
                slot_dk = dot(tl.trans(q_tile), ds.to(q_tile.dtype), empty) * scale
                slot_dv = dot(tl.trans(do_tile), p.to(do_tile.dtype), empty)
                to = j[None, :] * HEAD_DIM + d[:, None]
                stored = known[None, :] & (d[:, None] < HEAD_DIM)
                tl.store(part + to, slot_dk, mask=stored)
                tl.store(part + slots * HEAD_DIM + to, slot_dv, mask=stored)

        # keys that some row of the tile sees: [low, high); that all of them see: [low, full_high), in whole tiles
        low = start - back
        high = stop
        full_high = low + (stop - low) // BLOCK_N * BLOCK_N
        if CAUSAL:
            high = tl.minimum(first + BLOCK_M, stop)
            full_high = low + (first + 1 - low) // BLOCK_N * BLOCK_N
        n = tl.arange(0, BLOCK_N).to(tl.int64)
        k_edge = (k + b * k_b + g * k_h + n[:, None] * k_s + d[None, :], k_s, 0)
        v_edge = (v + b * v_b + g * v_h + n[:, None] * v_s + d[None, :], v_s, 0)
        TMA: tl.constexpr = k_descriptor is not None
        if TMA:
            k_whole = (k_descriptor, (b * k_row_b + g * k_row_h).to(tl.int32), (g * k_column_h).to(tl.int32))
            v_whole = (v_descriptor, (b * v_row_b + g * v_row_h).to(tl.int32), (g * v_column_h).to(tl.int32))
        else:
            k_whole = k_edge
            v_whole = v_edge
        keep_at = keep
        if HAS_MASK:
            keep_at = keep + b * tokens
        for at in range(low, full_high, BLOCK_N):
            acc = queries_step(
                acc,
                q_tile,
                do_tile,
                levels,
                deltas,
                k_whole,
                v_whole,
                keep_at,
                at,
                high,
                m,
                factor,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                CAUSAL,
                FUSED,
                HAS_MASK,
                False,
                TMA,
            )
        for at in range(full_high, high, BLOCK_N):
            acc = queries_step(
                acc,
                q_tile,
                do_tile,
                levels,
                deltas,
                k_edge,
                v_edge,
                keep_at,
                at,
                high,
                m,
                factor,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                CAUSAL,
                FUSED,
                HAS_MASK,
                True,
                False,
            )
        acc *= scale
        if HAS_MASK:
            acc = tl.where(rows[:, None], acc, 0.0)
        stored = inside[:, None]
        if HEAD_DIM < BLOCK_D:
            stored = stored & (d[None, :] < HEAD_DIM)
        to = ((b * queries + row[:, None]) * heads + h) * HEAD_DIM + d[None, :]
        tl.store(dq + to, acc.to(dq.dtype.element_ty), mask=stored)
