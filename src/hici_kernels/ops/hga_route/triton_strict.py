"""hga_route, every query for itself: Triton kernels.

    scan_chunks   sigma of a tile of rows (query, head of a kv group) against the pool, tile by tile; the best stay.
                  Few rows and many chunks: the pool is cut into ``splits`` runs, one program each
    pick_groups   the best of all runs; gamma of their groups; the best of those, ascending

Tiles of rows have one height whatever the number of queries, so that a score is formed in one way however queries are
split over calls. gamma is no matrix product: each row has candidates of its own, read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention.triton_forward import dot, load_rows
from .triton_keys import (
    NO_SCORE,
    NOTHING,
    ids_of,
    keep_best,
    ordered,
    packed,
    region,
    rising,
    scores,
    with_previous,
)

# Sizes differ from call to call; their values are no reason to compile again.
SIZES = ("first", "queries", "context", "heads", "group", "chunks", "splits", "rows", "picks", "budget", "width")


@triton.jit(do_not_specialize=SIZES)
def scan_chunks(
    q,
    chunk_keys,
    positions,
    found,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_cb,
    stride_cn,
    stride_ch,
    stride_pb,
    stride_pt,
    first,
    queries,
    heads,
    group,
    chunks,
    splits,
    chunk_size,
    keep_first,
    keep_last,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACK: tl.constexpr,
    SHARED: tl.constexpr,
    K: tl.constexpr,
):
    """found int64 [B, T, Hkv, families, splits, K]: the best of each run, best first; families = r, or 1 if SHARED.

    PACK: the power of two that r heads take in a tile. BLOCK_D: columns at a time, of the queries too where they are
    fewer than HEAD_DIM. Grid: (tiles * splits, Hkv, B).
    """
    SIZE: tl.constexpr = BLOCK_M // PACK
    FAMILIES: tl.constexpr = 1 if SHARED else PACK
    ROWS: tl.constexpr = SIZE * FAMILIES
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)

    row = tl.arange(0, ROWS)
    t = tile * SIZE + row // FAMILIES
    inside = t < queries
    p = first + t
    if positions is not None:
        p = tl.load(positions + b * stride_pb + t.to(tl.int64) * stride_pt, mask=inside, other=-1).to(tl.int32)
    alive = inside & (p >= 0)
    _n, f, end = region(p, chunk_size, keep_first, keep_last, chunks)
    low = tl.min(tl.where(alive, f, chunks), 0)
    high = tl.max(tl.where(alive, end, 0), 0)
    run = tl.cdiv(tl.cdiv(high - low, splits), BLOCK_N) * BLOCK_N
    low = low + split * run
    high = tl.minimum(low + run, high)

    member = tl.arange(0, BLOCK_M)
    t_q = tile * SIZE + member // PACK
    head = member % PACK
    asking = (t_q < queries) & (head < group)
    if positions is not None:
        at = positions + b * stride_pb + t_q.to(tl.int64) * stride_pt
        asking = asking & (tl.load(at, mask=t_q < queries, other=-1) >= 0)
    q_rows = q + b * stride_qb + t_q.to(tl.int64) * stride_qt + (kv_head * group + head).to(tl.int64) * stride_qh
    d = tl.arange(0, BLOCK_D)
    if BLOCK_D >= HEAD_DIM:
        q_tile = load_rows(q_rows, asking, d, HEAD_DIM, HEAD_DIM < BLOCK_D, True)
    base = chunk_keys + b * stride_cb + kv_head.to(tl.int64) * stride_ch

    best = tl.full((ROWS, K), NOTHING, tl.int64)
    for c0 in range(low, high, BLOCK_N):
        c = c0 + tl.arange(0, BLOCK_N)
        k_rows = base + c.to(tl.int64) * stride_cn
        if BLOCK_D >= HEAD_DIM:
            keys = load_rows(k_rows, c < high, d, HEAD_DIM, HEAD_DIM < BLOCK_D, True)
            key = ordered(dot(q_tile, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)))
        else:
            key = scores(q_rows, asking, k_rows, c < high, HEAD_DIM, BLOCK_D)
        if SHARED:
            key = tl.where((head < group)[:, None], key, NO_SCORE)
            key = tl.max(tl.reshape(key, (ROWS, PACK, BLOCK_N)), 1)
        pool = alive[:, None] & (c[None, :] >= f[:, None]) & (c[None, :] < tl.minimum(end, high)[:, None])
        best = keep_best(best, packed(key, c[None, :], pool), K)

    family = row % FAMILIES
    families = 1 if SHARED else group
    at = (((b * queries + t) * heads + kv_head) * families + family) * splits + split
    k = tl.arange(0, K)
    kept = inside & (family < families)
    tl.store(found + at[:, None] * K + k[None, :], best, mask=kept[:, None])


@triton.jit(do_not_specialize=SIZES)
def pick_groups(
    q,
    group_keys,
    positions,
    found,
    routes,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_gb,
    stride_gn,
    stride_gm,
    stride_gh,
    stride_pb,
    stride_pt,
    stride_rb,
    first,
    queries,
    heads,
    group,
    chunks,
    splits,
    rows,
    picks,
    budget,
    width,
    chunk_size,
    keep_first,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PACK: tl.constexpr,
    SHARED: tl.constexpr,
    PREVIOUS: tl.constexpr,
    CHOOSE: tl.constexpr,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    KG: tl.constexpr,
):
    """routes int32 [B, T, Hq, width]: BLOCK_R rows (b, t, kv head, family) of ``found`` a program.

    SPLITS, K, KG, GROUPS_PACK: powers of two that hold splits, picks, budget and M. CHOOSE: there are more candidates
    than the budget opens. Grid: (rows / BLOCK_R,).
    """
    WIDE: tl.constexpr = K * GROUPS_PACK
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = row < rows
    families = 1 if SHARED else group
    family = row % families
    kv_head = row // families % heads
    t = row // families // heads % queries
    b = row // families // heads // queries
    p = (first + t).to(tl.int32)
    if positions is not None:
        p = tl.load(positions + b * stride_pb + t * stride_pt, mask=here, other=-1).to(tl.int32)

    x = tl.arange(0, SPLITS * K)
    kept = here[:, None] & (x < splits * K)[None, :]
    best = tl.load(found + row[:, None] * (splits * K) + x[None, :], mask=kept, other=NOTHING)
    if SPLITS > 1:
        best = tl.topk(best, K)
    ids = ids_of(best, picks)
    if PREVIOUS:
        n, f, _end = region(p, chunk_size, keep_first, 0, chunks)
        ids = with_previous(ids, n, f, chunks, here & (p >= 0))

    m = tl.arange(0, GROUPS_PACK)
    candidate = tl.where((ids >= 0)[:, :, None] & (m < GROUPS)[None, None, :], ids[:, :, None] * GROUPS + m, -1)
    candidate = tl.reshape(candidate, (BLOCK_R, WIDE))
    if CHOOSE:
        there = candidate >= 0
        some = tl.where(there, candidate, 0).to(tl.int64)
        k_rows = (group_keys + b * stride_gb + kv_head * stride_gh)[:, None]
        k_rows += some // GROUPS * stride_gn + some % GROUPS * stride_gm
        key = tl.full((BLOCK_R, WIDE), NO_SCORE, tl.int32)
        for i in range(0, group if SHARED else 1):
            q_rows = q + b * stride_qb + t * stride_qt + (kv_head * group + family + i) * stride_qh
            gamma = tl.zeros((BLOCK_R, WIDE), tl.float32)
            for d0 in tl.static_range(0, HEAD_DIM, BLOCK_C):
                d = d0 + tl.arange(0, BLOCK_C)
                column = (d < HEAD_DIM)[None, :]
                q_part = tl.load(q_rows[:, None] + d[None, :], mask=here[:, None] & column, other=0.0)
                k_part = tl.load(k_rows[:, :, None] + d[None, None, :], mask=there[:, :, None] & column, other=0.0)
                gamma += tl.sum(q_part.to(tl.float32)[:, None, :] * k_part.to(tl.float32), 2)
            key = tl.maximum(key, ordered(gamma))
        candidate = ids_of(tl.topk(packed(key, candidate, there), KG), budget)
    found_ids = rising(candidate)

    w = tl.arange(0, candidate.shape[1])
    kept = here[:, None] & (w < width)[None, :]
    for i in range(0, group if SHARED else 1):
        at = b * stride_rb + ((t * heads + kv_head) * group + family + i) * width
        tl.store(routes + at[:, None] + w[None, :], found_ids, mask=kept)
