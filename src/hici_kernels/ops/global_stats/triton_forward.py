"""global_stats: Triton kernels of the forward pass, and what both directions share.

A program owns BLOCK_H channels and walks over rows (slots of segments), keeping per channel a summary

    base    the mean of the first tile, rounded: all else is relative to it, so that a common offset costs no digits
    mean    of (x - base), and what its rounding has lost (rest); square = sum (x - base - mean - rest)^2; top, low (and
            where they are, for the gradient)

and looks at every tile from the mean so far: where the first rows lie far from all others, as the first token of a text
may, distances from base would cost the digits of the mean. Tiles, splits and segments are merged into it by the rule of
Chan, Golub and LeVeque (1979), in a fixed order.

    shared_stats   one set per (batch, document), its rows cut into splits
    merge_stats    the splits of a set
    causal_stats   one set per segment; a document is walked from its first segment on, in pieces: first without
                   results (EMIT false: the summary of each piece), then, from what carry_stats made of those, with them
    normalise_mean row 4, whose norm needs all channels

Scratch holds per set the mean [H] in float32 and what each block of channels adds to its squared norm.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter cuts bfloat16 off where the compiler rounds to nearest even.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
VARIANCE_FLOOR = tl.constexpr(1e-12)
FLOOR = tl.constexpr(1e-6)

# Sizes differ from call to call; their values are no reason to compile again.
SIZES = ("segments", "documents", "splits", "pieces")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def nothing(BLOCK_H: tl.constexpr):
    """The summary of no rows: count, base, mean, rest, square, top, low, top_at, low_at."""
    zero = tl.zeros((BLOCK_H,), tl.float32)
    at = tl.zeros((BLOCK_H,), tl.int32)
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    low = tl.full((BLOCK_H,), float("inf"), tl.float32)
    return tl.full((), 0, tl.int32), zero, zero, zero, zero, top, low, at, at


@triton.jit
def merge(
    count,
    base,
    mean,
    rest,
    square,
    top,
    low,
    top_at,
    low_at,
    count2,
    base2,
    mean2,
    rest2,
    square2,
    top2,
    low2,
    top_at2,
    low_at2,
):
    """The union of two disjoint sets, the first one's rows before the second's. NaN is above and below everything."""
    total = count + count2
    fresh = count == 0
    base = tl.where(fresh, base2, base)
    share = count2.to(tl.float32) / tl.maximum(total, 1).to(tl.float32)
    # base2 - base = apart + lost, exactly (Knuth): of two sets far from each other, the near one's digits are in `lost`
    apart = base2 - base
    back = base2 - apart
    lost = (base2 - (apart + back)) + (back - base)
    gap = tl.where(count2 == 0, 0.0, ((apart - mean) + mean2) + ((rest2 - rest) + lost))
    more = rest + gap * share
    moved = mean + more
    rest = tl.where(fresh, rest2, more - (moved - mean))
    mean = tl.where(fresh, mean2, moved)
    square = square + square2 + gap * gap * (count.to(tl.float32) * share)
    higher = (top2 > top) | ((top2 != top2) & (top == top))
    lower = (low2 < low) | ((low2 != low2) & (low == low))
    top_at = tl.where(fresh, top_at2, tl.where(higher, top_at2, top_at))
    low_at = tl.where(fresh, low_at2, tl.where(lower, low_at2, low_at))
    top = tl.where(higher, top2, top)
    low = tl.where(lower, low2, low)
    return total, base, mean, rest, square, top, low, top_at, low_at


@triton.jit
def add_rows(x, keep, row, count, base, mean, rest, square, top, low, top_at, low_at, INDICES: tl.constexpr):
    """A summary and a tile of rows x [BLOCK_R, BLOCK_H] float32 of which ``keep`` [BLOCK_R] count; ``row``: numbers."""
    far = 2147483647
    count2 = tl.sum(keep.to(tl.int32), 0)
    here = keep[:, None]
    rows2 = tl.maximum(count2, 1).to(tl.float32)
    base2 = tl.where(count == 0, tl.sum(tl.where(here, x, 0.0), 0) / rows2, base + mean)
    moved = tl.where(here, x - base2[None, :], 0.0)
    mean2 = tl.sum(moved, 0) / rows2
    spread = tl.where(here, moved - mean2[None, :], 0.0)
    bad = here & (x != x)
    good = here & (x == x)
    any_bad = tl.max(bad.to(tl.int32), 0) > 0
    top2 = tl.where(any_bad, float("nan"), tl.max(tl.where(good, x, float("-inf")), 0))
    low2 = tl.where(any_bad, float("nan"), tl.min(tl.where(good, x, float("inf")), 0))
    top_at2 = top_at
    low_at2 = low_at
    if INDICES:
        # the first of equal entries; where there is a NaN, the first NaN
        number = tl.broadcast_to(row[:, None], x.shape)
        top_at2 = tl.min(tl.where((good & (x == top2[None, :])) | bad, number, far), 0)
        low_at2 = tl.min(tl.where((good & (x == low2[None, :])) | bad, number, far), 0)
    return merge(
        count,
        base,
        mean,
        rest,
        square,
        top,
        low,
        top_at,
        low_at,
        count2,
        base2,
        mean2,
        tl.zeros(mean2.shape, tl.float32),
        tl.sum(spread * spread, 0),
        top2,
        low2,
        top_at2,
        low_at2,
    )


@triton.jit
def load_rows(local, valid, b, row, end, segments, slots, stride_b, stride_n, stride_m, c, width, VALID: tl.constexpr):
    """(x float32, keep) of rows ``row`` before ``end``, row = segment * slots + slot."""
    keep = row < end
    segment = row // slots
    if VALID:
        counts = tl.load(valid + b.to(tl.int64) * segments + segment, mask=keep, other=0)
        keep = keep & (counts.to(tl.int32) != 0)
    at = local + b.to(tl.int64) * stride_b + segment[:, None].to(tl.int64) * stride_n
    at += (row % slots)[:, None].to(tl.int64) * stride_m + c[None, :]
    x = tl.load(at, mask=keep[:, None] & (c[None, :] < width), other=0.0)
    return x.to(tl.float32), keep


@triton.jit
def document_rows(cu, document, segments, slots, PACKED: tl.constexpr):
    """First row and end of a document's rows."""
    if PACKED:
        start = tl.load(cu + document)
        stop = tl.maximum(tl.minimum(tl.load(cu + document + 1), segments), start)
        start = tl.maximum(start, 0)
    else:
        start = document * 0
        stop = start + segments
    return start * slots, stop * slots


