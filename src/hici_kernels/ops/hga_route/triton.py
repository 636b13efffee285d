"""hga_route in Triton: scores stream past and only those that may still win are kept, as one integer per candidate.

"strict" takes two launches per run of queries (:mod:`.triton_strict`), with few rows and many chunks the scan is cut
into runs of chunks; "prefix" and "block" one, after their runs have been marked (:mod:`.triton_pooled`). Nothing is
read back from the device. Products take operands in the tensors' dtype and sum in float32 in an order that depends on
the chip, head_dim, budgets and the table's BLOCK_M and BLOCK_N alone. float32, bfloat16, float16; not float64.
Deterministic.

Not served, and left to the reference: super-chunks, budgets far beyond the defaults (below), and with "prefix" and
"block" runs of more than 128 queries; "block" on sm_100 and later.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tuning
from ..._triton import rejects_device
from ...tuning import multiprocessors
from ...tuning.chips import generation, vendor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
LARGEST_GRID = 65535
LARGEST_GROUP = 64
# Lists live in registers: chunks picked, candidates of a query, and both for a whole run of queries.
MOST_PICKS = 128
MOST_CANDIDATES = 1024
MOST_POOLED = 256
LONGEST_RUN = 128
# Columns of both operands at a time: with more ptxas spills (float32: 1 KB a thread with 64, 10 KB with 128).
WIDEST, WIDEST_FLOAT32 = 128, 32
# Numbers of scratch between the two launches, in entries of 8 bytes.
SCRATCH = 1 << 23


def serves_block(arch: str) -> bool:
    """Whether the two lists of "block" fit the registers: ptxas for sm_100 and later spills 140 KB a thread."""
    return vendor(arch) != "nvidia" or generation(arch) < 100


def rejects(
    q: Tensor,
    chunk_keys: Tensor,
    group_keys: Tensor,
    positions: Tensor | None,
    context: int,
    chunk_size: int,
    keep_first: int,
    keep_last: int,
    topk_chunks: int,
    topk_groups: int,
    routing: str,
    route_block: int,
    share: str,
    super_chunk: int = 0,
    *rest: Any,
) -> str | None:
    from ..attention.triton_forward import INTERPRET

    b, _, hq, d = q.shape
    hkv, n, m = chunk_keys.shape[2], chunk_keys.shape[1], group_keys.shape[2]
    if q.dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, q is {q.dtype}"
    foreign = rejects_device("q", q, INTERPRET.value)
    if foreign is not None:
        return foreign
    return limits(
        tuning.architecture(q.device),
        b,
        hq,
        hkv,
        d,
        n,
        m,
        topk_chunks,
        topk_groups,
        chunk_size,
        routing,
        route_block,
        super_chunk,
    )


def limits(
    arch: str,
    b: int,
    hq: int,
    hkv: int,
    d: int,
    chunks: int,
    groups: int,
    topk_chunks: int,
    topk_groups: int,
    chunk_size: int,
    routing: str,
    route_block: int,
    super_chunk: int,
) -> str | None:
    """Why sizes and budgets are not served on a chip, or None."""
    if routing == "block" and not serves_block(arch):
        return f'routing="block" is not served on {arch}: its compiler leaves no registers'
    if super_chunk:
        return "it scans every chunk: no super-chunks"
    if d > LARGEST_HEAD:
        return f"it serves head_dim up to {LARGEST_HEAD}, q has {d}"
    if b > LARGEST_GRID or hq > LARGEST_GRID or hq // max(hkv, 1) > LARGEST_GROUP:
        return f"it serves batches and heads up to {LARGEST_GRID}, {LARGEST_GROUP} per kv head: got {b}, {hq}, {hkv}"
    if chunks * groups >= 2**30:
        return f"it serves fewer than 2^30 groups, got {chunks * groups}"
    picks = power(min(topk_chunks, chunks))
    candidates = picks * power(groups)
    most = MOST_CANDIDATES if routing == "strict" else MOST_POOLED
    if picks > MOST_PICKS or candidates > most or (routing != "strict" and min(topk_groups, candidates) > most):
        return (
            f"it serves topk_chunks up to {MOST_PICKS} and {most} candidate groups with routing={routing!r}, got "
            f"{topk_chunks} chunks of {groups} groups"
        )
    span = {"strict": 1, "prefix": chunk_size, "block": min(chunk_size, route_block)}[routing]
    if span > LONGEST_RUN:
        return f"it serves runs of up to {LONGEST_RUN} queries with routing={routing!r}, got {span}"
    return None


def power(value: int, low: int = 1) -> int:
    """The smallest power of two that is at least ``value`` and ``low``."""
    return max(1 << max(value - 1, 0).bit_length(), low)


def columns(q: Tensor, rows: int, keys: int) -> int:
    """How many columns of ``rows`` queries and ``keys`` keys are multiplied at a time.

    Both tiles must fit shared memory; without matrix instructions (float32) a thread holds its rows of them besides.
    """
    most = min(power(q.shape[-1], 16), WIDEST_FLOAT32 if q.dtype == torch.float32 else WIDEST)
    room = tuning.shared_memory(tuning.architecture(q.device))
    while most > 16 and (rows + keys) * most * q.element_size() > room:
        most //= 2
    return most


class Budgets(NamedTuple):
    """How many chunks are picked and groups opened, of those there are."""

    picks: int
    budget: int
    width: int

    @classmethod
    def of(cls, chunks: int, groups: int, topk_chunks: int, topk_groups: int) -> Budgets:
        picks = min(topk_chunks, chunks)
        return cls(picks, min(topk_groups, picks * groups), min(topk_groups, chunks * groups))


def forward(
    q: Tensor,
    chunk_keys: Tensor,
    group_keys: Tensor,
    positions: Tensor | None,
    context: int,
    chunk_size: int,
    keep_first: int,
    keep_last: int,
    topk_chunks: int,
    topk_groups: int,
    routing: str,
    route_block: int,
    share: str,
    super_chunk: int = 0,
    topk_supers: int = 0,
    super_keys: Tensor | None = None,
) -> Tensor:
    """int32 [B, T - context, Hq, min(topk_groups, n M)]."""
    t, n = q.shape[1], chunk_keys.shape[1]
    first = max(t, n * chunk_size) - t
    regions = (chunk_size, keep_first, keep_last)
    return routes_of(
        q,
        chunk_keys,
        group_keys,
        positions,
        first,
        context,
        regions,
        topk_chunks,
        topk_groups,
        routing,
        route_block,
        share,
    )


def routes_of(
    q: Tensor,
    chunk_keys: Tensor,
    group_keys: Tensor,
    positions: Tensor | None,
    first: int,
    context: int,
    regions: tuple[int, int, int],
    topk_chunks: int,
    topk_groups: int,
    routing: str,
    route_block: int,
    share: str,
) -> Tensor:
    """The same; without ``positions`` query t stands at index first + t. regions: chunk_size, keep_first, keep_last."""
    b, t, hq, _ = q.shape
    budgets = Budgets.of(chunk_keys.shape[1], group_keys.shape[2], topk_chunks, topk_groups)
    shape = (b, t - context, hq, budgets.width)
    if budgets.width == 0 or budgets.picks == 0 or b * (t - context) * hq == 0:
        return q.new_full(shape, -1, dtype=torch.int32)
    with torch.cuda.device_of(q):
        if routing == "strict":
            if positions is not None:
                positions = positions[:, context:]
            return _strict(q[:, context:], chunk_keys, group_keys, positions, first + context, regions, budgets, share)
        routes = q.new_full(shape, -1, dtype=torch.int32)
        requests = min(topk_groups // 2, budgets.picks * group_keys.shape[2])
        block = route_block if routing == "block" else None
        _pooled(q, chunk_keys, group_keys, positions, first, context, regions, budgets, requests, block, share, routes)
        return routes


def _config(q: Tensor) -> dict[str, int]:
    arch = tuning.architecture(q.device)
    return tuning.configuration("hga_route", arch, head_dim=q.shape[-1], segment_len=0, dtype=q.dtype)


def _strict(
    q: Tensor,
    chunk_keys: Tensor,
    group_keys: Tensor,
    positions: Tensor | None,
    first: int,
    regions: tuple[int, int, int],
    budgets: Budgets,
    share: str,
) -> Tensor:
    from .triton_strict import pick_groups, scan_chunks

    b, t, hq, d = q.shape
    n, hkv, m = chunk_keys.shape[1], chunk_keys.shape[2], group_keys.shape[2]
    r, shared = hq // hkv, share == "kv"
    config = _config(q)
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    k, pack, packed_groups = power(budgets.picks), power(r), power(m)
    block_m, block_n = max(config["BLOCK_M"], pack), max(config["BLOCK_N"], k)
    if block_m > 32:
        options["num_warps"] = max(options["num_warps"], 8)  # the rows of many heads, with their lists, in registers
    size, families, wide = block_m // pack, 1 if shared else r, k * packed_groups
    choose = budgets.budget < budgets.picks * m
    kg = power(budgets.budget) if choose else 1

    pieces = -(-n // block_n)
    programs = -(-t // size) * hkv * b
    splits = max(min(2 * multiprocessors(q.device) // programs, pieces // 2, 512 // k), 1)
    # rows whose lists of the highest lie in memory at the same time
    step = max(SCRATCH // (b * hkv * families * splits * k), 1)
    block_r = max(min(config["BLOCK_R"], 256 // wide), 1)
    routes = q.new_empty((b, t, hq, budgets.width), dtype=torch.int32)
    if budgets.width > (kg if choose else wide):
        routes.fill_(-1)
    steps = (0, 0) if positions is None else positions.stride()
    for t0 in range(0, t, step):
        part, at = q[:, t0 : t0 + step], None if positions is None else positions[:, t0 : t0 + step]
        count = part.shape[1]
        found = q.new_empty((b, count, hkv, families, splits, k), dtype=torch.int64)
        scan_chunks[(-(-count // size) * splits, hkv, b)](
            part,
            chunk_keys,
            at,
            found,
            *q.stride()[:3],
            *chunk_keys.stride()[:3],
            *steps,
            first + t0,
            count,
            hkv,
            r,
            n,
            splits,
            *regions,
            HEAD_DIM=d,
            BLOCK_D=columns(q, block_m, block_n),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            PACK=pack,
            SHARED=shared,
            K=k,
            **options,
        )
        rows = b * count * hkv * families
        pick_groups[(-(-rows // block_r),)](
            part,
            group_keys,
            at,
            found,
            routes[:, t0 : t0 + step],
            *q.stride()[:3],
            *group_keys.stride()[:4],
            *steps,
            routes.stride(0),
            first + t0,
            count,
            hkv,
            r,
            n,
            splits,
            rows,
            budgets.picks,
            budgets.budget,
            budgets.width,
            *regions[:2],
            HEAD_DIM=d,
            BLOCK_C=min(power(d, 16), 64),
            BLOCK_R=block_r,
            GROUPS=m,
            GROUPS_PACK=packed_groups,
            SHARED=shared,
            PREVIOUS=regions[2] == 0,
            CHOOSE=choose,
            SPLITS=power(splits),
            K=k,
            KG=kg,
            # a row's candidates are few: half the lanes of a tile of scores
            num_warps=max(config["num_warps"] // 2, 1),
            num_stages=config["num_stages"],
        )
    return routes


def _pooled(
    q: Tensor,
    chunk_keys: Tensor,
    group_keys: Tensor,
    positions: Tensor | None,
    first: int,
    context: int,
    regions: tuple[int, int, int],
    budgets: Budgets,
    requests: int,
    block: int | None,
    share: str,
    routes: Tensor,
) -> None:
    from .triton_pooled import route_runs

    b, t, hq, d = q.shape
    n, hkv, m = chunk_keys.shape[1], chunk_keys.shape[2], group_keys.shape[2]
    r, chunk_size = hq // hkv, regions[0]
    config = _config(q)
    span = min(chunk_size, chunk_size if block is None else block, t)
    if positions is None:
        order, p = None, (torch.arange(t, device=q.device) + first).expand(b, t)
        runs = min(t, t // min(chunk_size, block or chunk_size) + t // chunk_size + 2)
    else:
        # a run stands in adjacent rows: queries that see nothing go last
        order = torch.argsort((positions < 0).to(torch.uint8), dim=1, stable=True)
        p = positions.gather(1, order)
        runs = t
    starts = run_starts(p, runs, chunk_size, block)
    k, kg, block_t = power(budgets.picks), power(budgets.budget), power(span, 16)
    # "block" keeps two lists of the highest in registers beside a tile of scores: half the keys at a time
    block_n = max(config["BLOCK_N"], k, kg) if block is None else max(min(config["BLOCK_N"], 32), k, 16)
    # as many threads on chips whose warps are twice as wide
    warps = (8 if block_t >= 64 else 4) // (2 if vendor(tuning.architecture(q.device)) == "amd" else 1)
    families = 1 if share == "kv" else r
    route_runs[(runs, hkv * families, b)](
        q,
        chunk_keys,
        group_keys,
        positions,
        order,
        starts,
        routes,
        *q.stride()[:3],
        *chunk_keys.stride()[:3],
        *group_keys.stride()[:4],
        *((0, 0) if positions is None else positions.stride()),
        first,
        t,
        context,
        hkv,
        r,
        n,
        budgets.picks,
        budgets.budget,
        requests,
        budgets.width,
        *regions,
        HEAD_DIM=d,
        BLOCK_D=columns(q, block_t, block_n),
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        GROUPS=m,
        GROUPS_PACK=max(power(m), 16 // k),
        SHARED=share == "kv",
        PREVIOUS=regions[2] == 0,
        BLOCK_RULE=block is not None,
        K=k,
        KG=kg,
        # the whole run is in registers, with lists of its highest
        num_warps=max(config["num_warps"], warps),
        num_stages=1,
    )


def run_starts(p: Tensor, runs: int, chunk_size: int, block: int | None) -> Tensor:
    """int32 [B, runs + 1]: where runs of queries at p [B, T] begin, those without an index last; unused ones empty."""
    t = torch.arange(p.shape[1], device=p.device).expand_as(p)
    chunk = torch.div(p, chunk_size, rounding_mode="floor")
    begins = torch.ones_like(p, dtype=torch.bool)
    begins[:, 1:] = chunk[:, 1:] != chunk[:, :-1]
    if block is not None:
        since = t - torch.where(begins, t, 0).cummax(1).values
        begins |= since % block == 0
    alive = p >= 0
    starts = alive.sum(1, keepdim=True).expand(-1, runs + 2).to(torch.int32).contiguous()
    place = torch.where(begins & alive, begins.cumsum(1) - 1, runs + 1)
    return starts.scatter_(1, place, t.to(torch.int32))[:, : runs + 1].contiguous()
