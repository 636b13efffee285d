"""hga_route: what its Triton kernels share. Scores as integers, and lists of the highest.

A score becomes an int32 of the same order (NaN above everything, as torch sorts it), so that maxima over queries and
heads are exact and in any order; with the id behind it an int64, larger = better: the higher score, then the lower id.
All are different, so that sorting networks give one result on every device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..attention.triton_forward import dot, load_rows

LEAST = tl.constexpr(torch.finfo(torch.float32).min)
LARGEST_ID = tl.constexpr(2**31 - 1)
BAD = tl.constexpr(2**31 - 1)  # the score NaN
NO_SCORE = tl.constexpr(-(2**31))
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def ordered(score):
    """int32 of the same order; -0 is 0, and -inf stays above "not a candidate"."""
    score = tl.where(score < LEAST, LEAST, score)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score != score, BAD, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def packed(key, ids, keep):
    """int64 of ordered scores and ids where ``keep``, else NOTHING."""
    return tl.where(keep, (key.to(tl.int64) << 32) | (ids ^ 0x7FFFFFFF).to(tl.int64), NOTHING)


@triton.jit
def real(x):
    """Whether a packed entry names a candidate: one whose score is a number."""
    key = x >> 32
    return (key != BAD) & (key != NO_SCORE)


@triton.jit
def ids_of(x, count):
    """int32 ids of packed lists [R, K], best first; -1 where there is none, and beyond ``count``."""
    rank = tl.arange(0, x.shape[1])
    found = (x & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    return tl.where(real(x) & (rank < count)[None, :], found, -1)


@triton.jit
def keep_best(best, found, K: tl.constexpr):
    """The K highest of best [R, K], highest first, and found [R, N], N >= K."""
    # of a falling and a rising list the larger of each pair are the K highest of both
    return tl.sort(tl.maximum(best, tl.flip(tl.topk(found, K), 1)), descending=True)


@triton.jit
def rising(ids):
    """Sorted ids [R, N], -1 at the end."""
    found = tl.sort(tl.where(ids < 0, LARGEST_ID, ids))
    return tl.where(found == LARGEST_ID, -1, found)


@triton.jit
def scores(q_rows, asking, k_rows, present, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Ordered scores [M, N] of the queries and keys at row pointers, from BLOCK_D columns at a time."""
    score = tl.zeros((q_rows.shape[0], k_rows.shape[0]), tl.float32)
    for d0 in range(0, HEAD_DIM, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        q = load_rows(q_rows, asking, d, HEAD_DIM, HEAD_DIM % BLOCK_D != 0, True)
        k = load_rows(k_rows, present, d, HEAD_DIM, HEAD_DIM % BLOCK_D != 0, True)
        score = dot(q, tl.trans(k), score)
    return ordered(score)


@triton.jit
def region(p, chunk_size, keep_first, keep_last, chunks):
    """(n, f, end) of queries at index p: active chunk, pool [f, end) without chunks that are not there."""
    n = p // chunk_size
    f = tl.minimum(n, keep_first)
    end = tl.minimum(tl.maximum(n - keep_last, keep_first), n)
    return n, f, tl.minimum(end, chunks)


@triton.jit
def with_previous(ids, n, f, chunks, here):
    """W = 0: chunk n - 1 in place of the lowest pick of ids [R, K], unless it is among them."""
    rank = tl.arange(0, ids.shape[1])[None, :]
    previous = (n - 1)[:, None]
    absent = (here & (n > f) & (n - 1 < chunks))[:, None] & (
        tl.max((ids == previous).to(tl.int32), 1, keep_dims=True) == 0
    )
    lowest = tl.sum((ids >= 0).to(tl.int32), 1, keep_dims=True) - 1
    return tl.where(absent & (rank == lowest), previous, ids)