@triton.jit
def store_stats(
    out, scratch, squares, at, chunk, chunks, c, width, count, base, mean, rest, square, top, low, BLOCK_H: tl.constexpr
):
    """Rows 0 to 3 of set ``at``, base, mean and square of it, and this block's part of ||mean||^2."""
    inside = c < width
    absolute = tl.where(count == 0, 0.0, (base + mean) + rest)
    variance = square / tl.maximum(count, 1).to(tl.float32)
    flat = variance <= VARIANCE_FLOOR
    std = tl.where(flat, FLOOR, tl.sqrt_rn(tl.where(flat, 1.0, variance)))
    kind: tl.constexpr = out.dtype.element_ty
    row = out + at * 5 * width + c
    tl.store(row, narrow(absolute, kind), mask=inside)
    tl.store(row + width, narrow(tl.where(count == 0, 0.0, top), kind), mask=inside)
    tl.store(row + 2 * width, narrow(tl.where(count == 0, 0.0, low), kind), mask=inside)
    tl.store(row + 3 * width, narrow(tl.where(count == 0, 0.0, std), kind), mask=inside)
    tl.store(scratch + at * width + c, absolute, mask=inside)
    tl.store(squares + at * chunks + chunk, tl.sum(tl.where(inside, absolute * absolute, 0.0), 0))


@triton.jit
def store_summary(
    parts, counts, at, c, width, count, base, mean, rest, square, top, low, top_at, low_at, INDICES: tl.constexpr
):
    """Summary number ``at``: parts float32 [.., 8, H] (indices as bits), counts int32 [..]."""
    inside = c < width
    row = parts + at * 8 * width + c
    tl.store(row, base, mask=inside)
    tl.store(row + width, mean, mask=inside)
    tl.store(row + 2 * width, rest, mask=inside)
    tl.store(row + 3 * width, square, mask=inside)
    tl.store(row + 4 * width, top, mask=inside)
    tl.store(row + 5 * width, low, mask=inside)
    if INDICES:
        tl.store(row + 6 * width, top_at.to(tl.float32, bitcast=True), mask=inside)
        tl.store(row + 7 * width, low_at.to(tl.float32, bitcast=True), mask=inside)
    tl.store(counts + at, count)


