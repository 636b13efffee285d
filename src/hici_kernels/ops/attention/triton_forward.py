"""attention: Triton kernels of the forward pass.

One program computes BLOCK_M rows of one tile (:mod:`.triton_schedule`): a row is a query position and one of PACK query
heads that share a kv head. With s = scale q . k, in base 2:

    slots, 16 at a time      m, mass, acc = max s, sum 2^(s - m), sum 2^(s - m) v      read where they lie
    keys all rows see        the same, rescaled by 2^(m_old - m_new), without masks
    the remaining keys       the same with masks: the causal diagonal, the end of a segment
    out = acc / mass         lse = (m + log2 mass) ln 2

D is cut into BLOCK_D + BLOCK_E columns, powers of two (80 = 64 + 16), BLOCK_E = 0 for none. In float32 the two parts
of a score are summed apart and then added.

Few queries and many keys (decoding): the keys of a tile are cut into ``splits`` runs of whole key tiles, one program
each, and :func:`merge_splits` joins their normalised results by lse, in order.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .triton_schedule import tile_of

# The interpreter holds bfloat16 as bit patterns and multiplies those: its dot gets float32. Dead code when compiled.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
SLOT_TILE = tl.constexpr(16)
LN2 = tl.constexpr(math.log(2.0))

# Sizes differ from call to call (every decoded token); their values are no reason to compile again.
SIZES = (
    "k_row_b",
    "k_row_h",
    "k_column_h",
    "v_row_b",
    "v_row_h",
    "v_column_h",
    "queries",
    "global_slots",
    "local_slots",
    "group",
    "splits",
    "tiles_per_segment",
    "first_segment",
    "first_query",
    "segment_len",
    "recurrence_len",
    "tokens",
)


@triton.jit
def dot(a, b, acc):
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def widen(x):
    """int64 of a loop variable, which the interpreter has as a plain number."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def load_rows(rows, seen, d, HEAD_DIM: tl.constexpr, PARTIAL: tl.constexpr, MASKED: tl.constexpr):
    """[rows, columns d] at row pointers; zeros where a row is not seen (MASKED) or a column is not there (PARTIAL)."""
    at = rows[:, None] + d[None, :]
    if MASKED and PARTIAL:
        return tl.load(at, mask=seen[:, None] & (d[None, :] < HEAD_DIM), other=0.0)
    if MASKED:
        return tl.load(at, mask=seen[:, None], other=0.0)
    if PARTIAL:
        return tl.load(at, mask=d[None, :] < HEAD_DIM, other=0.0)
    return tl.load(at)


