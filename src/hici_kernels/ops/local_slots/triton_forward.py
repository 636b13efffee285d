"""local_slots: Triton kernels of the forward pass.

Names. X [B, S, ...] is what is averaged, Q [G, R, W] the queries over its W channels: absorbed, G = 1, R = heads * M
rows (head-major), W = H; unabsorbed, G = heads, R = M, W = E / heads, and the scores come from keys, the average from
values. A segment is cut into tiles of BLOCK_S tokens; a run of tiles of one segment is a split.

    fold_rows       Q[h, m] = sum over the head's d rows of k_weight, each row divided by about its largest query
    score_tiles     P = exp2(score - tile maximum), tile maximum, tile sum
    average_splits  U[split] = sum_t P x_t, relative to the split's maximum
    merge_splits    the splits of a segment: Y = sum 2^(m_s - m) U_s / sum 2^(m_s - m) l_s
    project_splits  the same, then v_weight of the head

Tiles lie in memory as [R, BLOCK_S] blocks, so a tile is aligned wherever its segment begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter holds bfloat16 as bit patterns and multiplies those: its dot gets float32. Dead code when compiled.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Sizes differ from call to call; their values are no reason to compile again.
SIZES = (
    "count",
    "count_n",
    "tokens",
    "segments",
    "segment_len",
    "tiles",
    "tiles_per_segment",
    "splits",
    "splits_per_segment",
    "split_tokens",
)


@triton.jit
def dot(a, b, acc):
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even. The interpreter cuts bfloat16 off instead: there its bits are rounded."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def finite(m):
    """A maximum over nothing becomes 0: -inf minus -inf is no number."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def tile_span(tile, table, per_segment, segment_len, tokens, BLOCK_S: tl.constexpr, PACKED: tl.constexpr):
    """(segment, start, stop) of a tile; start >= stop: there is no such tile."""
    if PACKED:
        segment = tl.load(table + tile * 3)
        start = tl.load(table + tile * 3 + 1)
        stop = tl.load(table + tile * 3 + 2)
    else:
        segment = tile // per_segment
        start = segment * segment_len + (tile % per_segment) * BLOCK_S
        stop = tl.minimum(start + BLOCK_S, tl.minimum((segment + 1) * segment_len, tokens))
    return segment, start, stop


