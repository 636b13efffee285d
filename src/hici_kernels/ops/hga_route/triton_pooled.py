"""hga_route over runs of queries ("prefix" and "block"): the Triton kernel.

A program holds all queries of one run (the queries of one chunk, of at most route_block of them for "block") as the
rows of its tiles, for one query head, or for all heads of a kv group in turn where they share their route. So a maximum
over the run is one down a column, and one over the queries so far a running one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_keys import NO_SCORE, NOTHING, ids_of, keep_best, packed, real, region, rising, scores, with_previous

# Sizes differ from call to call; their values are no reason to compile again.
SIZES = ("queries", "context", "heads", "group", "chunks", "picks", "budget", "requests", "width", "runs", "first")


@triton.jit
def highest(a, b):
    return tl.maximum(a, b)


@triton.jit
def so_far(x):
    """Running maximum down the rows."""
    return tl.associative_scan(x, 0, tl.standard._elementwise_max)


@triton.jit
def family_scores(q_rows, stride_qh, asking, k_rows, present, members, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Ordered scores [rows, keys], the maximum over the heads of a family."""
    key = scores(q_rows, asking, k_rows, present, HEAD_DIM, BLOCK_D)
    for i in range(1, members):
        other = scores(q_rows + i * stride_qh, asking, k_rows, present, HEAD_DIM, BLOCK_D)
        key = tl.maximum(key, other)
    return tl.where(asking[:, None] & present[None, :], key, NO_SCORE)


@triton.jit
def column_of(x, k):
    """Column k of x [R, K], as [R]."""
    return tl.sum(tl.where((tl.arange(0, x.shape[1]) == k)[None, :], x, 0), 1)


