"""local_slots: Triton kernels of the backward pass. Names as in :mod:`.triton_forward`, and per segment and row

    g = gradient of the output folded through v_weight        a_t = exp2(s_t - m) / l
    c_t = g . x_t                                             D = sum_t a_t c_t
    dx_t = sum_rows a_t g + a_t (c_t - D) q                   Y = sum_t a_t x_t,  Z = sum_t a_t (c_t - D) x_t

    score_gradients    first sweep over hidden: s and c of every token, what a tile adds to m, l, D and max|c|
    segment_totals     m, 1 / l, D and the bound d = max|c| + |D| of every segment
    weight_gradients   P = exp2(s - m) in [0, 1] and W = P (c - D) / d in [-1, 1], in the tensors' dtype
    accumulate_splits  second sweep over hidden, last token first: sums of P x and W x over a split
    merge_sums         Y and Z of every segment from its splits, in order
    hidden_gradients   dx from P, W, g and q, without hidden

c - D is formed in float32 before anything is rounded: the part of c all tokens share, often its largest, cancels
exactly. P and W are bounded so that float16 holds them; 1 / l, d and the scales of g and q come in at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import (
    SIZES,
    dot,
    finite,
    kept,
    narrow,
    parts_of,
    split_span,
    tile_span,
)


@triton.jit(do_not_specialize=SIZES)
def score_gradients(
    x,
    y,
    q,
    g,
    q_scale,
    g_scale,
    mask,
    alive,
    table,
    s_out,
    c_out,
    top,
    total,
    cross,
    peak,
    x_b,
    x_s,
    y_b,
    y_s,
    stride_g,
    groups,
    rows_q,
    width,
    tokens,
    segments,
    segment_len,
    tiles,
    tiles_per_segment,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_H: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UNIFORM: tl.constexpr,
    PACKED: tl.constexpr,
    SAME: tl.constexpr,
):
    """s, c float32 [B, G, tiles, R, BLOCK_S]; top, total, cross, peak float32 [B, G, tiles, R].

    q [G, R, W], g [B, N, G, R, W]; SAME: keys x and values y are one tensor, read once.
    """
    blocks = tl.cdiv(rows_q, BLOCK_R)
    pid = tl.program_id(0)
    block = pid % blocks
    tile = pid // blocks % tiles
    bg = pid // (blocks * tiles)
    b = bg // groups
    group = bg % groups
    segment, start, stop = tile_span(tile, table, tiles_per_segment, segment_len, tokens, BLOCK_S, PACKED)
    if start < stop:
        t = tl.arange(0, BLOCK_S)
        inside = start + t < stop
        rows = tl.minimum(start + t, stop - 1)
        keep = inside
        if HAS_MASK:
            keep = kept(mask, alive, b, segment, segments, rows, inside, tokens, UNIFORM)
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        r_read = tl.minimum(r, rows_q - 1)
        k = tl.arange(0, BLOCK_H)
        rows = rows[:, None].to(tl.int64)
        x_at = x + b.to(tl.int64) * x_b + group.to(tl.int64) * stride_g + rows * x_s + k[None, :]
        y_at = y + b.to(tl.int64) * y_b + group.to(tl.int64) * stride_g + rows * y_s + k[None, :]
        q_row = (group * rows_q + r_read).to(tl.int64)
        g_row = ((b.to(tl.int64) * segments + segment) * groups + group) * rows_q + r_read
        q_at = q + q_row[None, :] * width + k[:, None]
        g_at = g + g_row[None, :] * width + k[:, None]
        s = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
        c = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
        for begin in range(0, width, BLOCK_H):
            if EVEN_H:
                xs = tl.load(x_at + begin, mask=keep[:, None], other=0.0) if HAS_MASK else tl.load(x_at + begin)
                qs = tl.load(q_at + begin)
                gs = tl.load(g_at + begin)
            else:
                known = begin + k < width
                xs = tl.load(x_at + begin, mask=keep[:, None] & known[None, :], other=0.0)
                qs = tl.load(q_at + begin, mask=known[:, None], other=0.0)
                gs = tl.load(g_at + begin, mask=known[:, None], other=0.0)
            s = dot(xs, qs, s)
            if SAME:
                c = dot(xs, gs, c)
            else:
                if EVEN_H:
                    ys = tl.load(y_at + begin, mask=keep[:, None], other=0.0)
                else:
                    ys = tl.load(y_at + begin, mask=keep[:, None] & (begin + k < width)[None, :], other=0.0)
                c = dot(ys, gs, c)
        s *= tl.load(q_scale + q_row)[None, :]
        c *= tl.load(g_scale + g_row)[None, :]
        if UNIFORM:
            s = tl.where(tl.load(alive + b * segments + segment).to(tl.int32) == 0, 0.0, s)
        s = tl.where(keep[:, None], s, float("-inf"))
        c = tl.where(keep[:, None], c, 0.0)
        m = tl.max(s, 0)
        weights = tl.exp2(s - finite(m)[None, :])
        at = (bg.to(tl.int64) * tiles + tile) * rows_q + r
        known = r < rows_q
        out_at = at[None, :] * BLOCK_S + t[:, None]
        tl.store(s_out + out_at, s, mask=known[None, :])
        tl.store(c_out + out_at, c, mask=known[None, :])
        tl.store(top + at, m, mask=known)
        tl.store(total + at, tl.sum(weights, 0), mask=known)
        tl.store(cross + at, tl.sum(weights * c, 0), mask=known)
        tl.store(peak + at, tl.max(tl.abs(c), 0), mask=known)


@triton.jit(do_not_specialize=SIZES)
def segment_totals(
    top,
    total,
    cross,
    peak,
    first,
    out,
    groups,
    rows_q,
    tokens,
    segments,
    segment_len,
    tiles,
    tiles_per_segment,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
):
    """out float32 [B, N, G, 4, R]: m, 1 / l, D, d."""
    blocks = tl.cdiv(rows_q, BLOCK_R)
    pid = tl.program_id(0)
    block = pid % blocks
    group = pid // blocks % groups
    bn = pid // (blocks * groups)
    segment = bn % segments
    b = bn // segments
    begin, count = parts_of(segment, first, tiles_per_segment, segment_len, tokens, BLOCK_S, PACKED)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    known = r < rows_q
    k = tl.arange(0, BLOCK_K)
    at = ((b * groups + group).to(tl.int64) * tiles + begin + k)[:, None] * rows_q + r[None, :]
    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    bound = tl.zeros((BLOCK_R,), tl.float32)
    for i in range(0, count, BLOCK_K):
        here = (i + k < count)[:, None] & known[None, :]
        m = tl.maximum(m, tl.max(tl.load(top + at + i * rows_q, mask=here, other=float("-inf")), 0))
        bound = tl.maximum(bound, tl.max(tl.load(peak + at + i * rows_q, mask=here, other=0.0), 0))
    m = finite(m)
    sums = tl.zeros((BLOCK_R,), tl.float32)
    d = tl.zeros((BLOCK_R,), tl.float32)
    for i in range(0, count, BLOCK_K):
        here = (i + k < count)[:, None] & known[None, :]
        share = tl.exp2(tl.load(top + at + i * rows_q, mask=here, other=float("-inf")) - m[None, :])
        sums += tl.sum(tl.load(total + at + i * rows_q, mask=here, other=0.0) * share, 0)
        d += tl.sum(tl.load(cross + at + i * rows_q, mask=here, other=0.0) * share, 0)
    empty = sums == 0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, sums))
    d *= inverse
    bound += tl.abs(d)
    bound = tl.where(bound == 0, 1.0, bound)
    out_at = out + (bn.to(tl.int64) * groups + group) * 4 * rows_q + r
    tl.store(out_at, m, mask=known)
    tl.store(out_at + rows_q, inverse, mask=known)
    tl.store(out_at + 2 * rows_q, d, mask=known)
    tl.store(out_at + 3 * rows_q, bound, mask=known)


@triton.jit(do_not_specialize=SIZES)
def weight_gradients(
    s,
    c,
    totals,
    alive,
    table,
    p,
    w,
    groups,
    rows_q,
    tokens,
    segments,
    segment_len,
    tiles,
    tiles_per_segment,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNIFORM: tl.constexpr,
    PACKED: tl.constexpr,
):
    """p, w [B, G, tiles, R, BLOCK_S]."""
    blocks = tl.cdiv(rows_q, BLOCK_R)
    pid = tl.program_id(0)
    block = pid % blocks
    tile = pid // blocks % tiles
    bg = pid // (blocks * tiles)
    b = bg // groups
    group = bg % groups
    segment, start, stop = tile_span(tile, table, tiles_per_segment, segment_len, tokens, BLOCK_S, PACKED)
    if start < stop:
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        t = tl.arange(0, BLOCK_S)
        known = r < rows_q
        at = ((bg.to(tl.int64) * tiles + tile) * rows_q + r)[:, None] * BLOCK_S + t[None, :]
        row = totals + ((b.to(tl.int64) * segments + segment) * groups + group) * 4 * rows_q + r
        m = tl.load(row, mask=known, other=0.0)
        d = tl.load(row + 2 * rows_q, mask=known, other=0.0)
        bound = tl.load(row + 3 * rows_q, mask=known, other=1.0)
        ps = tl.exp2(tl.load(s + at, mask=known[:, None], other=float("-inf")) - m[:, None])
        ws = ps * ((tl.load(c + at, mask=known[:, None], other=0.0) - d[:, None]) / bound[:, None])
        if UNIFORM:
            # equal weights by definition: no gradient through the scores
            ws = tl.where(tl.load(alive + b * segments + segment).to(tl.int32) == 0, 0.0, ws)
        tl.store(p + at, narrow(ps, p.dtype.element_ty), mask=known[:, None])
        tl.store(w + at, narrow(ws, w.dtype.element_ty), mask=known[:, None])


@triton.jit(do_not_specialize=SIZES)
def accumulate_splits(
    x,
    p,
    w,
    mask,
    alive,
    table,
    u,
    v,
    stride_b,
    stride_s,
    stride_g,
    groups,
    rows_q,
    width,
    tokens,
    segments,
    segment_len,
    tiles,
    tiles_per_segment,
    splits,
    splits_per_segment,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
    EVEN_C: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UNIFORM: tl.constexpr,
    PACKED: tl.constexpr,
    BOTH: tl.constexpr,
):
    """u = sum P x (only if BOTH), v = sum W x, float32 [B, G, splits, R, W]; last split first."""
    blocks = tl.cdiv(rows_q, BLOCK_R)
    chunks = tl.cdiv(width, BLOCK_C)
    pid = tl.program_id(0)
    chunk = pid % chunks
    block = pid // chunks % blocks
    rest = tl.num_programs(0) // (chunks * blocks) - 1 - pid // (chunks * blocks)
    split = rest % splits
    bg = rest // splits
    b = bg // groups
    group = bg % groups
    segment, tile, start, stop = split_span(
        split, table, splits_per_segment, tiles_per_segment, segment_len, tokens, BLOCK_S, TILES, PACKED
    )
    if start < stop:
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        r_read = tl.minimum(r, rows_q - 1)
        t = tl.arange(0, BLOCK_S)
        c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        first = (bg.to(tl.int64) * tiles + tile) * rows_q
        x_at = x + b.to(tl.int64) * stride_b + group.to(tl.int64) * stride_g + c[None, :]
        u_acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        v_acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for i in range(0, tl.cdiv(stop - start, BLOCK_S)):
            inside = start + i * BLOCK_S + t < stop
            rows = tl.minimum(start + i * BLOCK_S + t, stop - 1)
            at_x = x_at + rows[:, None].to(tl.int64) * stride_s
            if HAS_MASK:
                keep = kept(mask, alive, b, segment, segments, rows, inside, tokens, UNIFORM)
                if EVEN_C:
                    xs = tl.load(at_x, mask=keep[:, None], other=0.0)
                else:
                    xs = tl.load(at_x, mask=keep[:, None] & (c[None, :] < width), other=0.0)
            else:
                xs = tl.load(at_x) if EVEN_C else tl.load(at_x, mask=c[None, :] < width, other=0.0)
            here = (first + i * rows_q + r_read)[:, None] * BLOCK_S + t[None, :]
            if BOTH:
                u_acc = dot(tl.load(p + here), xs, u_acc)
            v_acc = dot(tl.load(w + here), xs, v_acc)
        at = ((bg.to(tl.int64) * splits + split) * rows_q + r)[:, None] * width + c[None, :]
        known = (r < rows_q)[:, None]
        if not EVEN_C:
            known = known & (c[None, :] < width)
        if BOTH:
            tl.store(u + at, u_acc, mask=known)
        tl.store(v + at, v_acc, mask=known)


@triton.jit(do_not_specialize=SIZES)
def merge_sums(
    u,
    v,
    totals,
    first,
    y,
    z,
    groups,
    rows_q,
    slots,
    width,
    count_n,
    tokens,
    segments,
    segment_len,
    splits,
    splits_per_segment,
    split_tokens,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PACKED: tl.constexpr,
    BOTH: tl.constexpr,
):
    """y = sum u / l (only if BOTH) and z = sum v d / l, float32 [heads, B N, M, W]."""
    blocks = tl.cdiv(rows_q, BLOCK_R)
    chunks = tl.cdiv(width, BLOCK_C)
    pid = tl.program_id(0)
    chunk = pid % chunks
    block = pid // chunks % blocks
    group = pid // (chunks * blocks) % groups
    bn = pid // (chunks * blocks) // groups
    segment = bn % segments
    b = bn // segments
    begin, count = parts_of(segment, first, splits_per_segment, segment_len, tokens, split_tokens, PACKED)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    known = r < rows_q
    inside = known[:, None] & (c[None, :] < width)
    at = (((b * groups + group).to(tl.int64) * splits + begin) * rows_q + r)[:, None] * width + c[None, :]
    y_acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    z_acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(0, count):
        here = at + (i * rows_q).to(tl.int64) * width
        if BOTH:
            y_acc += tl.load(u + here, mask=inside, other=0.0)
        z_acc += tl.load(v + here, mask=inside, other=0.0)
    row = totals + (bn.to(tl.int64) * groups + group) * 4 * rows_q + r
    inverse = tl.load(row + rows_q, mask=known, other=0.0)
    bound = tl.load(row + 3 * rows_q, mask=known, other=0.0)
    hm = group * rows_q + r
    out = ((hm // slots).to(tl.int64) * count_n + bn) * slots + hm % slots
    out = out[:, None] * width + c[None, :]
    if BOTH:
        tl.store(y + out, y_acc * inverse[:, None], mask=inside)
    tl.store(z + out, z_acc * (bound * inverse)[:, None], mask=inside)


@triton.jit(do_not_specialize=SIZES)
def hidden_gradients(
    p,
    w,
    q,
    g,
    q_scale,
    g_scale,
    totals,
    table,
    dx,
    dy,
    stride_b,
    stride_s,
    stride_g,
    groups,
    rows_q,
    width,
    tokens,
    segments,
    segment_len,
    tiles,
    tiles_per_segment,
    splits,
    splits_per_segment,
    factor,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    EVEN_C: tl.constexpr,
    PACKED: tl.constexpr,
    SAME: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """SAME: dx = P^T (g / l) + W^T (q d / l); else dy = the first and dx = the second of these.

    ``factor`` turns q_scale into the scale of q itself. Row factors are divided by the segment's largest before they
    meet a 16-bit operand, which comes back in float32.
    """
    chunks = tl.cdiv(width, BLOCK_C)
    pid = tl.program_id(0)
    chunk = pid % chunks
    split = pid // chunks % splits
    bg = pid // (chunks * splits)
    b = bg // groups
    group = bg % groups
    segment, tile, start, stop = split_span(
        split, table, splits_per_segment, tiles_per_segment, segment_len, tokens, BLOCK_S, TILES, PACKED
    )
    if start < stop:
        t = tl.arange(0, BLOCK_S)
        c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        g_first = ((b.to(tl.int64) * segments + segment) * groups + group) * rows_q
        q_first = (group * rows_q).to(tl.int64)
        row = totals + g_first * 4
        every = tl.arange(0, ROWS)
        known = every < rows_q
        inverse = tl.load(row + rows_q + every, mask=known, other=0.0)
        bound = tl.load(row + 3 * rows_q + every, mask=known, other=0.0)
        g_top = tl.max(tl.load(g_scale + g_first + every, mask=known, other=0.0) * inverse, 0)
        q_top = tl.max(tl.load(q_scale + q_first + every, mask=known, other=0.0) * factor * bound * inverse, 0)
        g_top = tl.where(g_top > 0, g_top, 1.0)
        q_top = tl.where(q_top > 0, q_top, 1.0)
        first = (bg.to(tl.int64) * tiles + tile) * rows_q
        out = b.to(tl.int64) * stride_b + group.to(tl.int64) * stride_g + c[None, :]
        if ONE_BLOCK:
            gs, qs = scaled_rows(
                g, q, g_scale, q_scale, row, g_first, q_first, 0, rows_q, width, c, g_top, q_top, factor, BLOCK_R
            )
        for i in range(0, tl.cdiv(stop - start, BLOCK_S)):
            g_part = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
            q_part = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
            if ONE_BLOCK:
                r = tl.minimum(tl.arange(0, BLOCK_R), rows_q - 1)
                here = (first + i * rows_q + r)[:, None] * BLOCK_S + t[None, :]
                g_part = dot(tl.trans(tl.load(p + here)), gs, g_part)
                q_part = dot(tl.trans(tl.load(w + here)), qs, q_part)
            else:
                for begin in range(0, rows_q, BLOCK_R):
                    gt, qt = scaled_rows(
                        g,
                        q,
                        g_scale,
                        q_scale,
                        row,
                        g_first,
                        q_first,
                        begin,
                        rows_q,
                        width,
                        c,
                        g_top,
                        q_top,
                        factor,
                        BLOCK_R,
                    )
                    r = tl.minimum(begin + tl.arange(0, BLOCK_R), rows_q - 1)
                    here = (first + i * rows_q + r)[:, None] * BLOCK_S + t[None, :]
                    g_part = dot(tl.trans(tl.load(p + here)), gt, g_part)
                    q_part = dot(tl.trans(tl.load(w + here)), qt, q_part)
            rows = start + i * BLOCK_S + t
            at = out + rows[:, None].to(tl.int64) * stride_s
            inside = (rows < stop)[:, None]
            if not EVEN_C:
                inside = inside & (c[None, :] < width)
            if SAME:
                tl.store(dx + at, narrow(g_part * g_top + q_part * q_top, dx.dtype.element_ty), mask=inside)
            else:
                tl.store(dx + at, narrow(q_part * q_top, dx.dtype.element_ty), mask=inside)
                tl.store(dy + at, narrow(g_part * g_top, dy.dtype.element_ty), mask=inside)


@triton.jit
def scaled_rows(
    g,
    q,
    g_scale,
    q_scale,
    row,
    g_first,
    q_first,
    begin,
    rows_q,
    width,
    c,
    g_top,
    q_top,
    factor,
    BLOCK_R: tl.constexpr,
):
    """Rows begin .. of g / (l g_top) and q d / (l q_top) at columns c, in the tensors' dtype; 0 past the last row."""
    r = begin + tl.arange(0, BLOCK_R)
    known = r < rows_q
    inverse = tl.load(row + rows_q + r, mask=known, other=0.0)
    bound = tl.load(row + 3 * rows_q + r, mask=known, other=0.0)
    g_by = tl.load(g_scale + g_first + r, mask=known, other=0.0) * inverse / g_top
    q_by = tl.load(q_scale + q_first + r, mask=known, other=0.0) * factor * bound * inverse / q_top
    inside = known[:, None] & (c[None, :] < width)
    g_rows = tl.load(g + (g_first + r)[:, None] * width + c[None, :], mask=inside, other=0.0)
    q_rows = tl.load(q + (q_first + r)[:, None] * width + c[None, :], mask=inside, other=0.0)
    g_rows = narrow(g_rows.to(tl.float32) * g_by[:, None], g_rows.dtype)
    q_rows = narrow(q_rows.to(tl.float32) * q_by[:, None], q_rows.dtype)
    return g_rows, q_rows