@triton.jit
def split_span(
    split,
    table,
    per_segment,
    tiles_per_segment,
    segment_len,
    tokens,
    BLOCK_S: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """(segment, first tile, start, stop) of a split; start >= stop: there is no such split."""
    if PACKED:
        segment = tl.load(table + split * 4)
        start = tl.load(table + split * 4 + 1)
        stop = tl.load(table + split * 4 + 2)
        tile = tl.load(table + split * 4 + 3)
    else:
        segment = split // per_segment
        part = split % per_segment
        start = segment * segment_len + part * (TILES * BLOCK_S)
        stop = tl.minimum(start + TILES * BLOCK_S, tl.minimum((segment + 1) * segment_len, tokens))
        tile = segment * tiles_per_segment + part * TILES
    return segment, tile, start, stop


@triton.jit
def parts_of(segment, first, per_segment, segment_len, tokens, size, PACKED: tl.constexpr):
    """(first part, number of parts) of a segment cut into parts of ``size`` tokens."""
    if PACKED:
        begin = tl.load(first + segment)
        count = tl.load(first + segment + 1) - begin
    else:
        begin = segment * per_segment
        length = tl.minimum(segment_len, tokens - segment * segment_len)
        count = tl.maximum(tl.cdiv(length, size), 0)
    return begin, count


@triton.jit
def kept(mask, alive, b, segment, segments, rows, inside, tokens, UNIFORM: tl.constexpr):
    """Which rows of a tile count under an attention mask."""
    seen = tl.load(mask + b.to(tl.int64) * tokens + rows, mask=inside, other=0).to(tl.int32)
    if UNIFORM:
        seen += 1 - tl.load(alive + b * segments + segment).to(tl.int32)
    return inside & (seen != 0)


@triton.jit(do_not_specialize=SIZES)
def fold_rows(
    rows,
    weight,
    folded,
    scale,
    stride_w,
    count,
    slots,
    heads,
    head_dim,
    width,
    factor,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """folded[n, h, m] = factor * rows[n, m, h] @ weight[h] / scale, scale about the row's largest. Row = n * slots + m.

    rows [count, heads * head_dim], weight [heads * head_dim, width]. Products of two 16-bit numbers are exact in
    float32, so nothing is rounded before the one rounding of the result; the division keeps float16 in range.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1)
    h = tl.program_id(2)
    i_read = tl.minimum(i, count - 1)
    j = tl.arange(0, BLOCK_D)
    c = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
    row = rows + i_read[:, None].to(tl.int64) * (heads * head_dim) + h * head_dim
    column = weight + (h * head_dim).to(tl.int64) * stride_w + c[None, :]
    top = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for start in range(0, head_dim, BLOCK_D):
        here = start + j
        a = tl.load(row + here[None, :], mask=here[None, :] < head_dim, other=0.0)
        inside = here[:, None] < head_dim
        if not EVEN_H:
            inside = inside & (c[None, :] < width)
        w = tl.load(column + here[:, None].to(tl.int64) * stride_w, mask=inside, other=0.0)
        top = tl.maximum(top, tl.max(tl.abs(a.to(tl.float32)), 1))
        acc = dot(a, w, acc)
    # a power of two: dividing by it and multiplying by it rounds nothing
    top = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    top = tl.where(top > 0, top, 1.0)
    at = (i // slots * heads + h).to(tl.int64) * slots + i % slots
    inside = i[:, None] < count
    if not EVEN_H:
        inside = inside & (c[None, :] < width)
    result = acc * factor / top[:, None]
    tl.store(folded + at[:, None] * width + c[None, :], narrow(result, folded.dtype.element_ty), mask=inside)
    if chunk == 0:
        tl.store(scale + at, top, mask=i < count)


@triton.jit(do_not_specialize=SIZES)
def score_tiles(
    x,
    q,
    scale,
    mask,
    alive,
    table,
    p,
    top,
    total,
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
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_H: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UNIFORM: tl.constexpr,
    PACKED: tl.constexpr,
):
    """p [B, G, tiles, R, BLOCK_S] in x.dtype, top and total float32 [B, G, tiles, R] (powers of 2 throughout)."""
    blocks = tl.cdiv(rows_q, BLOCK_R)
    pid = tl.program_id(0)
    block = pid % blocks
    tile = pid // blocks % tiles
    bg = pid // (blocks * tiles)
    b = bg // groups
    g = bg % groups
    segment, start, stop = tile_span(tile, table, tiles_per_segment, segment_len, tokens, BLOCK_S, PACKED)
    if start < stop:
        t = tl.arange(0, BLOCK_S)
        inside = start + t < stop
        # past the segment's end its last token is read again, so that loads need no mask; its weight is 0
        rows = tl.minimum(start + t, stop - 1)
        keep = inside
        if HAS_MASK:
            keep = kept(mask, alive, b, segment, segments, rows, inside, tokens, UNIFORM)
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        r_read = tl.minimum(r, rows_q - 1)
        c = tl.arange(0, BLOCK_H)
        x_at = x + b.to(tl.int64) * stride_b + g.to(tl.int64) * stride_g
        x_at += rows[:, None].to(tl.int64) * stride_s + c[None, :]
        q_at = q + (g * rows_q + r_read).to(tl.int64)[None, :] * width + c[:, None]
        acc = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
        for begin in range(0, width, BLOCK_H):
            if EVEN_H:
                xs = tl.load(x_at + begin, mask=keep[:, None], other=0.0) if HAS_MASK else tl.load(x_at + begin)
                qs = tl.load(q_at + begin)
            else:
                xs = tl.load(x_at + begin, mask=keep[:, None] & (begin + c[None, :] < width), other=0.0)
                qs = tl.load(q_at + begin, mask=begin + c[:, None] < width, other=0.0)
            acc = dot(xs, qs, acc)
        s = acc * tl.load(scale + g * rows_q + r_read)[None, :]
        if UNIFORM:
            # equal scores: every existing column weighs the same
            s = tl.where(tl.load(alive + b * segments + segment).to(tl.int32) == 0, 0.0, s)
        s = tl.where(keep[:, None], s, float("-inf"))
        m = tl.max(s, 0)
        weights = tl.exp2(s - finite(m)[None, :])
        at = (bg.to(tl.int64) * tiles + tile) * rows_q + r
        known = r < rows_q
        p_at = p + at[None, :] * BLOCK_S + t[:, None]
        tl.store(p_at, narrow(weights, p.dtype.element_ty), mask=known[None, :])
        tl.store(top + at, m, mask=known)
        tl.store(total + at, tl.sum(weights, 0), mask=known)


@triton.jit(do_not_specialize=SIZES)
def average_splits(
    x,
    p,
    top,
    total,
    mask,
    alive,
    table,
    u,
    split_top,
    split_total,
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
    STAGES: tl.constexpr,
    EVEN_C: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UNIFORM: tl.constexpr,
    PACKED: tl.constexpr,
):
    """u float32 [B, G, splits, R, W]; split_top, split_total float32 [B, G, splits, R].

    Programs run from the last token to the first: what score_tiles read last is still in the L2 cache.
    """
    blocks = tl.cdiv(rows_q, BLOCK_R)
    chunks = tl.cdiv(width, BLOCK_C)
    pid = tl.program_id(0)
    chunk = pid % chunks
    block = pid // chunks % blocks
    rest = tl.num_programs(0) // (chunks * blocks) - 1 - pid // (chunks * blocks)
    split = rest % splits
    bg = rest // splits
    b = bg // groups
    g = bg % groups
    segment, tile, start, stop = split_span(
        split, table, splits_per_segment, tiles_per_segment, segment_len, tokens, BLOCK_S, TILES, PACKED
    )
    if start < stop:
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        r_read = tl.minimum(r, rows_q - 1)
        count = tl.cdiv(stop - start, BLOCK_S)
        first = (bg.to(tl.int64) * tiles + tile) * rows_q
        k = tl.arange(0, TILES)
        at = first + tl.minimum(k, count - 1)[:, None] * rows_q + r_read[None, :]
        tops = tl.where((k < count)[:, None], tl.load(top + at), float("-inf"))
        m = tl.max(tops, 0)
        base = finite(m)
        t = tl.arange(0, BLOCK_S)
        c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        x_at = x + b.to(tl.int64) * stride_b + g.to(tl.int64) * stride_g + c[None, :]
        acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for i in tl.range(0, count, num_stages=STAGES):
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
            here = first + i * rows_q + r_read
            ps = tl.load(p + here[:, None] * BLOCK_S + t[None, :]).to(tl.float32)
            ps *= tl.exp2(tl.load(top + here) - base)[:, None]
            acc = dot(narrow(ps, xs.dtype), xs, acc)
        at_u = (bg.to(tl.int64) * splits + split) * rows_q + r
        known = r < rows_q
        here = known[:, None]
        if not EVEN_C:
            here = here & (c[None, :] < width)
        tl.store(u + at_u[:, None] * width + c[None, :], acc, mask=here)
        if chunk == 0:
            sums = tl.load(total + at) * tl.exp2(tops - base[None, :])
            tl.store(split_top + at_u, m, mask=known)
            tl.store(split_total + at_u, tl.sum(sums, 0), mask=known)


@triton.jit
def split_weights(split_top, split_total, at, rows_q, count, known):
    """(maximum, 1 / sum) over the splits of a segment; ``at``: rows of the first one. Nothing seen: 0, 0."""
    m = tl.full(known.shape, float("-inf"), tl.float32)
    for i in range(0, count):
        m = tl.maximum(m, tl.load(split_top + at + i * rows_q, mask=known, other=float("-inf")))
    m = finite(m)
    total = tl.zeros(known.shape, tl.float32)
    for i in range(0, count):
        part = tl.load(split_total + at + i * rows_q, mask=known, other=0.0)
        total += part * tl.exp2(tl.load(split_top + at + i * rows_q, mask=known, other=float("-inf")) - m)
    empty = total == 0
    return m, tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))


@triton.jit(do_not_specialize=SIZES)
def merge_splits(
    u,
    split_top,
    split_total,
    first,
    out,
    out_n,
    out_r,
    out_g,
    groups,
    rows_q,
    width,
    tokens,
    segments,
    segment_len,
    splits,
    splits_per_segment,
    split_tokens,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PACKED: tl.constexpr,
):
    """out[b, n, r, g, c] = Y, in fixed order of splits."""
    blocks = tl.cdiv(rows_q, BLOCK_R)
    chunks = tl.cdiv(width, BLOCK_C)
    pid = tl.program_id(0)
    chunk = pid % chunks
    block = pid // chunks % blocks
    g = pid // (chunks * blocks) % groups
    bn = pid // (chunks * blocks) // groups
    segment = bn % segments
    b = bn // segments
    begin, count = parts_of(segment, first, splits_per_segment, segment_len, tokens, split_tokens, PACKED)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    known = r < rows_q
    inside = known[:, None] & (c[None, :] < width)
    at = ((b * groups + g).to(tl.int64) * splits + begin) * rows_q + r
    m, inverse = split_weights(split_top, split_total, at, rows_q, count, known)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(0, count):
        here = at + i * rows_q
        part = tl.load(u + here[:, None] * width + c[None, :], mask=inside, other=0.0)
        acc += part * tl.exp2(tl.load(split_top + here, mask=known, other=float("-inf")) - m)[:, None]
    out_at = out + bn.to(tl.int64) * out_n + g * out_g + r[:, None].to(tl.int64) * out_r + c[None, :]
    tl.store(out_at, narrow(acc * inverse[:, None], out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def project_splits(
    u,
    split_top,
    split_total,
    first,
    weight,
    out,
    stride_w,
    slots,
    heads,
    head_dim,
    width,
    tokens,
    segments,
    segment_len,
    splits,
    splits_per_segment,
    split_tokens,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PACKED: tl.constexpr,
):
    """out [B, N, M, E]: out[.., m, h] = v_weight[h] @ Y[h, m].

    Y is float32; a 16-bit product takes it as two numbers, its rounding and what that left over.
    """
    blocks_m = tl.cdiv(slots, BLOCK_M)
    blocks_d = tl.cdiv(head_dim, BLOCK_D)
    pid = tl.program_id(0)
    j = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    h = pid // blocks_d % heads
    m = pid // (blocks_d * heads) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    bn = pid // (blocks_d * heads * blocks_m)
    segment = bn % segments
    b = bn // segments
    begin, count = parts_of(segment, first, splits_per_segment, segment_len, tokens, split_tokens, PACKED)
    known = m < slots
    rows_q = heads * slots
    at = (b.to(tl.int64) * splits + begin) * rows_q + h * slots + m
    base, inverse = split_weights(split_top, split_total, at, rows_q, count, known)
    c = tl.arange(0, BLOCK_C)
    w_at = weight + (h * head_dim + j).to(tl.int64)[None, :] * stride_w
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_C):
        here = start + c
        y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for i in range(0, count):
            rows = at + i * rows_q
            part = tl.load(
                u + rows[:, None] * width + here[None, :], mask=known[:, None] & (here[None, :] < width), other=0.0
            )
            y += part * tl.exp2(tl.load(split_top + rows, mask=known, other=float("-inf")) - base)[:, None]
        y *= inverse[:, None]
        w = tl.load(w_at + here[:, None], mask=(here[:, None] < width) & (j[None, :] < head_dim), other=0.0)
        high = narrow(y, w.dtype)
        acc = dot(high, w, acc)
        if w.dtype != tl.float32:
            acc = dot(narrow(y - high.to(tl.float32), w.dtype), w, acc)
    out_at = out + (bn.to(tl.int64) * slots + m[:, None]) * (heads * head_dim) + h * head_dim + j[None, :]
    tl.store(out_at, narrow(acc, out.dtype.element_ty), mask=known[:, None] & (j[None, :] < head_dim))