@triton.jit
def attend(
    q,
    q_e,
    k_rows,
    v_rows,
    k_column,
    v_column,
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
    PRESENT: tl.constexpr,
    SEEN: tl.constexpr,
    EMPTY: tl.constexpr,
    FUSED: tl.constexpr,
    TMA: tl.constexpr,
    EAGER: tl.constexpr,
):
    """One tile of keys into (m, mass, acc). ``present`` [BLOCK_N]: rows that may be read; ``seen``: by which query.

    Rows are pointers to them; with TMA a pair (descriptor, number of the first row), beside the first column. EAGER:
    values are fetched before keys are used.

    FUSED: m = factor * max, one multiply-add per score. Otherwise m = max, and the difference is taken before the
    multiplication, which is exact at the maximum however large scores are.
    """
    d = tl.arange(0, BLOCK_D)
    partial: tl.constexpr = HEAD_DIM < BLOCK_D
    partial_e: tl.constexpr = HEAD_DIM < BLOCK_D + BLOCK_E
    k = k_rows[0].load([k_rows[1], k_column]) if TMA else load_rows(k_rows, present, d, HEAD_DIM, partial, PRESENT)
    if EAGER:
        v = load_rows(v_rows, present, d, HEAD_DIM, partial, PRESENT)
    qk = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    if BLOCK_E > 0:
        e = BLOCK_D + tl.arange(0, BLOCK_E)
        k_e = load_rows(k_rows, present, e, HEAD_DIM, partial_e, PRESENT)
        if q.dtype == tl.float32:
            qk += dot(q_e, tl.trans(k_e), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        else:
            qk = dot(q_e, tl.trans(k_e), qk)
    if SEEN:
        qk = tl.where(seen, qk, float("-inf"))
    top = tl.max(qk, 1)
    if FUSED:
        top = top * factor
    m_new = tl.maximum(m, top)
    base = m_new
    if EMPTY:
        # rows that have seen nothing yet: -inf minus -inf is no number
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    if FUSED:
        p = tl.exp2(qk * factor - base[:, None])
        decay = tl.exp2(m - base)
    else:
        p = tl.exp2((qk - base[:, None]) * factor)
        decay = tl.exp2((m - base) * factor)
    mass = mass * decay + tl.sum(p, 1)
    if TMA:
        v = v_rows[0].load([v_rows[1], v_column])
    elif not EAGER:
        v = load_rows(v_rows, present, d, HEAD_DIM, partial, PRESENT)
    p = p.to(v.dtype)
    acc = dot(p, v, acc * decay[:, None])
    if BLOCK_E > 0:
        e = BLOCK_D + tl.arange(0, BLOCK_E)
        v_e = load_rows(v_rows, present, e, HEAD_DIM, partial_e, PRESENT)
        acc_e = dot(p, v_e, acc_e * decay[:, None])
    return m_new, mass, acc, acc_e


@triton.jit
def slot_rows(j0, global_k, global_v, local_k, local_v, own, stride_gkj, stride_gvj, stride_lkj, stride_lvj):
    """Pointers to slots j0 .. j0 + 15 of a segment and head: global ones, ``own`` of them, before local ones."""
    j = j0 + tl.arange(0, SLOT_TILE)
    wide = j.to(tl.int64)
    if local_k is None:
        k_rows = global_k + wide * stride_gkj
        v_rows = global_v + wide * stride_gvj
    elif global_k is None:
        k_rows = local_k + wide * stride_lkj
        v_rows = local_v + wide * stride_lvj
    else:
        k_rows = tl.where(j < own, global_k + wide * stride_gkj, local_k + (wide - own) * stride_lkj)
        v_rows = tl.where(j < own, global_v + wide * stride_gvj, local_v + (wide - own) * stride_lvj)
    return k_rows, v_rows


@triton.jit(do_not_specialize=SIZES)
def attention_forward(
    q,
    k,
    v,
    global_k,
    global_v,
    local_k,
    local_v,
    prefix_mask,
    attention_mask,
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
    stride_gkb,
    stride_gki,
    stride_gkj,
    stride_gkh,
    stride_gvb,
    stride_gvi,
    stride_gvj,
    stride_gvh,
    stride_lkb,
    stride_lki,
    stride_lkj,
    stride_lkh,
    stride_lvb,
    stride_lvi,
    stride_lvj,
    stride_lvh,
    stride_pb,
    stride_pi,
    stride_mb,
    stride_mn,
    k_descriptor,
    v_descriptor,
    k_row_b,
    k_row_h,
    k_column_h,
    v_row_b,
    v_row_h,
    v_column_h,
    queries,
    global_slots,
    local_slots,
    group,
    splits,
    tile_table,
    tiles_per_segment,
    first_segment,
    first_query,
    segment_len,
    recurrence_len,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PACK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    FUSED: tl.constexpr,
    SIGN: tl.constexpr,
):
    """out [splits, B, T, Hq, D] (q's dtype, or float32 if SPLIT), lse [splits, B, Hq, T] float32, both contiguous.

    Strides are in elements; i is a segment, j a slot, n a token. Absent tensors are None. ``scale`` is positive,
    ``factor`` is scale log2 e, and SIGN multiplies q (0: all scores are 0). Grid: (tiles * splits, Hq / PACK, B).
    Descriptors, where given, are of k and v as matrices whose row b * row_b + head * row_h + n, from column
    head * column_h on, is key n of a head: keys that all rows see are copied by them, in blocks of BLOCK_N x HEAD_DIM.
    """
    SIZE: tl.constexpr = BLOCK_M // PACK
    pid = tl.program_id(0)
    split = 0
    if SPLIT:
        split = pid % splits
        pid = pid // splits
    segment, first, start, stop, back, _reach = tile_of(
        pid,
        tile_table,
        tiles_per_segment,
        first_segment,
        first_query,
        segment_len,
        recurrence_len,
        tokens,
        SIZE=SIZE,
        PACKED=PACKED,
        REVERSE=True,
    )
    if first >= stop:
        return
    head_block = tl.program_id(1)
    kv_head = (head_block * PACK // group).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)

    row = tl.arange(0, BLOCK_M)
    position = first + row // PACK
    head = head_block * PACK + row % PACK
    alive = position < stop
    if SIZE * PACK < BLOCK_M:
        alive = alive & (row < SIZE * PACK)
    if attention_mask is not None:
        at = attention_mask + b * stride_mb + position.to(tl.int64) * stride_mn
        asking = alive & (tl.load(at, mask=alive, other=0) != 0)
    else:
        asking = alive
    q_rows = q + b * stride_qb + (position - first_query).to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    q_tile = load_rows(q_rows, asking, tl.arange(0, BLOCK_D), HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    if SIGN < 1:
        q_tile = (q_tile.to(tl.float32) * SIGN).to(q_tile.dtype)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if BLOCK_E > 0:
        q_tile_e = load_rows(
            q_rows, asking, BLOCK_D + tl.arange(0, BLOCK_E), HEAD_DIM, HEAD_DIM < BLOCK_D + BLOCK_E, True
        )
        if SIGN < 1:
            q_tile_e = (q_tile_e.to(tl.float32) * SIGN).to(q_tile_e.dtype)
        acc_e = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    else:
        q_tile_e = 0.0
        acc_e = 0.0

    if (global_k is not None) or (local_k is not None):
        own = 0 if global_k is None else global_slots
        total = own if local_k is None else own + local_slots
        if prefix_mask is not None:
            shown = tl.load(prefix_mask + b * stride_pb + segment.to(tl.int64) * stride_pi) != 0
            total = tl.where(shown, total, 0)
        if SPLIT:
            total = tl.where(split == 0, total, 0)
        if global_k is not None:
            gk = global_k + b * stride_gkb + segment.to(tl.int64) * stride_gki + kv_head * stride_gkh
            gv = global_v + b * stride_gvb + segment.to(tl.int64) * stride_gvi + kv_head * stride_gvh
        else:
            gk = None
            gv = None
        if local_k is not None:
            lk = local_k + b * stride_lkb + segment.to(tl.int64) * stride_lki + kv_head * stride_lkh
            lv = local_v + b * stride_lvb + segment.to(tl.int64) * stride_lvi + kv_head * stride_lvh
        else:
            lk = None
            lv = None
        # The first 16 are no loop, and their values are loaded before their keys are used: one wait for memory, shared
        # with that for q. Without a mask over segments there is at least one slot.
        first_k, first_v = slot_rows(0, gk, gv, lk, lv, own, stride_gkj, stride_gvj, stride_lkj, stride_lvj)
        j = tl.arange(0, SLOT_TILE)
        m, mass, acc, acc_e = attend(
            q_tile,
            q_tile_e,
            first_k,
            first_v,
            0,
            0,
            j < total,
            (j < total)[None, :],
            m,
            mass,
            acc,
            acc_e,
            factor,
            HEAD_DIM=HEAD_DIM,
            BLOCK_M=BLOCK_M,
            BLOCK_N=SLOT_TILE,
            BLOCK_D=BLOCK_D,
            BLOCK_E=BLOCK_E,
            PRESENT=True,
            SEEN=True,
            EMPTY=(prefix_mask is not None) or SPLIT,
            FUSED=FUSED,
            TMA=False,
            EAGER=True,
        )
        for j0 in tl.range(SLOT_TILE, total, SLOT_TILE, num_stages=1):
            more_k, more_v = slot_rows(j0, gk, gv, lk, lv, own, stride_gkj, stride_gvj, stride_lkj, stride_lvj)
            j = j0 + tl.arange(0, SLOT_TILE)
            m, mass, acc, acc_e = attend(
                q_tile,
                q_tile_e,
                more_k,
                more_v,
                0,
                0,
                j < total,
                (j < total)[None, :],
                m,
                mass,
                acc,
                acc_e,
                factor,
                HEAD_DIM=HEAD_DIM,
                BLOCK_M=BLOCK_M,
                BLOCK_N=SLOT_TILE,
                BLOCK_D=BLOCK_D,
                BLOCK_E=BLOCK_E,
                PRESENT=True,
                SEEN=True,
                EMPTY=False,
                FUSED=FUSED,
                TMA=False,
                EAGER=True,
            )

    low = start - back
    if CAUSAL:
        high = tl.minimum(first + SIZE, stop)
        clear = low + (first + 1 - low) // BLOCK_N * BLOCK_N
    else:
        high = stop
        clear = low + (stop - low) // BLOCK_N * BLOCK_N
    if SPLIT:
        run = tl.cdiv(tl.cdiv(high - low, splits), BLOCK_N) * BLOCK_N
        low = low + split * run
        high = tl.minimum(low + run, high)
        clear = tl.minimum(tl.maximum(clear, low), tl.maximum(high, low))

    n = tl.arange(0, BLOCK_N)
    # offsets within a tile are the same in every step: only the scalar base moves
    k_base = k + b * stride_kb + kv_head * stride_kh
    v_base = v + b * stride_vb + kv_head * stride_vh
    k_inside = n.to(tl.int64) * stride_kn
    v_inside = n.to(tl.int64) * stride_vn
    if attention_mask is not None:
        mask_base = attention_mask + b * stride_mb
        mask_inside = n.to(tl.int64) * stride_mn
    k_column = 0
    v_column = 0
    if k_descriptor is not None:
        k_first = tl.program_id(2) * k_row_b + kv_head.to(tl.int32) * k_row_h
        v_first = tl.program_id(2) * v_row_b + kv_head.to(tl.int32) * v_row_h
        k_column = kv_head.to(tl.int32) * k_column_h
        v_column = kv_head.to(tl.int32) * v_column_h
    for n0 in range(low, clear, BLOCK_N):
        wide = widen(n0)
        present = n >= 0
        if attention_mask is not None:
            present = tl.load(mask_base + wide * stride_mn + mask_inside) != 0
        if k_descriptor is not None:
            k_rows = (k_descriptor, k_first + n0)
            v_rows = (v_descriptor, v_first + n0)
        else:
            k_rows = k_base + wide * stride_kn + k_inside
            v_rows = v_base + wide * stride_vn + v_inside
        m, mass, acc, acc_e = attend(
            q_tile,
            q_tile_e,
            k_rows,
            v_rows,
            k_column,
            v_column,
            present,
            present[None, :],
            m,
            mass,
            acc,
            acc_e,
            factor,
            HEAD_DIM=HEAD_DIM,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
            BLOCK_E=BLOCK_E,
            PRESENT=attention_mask is not None,
            SEEN=attention_mask is not None,
            EMPTY=attention_mask is not None,
            FUSED=FUSED,
            TMA=k_descriptor is not None,
            EAGER=False,
        )
    for n0 in range(clear, high, BLOCK_N):
        wide = widen(n0)
        present = n0 + n < high
        if attention_mask is not None:
            present = present & (tl.load(mask_base + wide * stride_mn + mask_inside, mask=present, other=0) != 0)
        seen = present[None, :]
        if CAUSAL:
            seen = seen & ((n0 + n)[None, :] <= position[:, None])
        m, mass, acc, acc_e = attend(
            q_tile,
            q_tile_e,
            k_base + wide * stride_kn + k_inside,
            v_base + wide * stride_vn + v_inside,
            0,
            0,
            present,
            seen,
            m,
            mass,
            acc,
            acc_e,
            factor,
            HEAD_DIM=HEAD_DIM,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
            BLOCK_E=BLOCK_E,
            PRESENT=True,
            SEEN=True,
            EMPTY=(attention_mask is not None) or SPLIT,
            FUSED=FUSED,
            TMA=False,
            EAGER=False,
        )

    some = asking & (mass != 0.0)  # a sum that is no number stays one
    divisor = tl.where(some, mass, 1.0)
    inverse = tl.where(some, 1.0 / divisor, 0.0)
    heads = tl.num_programs(1) * PACK
    slab = split.to(tl.int64) * tl.num_programs(2) + b if SPLIT else b
    query = (position - first_query).to(tl.int64)
    value = (m + tl.log2(divisor)) * LN2 if FUSED else m * scale + tl.log(divisor)
    value = tl.where(some, value, float("-inf"))
    tl.store(lse + (slab * heads + head) * queries + query, value, mask=alive)
    out_rows = out + ((slab * queries + query) * heads + head) * HEAD_DIM
    d = tl.arange(0, BLOCK_D)
    kept = alive[:, None]
    if HEAD_DIM < BLOCK_D:
        kept = kept & (d[None, :] < HEAD_DIM)
    # chosen, not multiplied by 0: what a masked query gathered may be infinite
    result = tl.where(some[:, None], acc * inverse[:, None], 0.0)
    tl.store(out_rows[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=kept)
    if BLOCK_E > 0:
        e = BLOCK_D + tl.arange(0, BLOCK_E)
        kept = alive[:, None] & (e[None, :] < HEAD_DIM)
        result = tl.where(some[:, None], acc_e * inverse[:, None], 0.0)
        tl.store(out_rows[:, None] + e[None, :], result.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=("rows", "queries", "heads", "splits"))
def merge_splits(
    parts,
    part_lse,
    out,
    lse,
    rows,
    queries,
    heads,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """lse = log sum_s exp(lse_s);  out = sum_s exp(lse_s - lse) out_s, s in order. Rows are (b, t, h)."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = r < rows
    h = r % heads
    t = r // heads % queries
    at = (r // heads // queries * heads + h) * queries + t
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    for s in range(0, splits):
        top = tl.maximum(top, tl.load(part_lse + s * rows + at, mask=here, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    c = tl.arange(0, BLOCK_C)
    kept = here[:, None] & (c[None, :] < HEAD_DIM)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for s in range(0, splits):
        weight = tl.exp2((tl.load(part_lse + s * rows + at, mask=here, other=float("-inf")) - base) / LN2)
        part = tl.load(parts + (s * rows + r)[:, None] * HEAD_DIM + c[None, :], mask=kept, other=0.0)
        total += weight
        acc += weight[:, None] * part
    some = total != 0.0
    inverse = 1.0 / tl.where(some, total, 1.0)
    tl.store(out + r[:, None] * HEAD_DIM + c[None, :], (acc * inverse[:, None]).to(out.dtype.element_ty), mask=kept)
    value = tl.where(some, base + tl.log2(tl.where(some, total, 1.0)) * LN2, float("-inf"))
    tl.store(lse + at, value, mask=here)


def merge_blocks(head_dim: int) -> dict[str, int]:
    """Blocks of :func:`merge_splits`: 4096 numbers at a time."""
    columns = max(1 << (head_dim - 1).bit_length(), 16)
    return {"BLOCK_R": 4096 // columns, "BLOCK_C": columns}