@triton.jit(do_not_specialize=SIZES)
def route_runs(
    q,
    chunk_keys,
    group_keys,
    positions,
    order,
    starts,
    routes,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_cb,
    stride_cn,
    stride_ch,
    stride_gb,
    stride_gn,
    stride_gm,
    stride_gh,
    stride_pb,
    stride_pt,
    first,
    queries,
    context,
    heads,
    group,
    chunks,
    picks,
    budget,
    requests,
    width,
    chunk_size,
    keep_first,
    keep_last,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PACK: tl.constexpr,
    SHARED: tl.constexpr,
    PREVIOUS: tl.constexpr,
    BLOCK_RULE: tl.constexpr,
    K: tl.constexpr,
    KG: tl.constexpr,
):
    """routes int32 [B, T - context, Hq, width], filled with -1 before.

    Query ``order[b, j]`` (None: j) stands j-th; run x of row b is j in [starts[b, x], starts[b, x + 1]). ``picks``,
    ``budget``, ``requests``: chunks picked, groups opened (or materialised), groups requested ("block"). Grid:
    (runs, Hkv * families, B).
    """
    b = tl.program_id(2).to(tl.int64)
    families = 1 if SHARED else group
    kv_head = (tl.program_id(1) // families).to(tl.int64)
    head = kv_head * group + tl.program_id(1) % families
    members = group if SHARED else 1
    at = starts + b * (tl.num_programs(0) + 1) + tl.program_id(0)
    begin = tl.load(at)
    stop = tl.load(at + 1)
    if begin >= stop:
        return
    j = begin + tl.arange(0, BLOCK_T)
    here = j < stop
    t = j.to(tl.int64)
    if order is not None:
        t = tl.load(order + b * queries + t, mask=here, other=0)
    p = (first + t).to(tl.int32)
    if positions is not None:
        p = tl.load(positions + b * stride_pb + t * stride_pt, mask=here, other=0).to(tl.int32)
    # one chunk for all of them
    index = tl.max(tl.where(here, p, 0), 0)
    n, f, end = region(index, chunk_size, keep_first, keep_last, chunks)
    q_rows = q + b * stride_qb + t * stride_qt + head * stride_qh
    c_base = chunk_keys + b * stride_cb + kv_head * stride_ch
    g_base = group_keys + b * stride_gb + kv_head * stride_gh

    own = tl.full((BLOCK_T, K), NOTHING, tl.int64)
    best = tl.full((1 if BLOCK_RULE else BLOCK_T, K), NOTHING, tl.int64)
    for c0 in range(f, end, BLOCK_N):
        c = c0 + tl.arange(0, BLOCK_N)
        there = c < end
        k_rows = c_base + c.to(tl.int64) * stride_cn
        key = family_scores(q_rows, stride_qh, here, k_rows, there, members, HEAD_DIM, BLOCK_D)
        if BLOCK_RULE:
            own = keep_best(own, packed(key, c[None, :], there[None, :] & here[:, None]), K)
            top = tl.max(key, 0, keep_dims=True)
            best = keep_best(best, packed(top, c[None, :], there[None, :]), K)
        else:
            best = keep_best(best, packed(so_far(key), c[None, :], there[None, :] & here[:, None]), K)
    ids = ids_of(best, picks)

    if BLOCK_RULE:
        WIDE: tl.constexpr = K * GROUPS_PACK
        if PREVIOUS:
            ids = with_previous(ids, tl.full((1,), 0, tl.int32) + n, tl.full((1,), 0, tl.int32) + f, chunks, True)
        m = tl.arange(0, GROUPS_PACK)
        candidate = tl.where((ids >= 0)[:, :, None] & (m < GROUPS)[None, None, :], ids[:, :, None] * GROUPS + m, -1)
        candidate = tl.reshape(candidate, (WIDE,))
        there = candidate >= 0
        some = tl.where(there, candidate, 0).to(tl.int64)
        k_rows = g_base + some // GROUPS * stride_gn + some % GROUPS * stride_gm
        key = family_scores(q_rows, stride_qh, here, k_rows, there, members, HEAD_DIM, BLOCK_D)
        gamma = packed(key, candidate[None, :], there[None, :] & here[:, None])
        pooled = tl.max(gamma, 0, keep_dims=True)
        last = column_of(tl.sort(pooled, descending=True), budget - 1)
        materialised = (pooled >= last[:, None]) & real(pooled)
        last = column_of(tl.sort(gamma, descending=True), requests - 1)
        requested = (gamma >= last[:, None]) & real(gamma) & (requests > 0)

        own_ids = ids_of(own, picks)
        wanted = tl.zeros((BLOCK_T, K), tl.int32)
        for k in range(0, K):
            wanted = tl.maximum(wanted, (column_of(own_ids, k)[:, None] == ids).to(tl.int32))
        visible = so_far(wanted) > 0
        if PREVIOUS:
            visible = visible | (ids == n - 1)
        visible = visible & (ids >= 0)
        visible = tl.reshape(
            tl.broadcast_to(visible[:, :, None], (BLOCK_T, K, GROUPS_PACK)).to(tl.int32), (BLOCK_T, WIDE)
        )
        opened = materialised & (so_far(requested.to(tl.int32)) > 0) & (visible > 0) & there[None, :]
        result = rising(tl.where(opened, candidate[None, :], -1))
    else:
        if PREVIOUS:
            zeros = tl.zeros((BLOCK_T,), tl.int32)
            ids = with_previous(ids, zeros + n, zeros + f, chunks, here)
        opened = tl.full((BLOCK_T, KG), NOTHING, tl.int64)
        for g0 in range(f * GROUPS, end * GROUPS, BLOCK_N):
            g = g0 + tl.arange(0, BLOCK_N)
            there = g < end * GROUPS
            chunk = tl.where(there, g // GROUPS, -2)
            inside = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
            for k in range(0, K):
                inside = tl.maximum(inside, (column_of(ids, k)[:, None] == chunk[None, :]).to(tl.int32))
            if tl.max(tl.max(inside, 1), 0) > 0:
                k_rows = g_base + chunk.to(tl.int64) * stride_gn + (g % GROUPS).to(tl.int64) * stride_gm
                key = family_scores(q_rows, stride_qh, here, k_rows, there, members, HEAD_DIM, BLOCK_D)
                opened = keep_best(opened, packed(so_far(key), g[None, :], (inside > 0) & here[:, None]), KG)
        result = rising(ids_of(opened, budget))

    w = tl.arange(0, result.shape[1])
    kept = (here & (t >= context))[:, None] & (w < width)[None, :]
    for i in range(0, members):
        row = (b * (queries - context) + t - context) * heads * group + head + i
        tl.store(routes + row[:, None] * width + w[None, :], result, mask=kept)
