"""global_stats: Triton kernels of the backward pass. Per set of k rows, with the gradients g0 .. g4 of its statistics:

dmean = g0 + (g4 - u (u . g4)) / ||mean||, u = mean / ||mean||        (g4 / 1e-6 at the norm's floor)
dx_j  = dmean / k + g3 (x_j - mean) / (k std) + [j first maximum] g1 + [j first minimum] g2
                                                                        (no g3 term at the std's floor)

merge_summaries   shared: the set's summary with indices from its splits, and what its norm needs of all channels
shared_gradients  shared: dx of every row
causal_gradients  the sets of all segments of a document at once: from the last segment to the first, the sums of
                  their coefficients over the segments that see a row. Maxima are handed down as long as the
                  earlier segment has the same one; where it has not, the row lies in this segment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import (
    FLOOR,
    SIZES,
    VARIANCE_FLOOR,
    document_rows,
    load_rows,
    load_summary,
    merge,
    narrow,
    nothing,
    store_norm_terms,
    store_summary,
)


@triton.jit(do_not_specialize=SIZES)
def merge_summaries(
    grad,
    parts,
    counts,
    merged,
    merged_counts,
    squares,
    dots,
    width,
    splits,
    BLOCK_H: tl.constexpr,
):
    chunks = tl.cdiv(width, BLOCK_H)
    chunk = tl.program_id(0) % chunks
    set_ = (tl.program_id(0) // chunks).to(tl.int64)
    c = chunk * BLOCK_H + tl.arange(0, BLOCK_H)
    count, base, mean, rest, square, top, low, top_at, low_at = nothing(BLOCK_H)
    for i in range(0, splits):
        count2, base2, mean2, rest2, square2, top2, low2, top_at2, low_at2 = load_summary(
            parts, counts, set_ * splits + i, c, width, True
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
    store_summary(
        merged, merged_counts, set_, c, width, count, base, mean, rest, square, top, low, top_at, low_at, True
    )
    store_norm_terms(grad, squares, dots, set_, chunk, chunks, c, width, count, base, mean, rest)


@triton.jit
def coefficients(grad, squares, dots, at, chunks, c, width, count, base, mean, rest, square, BLOCK_K: tl.constexpr):
    """dmean / k and g3 / (k std) of set ``at``; 0 where nothing counts."""
    inside = c < width
    k = tl.arange(0, BLOCK_K)
    norm2 = tl.sum(tl.load(squares + at * chunks + k, mask=k < chunks, other=0.0), 0)
    along = tl.sum(tl.load(dots + at * chunks + k, mask=k < chunks, other=0.0), 0)
    row = grad + at * 5 * width + c
    g0 = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    g3 = tl.load(row + 3 * width, mask=inside, other=0.0).to(tl.float32)
    g4 = tl.load(row + 4 * width, mask=inside, other=0.0).to(tl.float32)
    flat = norm2 <= VARIANCE_FLOOR
    safe = tl.where(flat, 1.0, norm2)
    turned = (g4 - ((base + mean) + rest) * (along / safe)) / tl.sqrt_rn(safe)
    by_mean = g0 + tl.where(flat, g4 / FLOOR, turned)
    rows = tl.maximum(count, 1).to(tl.float32)
    variance = square / rows
    level = variance <= VARIANCE_FLOOR
    by_std = tl.where(level, 0.0, g3 / (rows * tl.sqrt_rn(tl.where(level, 1.0, variance))))
    return tl.where(count == 0, 0.0, by_mean / rows), tl.where(count == 0, 0.0, by_std)


@triton.jit(do_not_specialize=SIZES)
def shared_gradients(
    local,
    valid,
    cu,
    grad,
    merged,
    merged_counts,
    squares,
    dots,
    dx,
    stride_b,
    stride_n,
    stride_m,
    segments,
    slots,
    width,
    documents,
    splits,
    chunks,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    VALID: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dx [B, N, M, H], contiguous; rows that do not count get 0. ``chunks``: parts of ``squares`` and ``dots``."""
    blocks = tl.cdiv(width, BLOCK_H)
    pid = tl.program_id(0)
    c = pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    split = pid // blocks % splits
    set_ = (pid // (blocks * splits)).to(tl.int64)
    b = pid // (blocks * splits) // documents
    first, stop = document_rows(cu, pid // (blocks * splits) % documents, segments, slots, PACKED)
    each = tl.cdiv(tl.cdiv(stop - first, splits), BLOCK_R) * BLOCK_R
    begin = first + split * each
    end = tl.minimum(begin + each, stop)
    inside = c < width
    count, base, mean, rest, square, _, _, top_at, low_at = load_summary(merged, merged_counts, set_, c, width, True)
    by_mean, by_std = coefficients(
        grad, squares, dots, set_, chunks, c, width, count, base, mean, rest, square, BLOCK_K
    )
    by_top = tl.load(grad + (set_ * 5 + 1) * width + c, mask=inside, other=0.0).to(tl.float32)
    by_low = tl.load(grad + (set_ * 5 + 2) * width + c, mask=inside, other=0.0).to(tl.float32)
    for start in tl.range(begin, end, BLOCK_R, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_R)
        x, keep = load_rows(local, valid, b, row, end, segments, slots, stride_b, stride_n, stride_m, c, width, VALID)
        g = by_mean[None, :] + by_std[None, :] * (((x - base[None, :]) - mean[None, :]) - rest[None, :])
        g += tl.where(row[:, None] == top_at[None, :], by_top[None, :], 0.0)
        g += tl.where(row[:, None] == low_at[None, :], by_low[None, :], 0.0)
        g = tl.where(keep[:, None], g, 0.0)
        at = dx + (b.to(tl.int64) * segments * slots + row)[:, None] * width + c[None, :]
        tl.store(at, narrow(g, dx.dtype.element_ty), mask=(row < end)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=SIZES)
def causal_gradients(
    local,
    valid,
    starts,
    grad,
    parts,
    counts,
    squares,
    dots,
    dx,
    stride_b,
    stride_n,
    stride_m,
    segments,
    slots,
    width,
    chunks,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VALID: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dx [B, N, M, H], contiguous. Row j of segment s: sums over segments i >= s of its document."""
    blocks = tl.cdiv(width, BLOCK_H)
    c = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    b = tl.program_id(0) // blocks
    inside = c < width
    by_mean = tl.zeros((BLOCK_H,), tl.float32)
    by_std = tl.zeros((BLOCK_H,), tl.float32)
    by_std_mean = tl.zeros((BLOCK_H,), tl.float32)
    by_top = tl.zeros((BLOCK_H,), tl.float32)
    by_low = tl.zeros((BLOCK_H,), tl.float32)
    top = tl.full((BLOCK_H,), -1, tl.int32)
    low = tl.full((BLOCK_H,), -1, tl.int32)
    for back in range(0, segments):
        i = segments - 1 - back
        at = b.to(tl.int64) * segments + i
        if PACKED:
            last = tl.load(starts + tl.minimum(i + 1, segments - 1)) > i
            by_mean = tl.where(last, 0.0, by_mean)
            by_std = tl.where(last, 0.0, by_std)
            by_std_mean = tl.where(last, 0.0, by_std_mean)
            top = tl.where(last, -1, top)
            low = tl.where(last, -1, low)
        count, base, mean, rest, square, _, _, top_at, low_at = load_summary(parts, counts, at, c, width, True)
        more_mean, more_std = coefficients(
            grad, squares, dots, at, chunks, c, width, count, base, mean, rest, square, BLOCK_K
        )
        by_mean += more_mean
        by_std += more_std
        # the mean is relative to the document's base, as x will be: offsets cancel before they are multiplied
        by_std_mean += more_std * mean
        g1 = tl.load(grad + (at * 5 + 1) * width + c, mask=inside, other=0.0).to(tl.float32)
        g2 = tl.load(grad + (at * 5 + 2) * width + c, mask=inside, other=0.0).to(tl.float32)
        by_top = tl.where(top_at == top, by_top, 0.0) + g1
        by_low = tl.where(low_at == low, by_low, 0.0) + g2
        top = top_at
        low = low_at
        for start in range(0, slots, BLOCK_R):
            row = i * slots + start + tl.arange(0, BLOCK_R)
            end = (i + 1) * slots
            x, keep = load_rows(
                local, valid, b, row, end, segments, slots, stride_b, stride_n, stride_m, c, width, VALID
            )
            g = by_mean[None, :] + (by_std[None, :] * (x - base[None, :]) - by_std_mean[None, :])
            g += tl.where(row[:, None] == top[None, :], by_top[None, :], 0.0)
            g += tl.where(row[:, None] == low[None, :], by_low[None, :], 0.0)
            g = tl.where(keep[:, None], g, 0.0)
            at_x = dx + (b.to(tl.int64) * segments * slots + row)[:, None] * width + c[None, :]
            tl.store(at_x, narrow(g, dx.dtype.element_ty), mask=(row < end)[:, None] & inside[None, :])