@triton.jit
def load_summary(parts, counts, at, c, width, INDICES: tl.constexpr):
    inside = c < width
    row = parts + at * 8 * width + c
    base = tl.load(row, mask=inside, other=0.0)
    mean = tl.load(row + width, mask=inside, other=0.0)
    rest = tl.load(row + 2 * width, mask=inside, other=0.0)
    square = tl.load(row + 3 * width, mask=inside, other=0.0)
    top = tl.load(row + 4 * width, mask=inside, other=0.0)
    low = tl.load(row + 5 * width, mask=inside, other=0.0)
    top_at = tl.zeros(c.shape, tl.int32)
    low_at = tl.zeros(c.shape, tl.int32)
    if INDICES:
        top_at = tl.load(row + 6 * width, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        low_at = tl.load(row + 7 * width, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return tl.load(counts + at), base, mean, rest, square, top, low, top_at, low_at


@triton.jit(do_not_specialize=SIZES)
def shared_stats(
    local,
    valid,
    cu,
    out,
    scratch,
    squares,
    parts,
    counts,
    stride_b,
    stride_n,
    stride_m,
    segments,
    slots,
    width,
    documents,
    splits,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    VALID: tl.constexpr,
    PACKED: tl.constexpr,
    FINAL: tl.constexpr,
    INDICES: tl.constexpr,
):
    """FINAL (one split): out [B * documents, 5, H] rows 0 to 3. Else the summary of every split."""
    chunks = tl.cdiv(width, BLOCK_H)
    pid = tl.program_id(0)
    chunk = pid % chunks
    split = pid // chunks % splits
    set_ = pid // (chunks * splits)
    b = set_ // documents
    first, stop = document_rows(cu, set_ % documents, segments, slots, PACKED)
    each = tl.cdiv(tl.cdiv(stop - first, splits), BLOCK_R) * BLOCK_R
    begin = first + split * each
    end = tl.minimum(begin + each, stop)
    c = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
    count, base, mean, rest, square, top, low, top_at, low_at = nothing(BLOCK_H)
    for start in tl.range(begin, end, BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)
        x, keep = load_rows(local, valid, b, row, end, segments, slots, stride_b, stride_n, stride_m, c, width, VALID)
        count, base, mean, rest, square, top, low, top_at, low_at = add_rows(
            x, keep, row, count, base, mean, rest, square, top, low, top_at, low_at, INDICES
        )
    at = set_.to(tl.int64) * splits + split
    if FINAL:
        store_stats(
            out, scratch, squares, at, chunk, chunks, c, width, count, base, mean, rest, square, top, low, BLOCK_H
        )
    else:
        store_summary(parts, counts, at, c, width, count, base, mean, rest, square, top, low, top_at, low_at, INDICES)


@triton.jit(do_not_specialize=SIZES)
def merge_stats(
    out,
    scratch,
    squares,
    parts,
    counts,
    width,
    splits,
    BLOCK_H: tl.constexpr,
):
    """Rows 0 to 3 of every set from the summaries of its splits, in order."""
    chunks = tl.cdiv(width, BLOCK_H)
    chunk = tl.program_id(0) % chunks
    set_ = (tl.program_id(0) // chunks).to(tl.int64)
    c = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
    count, base, mean, rest, square, top, low, top_at, low_at = nothing(BLOCK_H)
    for i in range(0, splits):
        count2, base2, mean2, rest2, square2, top2, low2, top_at2, low_at2 = load_summary(
            parts, counts, set_ * splits + i, c, width, False
        )
        count, base, mean, rest, square, top, low, top_at, low_at = merge(
            count,
            base,
            mean,
            rest,
            square,
            top,
            low,
            top_at,
            low_at,
            count2,
            base2,
            mean2,
            rest2,
            square2,
            top2,
            low2,
            top_at2,
            low_at2,
        )
    store_stats(
        out, scratch, squares, set_, chunk, chunks, c, width, count, base, mean, rest, square, top, low, BLOCK_H
    )


@triton.jit(do_not_specialize=SIZES)
def causal_stats(
    local,
    valid,
    starts,
    grad,
    out,
    scratch,
    squares,
    dots,
    parts,
    counts,
    carry,
    carry_counts,
    stride_b,
    stride_n,
    stride_m,
    segments,
    slots,
    width,
    pieces,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    VALID: tl.constexpr,
    PACKED: tl.constexpr,
    EMIT: tl.constexpr,
    CARRY: tl.constexpr,
    INDICES: tl.constexpr,
):
    """Segments of one piece in order. ``starts`` [N]: first segment of each segment's document.

    EMIT "stats": rows 0 to 3 of every segment's set into out [B, N, 5, H]. "gradient": its summary and its part of
    ||mean||^2 and of grad row 4 . mean. "piece": the summary after the last segment.
    """
    chunks = tl.cdiv(width, BLOCK_H)
    pid = tl.program_id(0)
    chunk = pid % chunks
    piece = pid // chunks % pieces
    b = pid // (chunks * pieces)
    each = tl.cdiv(segments, pieces)
    c = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
    count, base, mean, rest, square, top, low, top_at, low_at = nothing(BLOCK_H)
    if CARRY:
        count, base, mean, rest, square, top, low, top_at, low_at = load_summary(
            carry, carry_counts, b.to(tl.int64) * pieces + piece, c, width, INDICES
        )
    for i in range(piece * each, tl.minimum(piece * each + each, segments)):
        if PACKED:
            # nothing else needs to be forgotten: the first rows of a fresh summary replace it
            restart = tl.load(starts + i) == i
            count = tl.where(restart, 0, count)
            mean = tl.where(restart, 0.0, mean)
            rest = tl.where(restart, 0.0, rest)
            square = tl.where(restart, 0.0, square)
            top = tl.where(restart, float("-inf"), top)
            low = tl.where(restart, float("inf"), low)
        for start in tl.range(0, slots, BLOCK_R, num_stages=STAGES):
            row = i * slots + start + tl.arange(0, BLOCK_R)
            x, keep = load_rows(
                local,
                valid,
                b,
                row,
                (i + 1) * slots,
                segments,
                slots,
                stride_b,
                stride_n,
                stride_m,
                c,
                width,
                VALID,
            )
            count, base, mean, rest, square, top, low, top_at, low_at = add_rows(
                x, keep, row, count, base, mean, rest, square, top, low, top_at, low_at, INDICES
            )
        at = b.to(tl.int64) * segments + i
        if EMIT == "stats":
            store_stats(
                out, scratch, squares, at, chunk, chunks, c, width, count, base, mean, rest, square, top, low, BLOCK_H
            )
        if EMIT == "gradient":
            store_summary(parts, counts, at, c, width, count, base, mean, rest, square, top, low, top_at, low_at, True)
            store_norm_terms(grad, squares, dots, at, chunk, chunks, c, width, count, base, mean, rest)
    if EMIT == "piece":
        at = b.to(tl.int64) * pieces + piece
        store_summary(parts, counts, at, c, width, count, base, mean, rest, square, top, low, top_at, low_at, INDICES)


@triton.jit
def store_norm_terms(grad, squares, dots, at, chunk, chunks, c, width, count, base, mean, rest):
    """This block's part of ||mean||^2 and of (gradient of row 4) . mean."""
    inside = c < width
    absolute = tl.where(inside, tl.where(count == 0, 0.0, (base + mean) + rest), 0.0)
    g = tl.load(grad + (at * 5 + 4) * width + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(squares + at * chunks + chunk, tl.sum(absolute * absolute, 0))
    tl.store(dots + at * chunks + chunk, tl.sum(absolute * g, 0))


@triton.jit(do_not_specialize=SIZES)
def carry_stats(
    starts,
    parts,
    counts,
    carry,
    carry_counts,
    segments,
    width,
    pieces,
    BLOCK_H: tl.constexpr,
    PACKED: tl.constexpr,
    INDICES: tl.constexpr,
):
    """The summary that each piece starts from: its document's earlier segments in earlier pieces."""
    chunks = tl.cdiv(width, BLOCK_H)
    chunk = tl.program_id(0) % chunks
    b = (tl.program_id(0) // chunks).to(tl.int64)
    each = tl.cdiv(segments, pieces)
    c = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
    count, base, mean, rest, square, top, low, top_at, low_at = nothing(BLOCK_H)
    for i in range(0, pieces):
        at = b * pieces + i
        store_summary(
            carry, carry_counts, at, c, width, count, base, mean, rest, square, top, low, top_at, low_at, INDICES
        )
        if PACKED:
            last = tl.minimum(i * each + each, segments) - 1
            restart = tl.load(starts + tl.maximum(last, 0)) >= i * each
            count = tl.where(restart, 0, count)
            mean = tl.where(restart, 0.0, mean)
            rest = tl.where(restart, 0.0, rest)
            square = tl.where(restart, 0.0, square)
            top = tl.where(restart, float("-inf"), top)
            low = tl.where(restart, float("inf"), low)
        count2, base2, mean2, rest2, square2, top2, low2, top_at2, low_at2 = load_summary(
            parts, counts, at, c, width, INDICES
        )
        count, base, mean, rest, square, top, low, top_at, low_at = merge(
            count,
            base,
            mean,
            rest,
            square,
            top,
            low,
            top_at,
            low_at,
            count2,
            base2,
            mean2,
            rest2,
            square2,
            top2,
            low2,
            top_at2,
            low_at2,
        )


@triton.jit(do_not_specialize=SIZES)
def normalise_mean(out, scratch, squares, width, chunks, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    """Row 4 of every set; BLOCK_K >= chunks, the blocks of channels that ``squares`` has parts of."""
    blocks = tl.cdiv(width, BLOCK_H)
    c = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    set_ = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    square = tl.sum(tl.load(squares + set_ * chunks + k, mask=k < chunks, other=0.0), 0)
    flat = square <= VARIANCE_FLOOR
    norm = tl.where(flat, FLOOR, tl.sqrt_rn(tl.where(flat, 1.0, square)))
    mean = tl.load(scratch + set_ * width + c, mask=c < width, other=0.0)
    at = out + (set_ * 5 + 4) * width + c
    tl.store(at, narrow(mean / norm, out.dtype.element_ty), mask=c < width)
