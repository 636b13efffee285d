"""hga_attention in Triton: routes of a tile of queries are united into one list, and each group of it read once for all
of them, where it lies.

Summaries and routes are those of ``hga_summaries`` and ``hga_route`` in Triton. A tile is up to 64 rows (queries and
the heads of a kv group); where there are few, the keys are cut into runs whose results are joined by lse. Lists are
built for a bounded number of queries at a time; nothing is read back from the device. Products take operands in the
tensors' dtype and sum in float32 (float32 without tf32); weights are rounded to the tensors' dtype before they multiply
V. Deterministic: no atomics, every sum in a fixed order. float32, bfloat16, float16; not float64.

Unsupported: keys that hold an infinity. Queries that do not see one are as if it were not there; those that see it get
NaN, or the sums without it where its score is -inf (the reference: always NaN), and the summaries of its chunk are inf
or NaN where the reference's may be the other, which decides what is routed to that chunk. NaN in keys, NaN and
infinities in values are as in the reference: NaN for those who see them, nothing for the others.

Backward: dQ by the tiles and lists of the forward pass; dK and dV by the inverse of the routes, pairs of a group and a
row sorted on the device, so that a group's program multiplies it with the rows that opened it and no others. dK and dV
are summed in float32. Gradients are as the reference's, keys with infinities included: NaN for those who see them. A
query that holds NaN or an infinity, or sees a token that does, passes NaN to the keys and values that it sees and
nothing to the others, which in the reference get NaN too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ..._triton import rejects_device
from ...tuning import multiprocessors
from ...tuning.chips import vendor
from ..attention.triton import column_blocks, splits_for
from ..hga_route import triton as router
from ..hga_route.triton import power
from ..hga_summaries import triton as summariser

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
# Rows of a tile: entries of its list have a bit for each.
MOST_ROWS = 64
# Entries of a tile's list before it is united: as many are sorted at once.
MOST_ENTRIES = 4096
# Entries of all lists that are in memory at the same time, of 12 bytes each.
SCRATCH = 1 << 22
LOG2E = math.log2(math.e)


def rejects(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor | None,
    attention_mask: Tensor | None,
    routes: Tensor | None,
    group_size: int,
    chunk_size: int,
    keep_first: int,
    keep_last: int,
    topk_chunks: int,
    topk_groups: int,
    routing: str,
    route_block: int,
    share: str,
    super_chunk: int,
    *rest: Any,
) -> str | None:
    from ..attention.triton_forward import INTERPRET

    b, _, hq, d = q.shape
    s, hkv = k.shape[1], k.shape[2]
    if q.dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, q is {q.dtype}"
    foreign = rejects_device("q", q, INTERPRET.value)
    if foreign is not None:
        return foreign
    if d > LARGEST_HEAD:
        return f"it serves head_dim up to {LARGEST_HEAD}, q has {d}"
    if s // group_size >= 2**25 or s >= 2**30:
        return f"it serves fewer than 2^25 groups and 2^30 positions, k has shape {tuple(k.shape)}"
    grid, most = router.LARGEST_GRID, router.LARGEST_GROUP
    if b > grid or hq > grid or hq // max(hkv, 1) > most:
        return f"it serves batches and heads up to {grid}, {most} per kv head: got {b}, {hq}, {hkv}"
    arch, rows = tuning.architecture(q.device), power(hq // max(hkv, 1), 16)
    crowded = too_crowded(arch, rows, d, q.dtype)
    if crowded is not None:
        return crowded
    groups = chunk_size // group_size
    width = min(topk_groups, s // chunk_size * groups) if routes is None else routes.shape[-1]
    if power(width) * rows > MOST_ENTRIES:
        return f"it serves topk_groups * max(heads of a kv group, 16) up to {MOST_ENTRIES}, topk_groups is {width}"
    if routes is None:
        sizes = (
            arch,
            b,
            hq,
            hkv,
            d,
            s // chunk_size,
            groups,
            topk_chunks,
            topk_groups,
            chunk_size,
        )
        return router.limits(*sizes, routing, route_block, super_chunk)
    return None


def too_crowded(arch: str, rows: int, d: int, dtype: torch.dtype) -> str | None:
    """Why tiles of ``rows`` heads do not fit the chip, or None: a tile holds every head of its kv group.

    The gradient of near keys takes the most: queries, keys and what is multiplied with them, and a tile of scores.
    """
    if vendor(arch) == "amd":
        return None  # operands come from registers: half of this at most
    keys = tuning.configuration("hga_attention_backward", arch, head_dim=d, segment_len=0, dtype=dtype)["BLOCK_N"]
    needed = (2 * (rows + keys) * power(d, 16) + rows * keys) * dtype.itemsize + 1024
    room = tuning.shared_memory(arch)
    if needed <= room:
        return None
    return (
        f"{rows} heads per kv head of head_dim {d} in {dtype} take {needed} bytes of shared memory, {arch} has {room}"
    )


def tokens(
    q: Tensor, k: Tensor, positions: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(index of each query [B, T], -1 = sees nothing; column of each token [B, S]); None = as they stand."""
    t, s = q.shape[1], k.shape[1]
    if attention_mask is not None:
        mask = attention_mask != 0
        place = mask.cumsum(1)
        index = place[:, s - t :] - 1 if positions is None else positions.to(torch.int64)
        exists = mask[:, s - t :] & (index >= 0) & (index < place[:, -1:])
        return torch.where(exists, index, -1), torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    if positions is None:
        return None, None
    return torch.where((positions >= 0) & (positions < s), positions, -1), None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor | None,
    attention_mask: Tensor | None,
    routes: Tensor | None,
    group_size: int,
    chunk_size: int,
    keep_first: int,
    keep_last: int,
    topk_chunks: int,
    topk_groups: int,
    routing: str,
    route_block: int,
    share: str,
    super_chunk: int,
    topk_supers: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, T, Hq, D], lse [B, Hq, T], routes [B, T, Hq, w])."""
    b, t, hq, _ = q.shape
    s = k.shape[1]
    regions = (chunk_size, keep_first, keep_last)
    if q.numel() == 0:
        width = min(topk_groups, s // chunk_size * (chunk_size // group_size)) if routes is None else routes.shape[-1]
        lse = q.new_empty((b, hq, t), dtype=torch.float32)
        return q.new_empty(q.shape), lse, q.new_empty((b, t, hq, width), dtype=torch.int32)
    index, columns = tokens(q, k, positions, attention_mask)
    if routes is None:
        chunk_keys, group_keys = summariser.of_rows(k, inv_freq, None, columns, chunk_size, group_size)
        budgets = (topk_chunks, topk_groups, routing, route_block, share)
        routes = router.routes_of(q, chunk_keys, group_keys, index, s - t, 0, regions, *budgets)
    else:
        routes = routes.clone(memory_format=torch.contiguous_format)
    with torch.cuda.device_of(q):
        out, lse = _attend(q, k, v, index, columns, routes, group_size, regions, scale)
    return out, lse, routes


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    columns: Tensor | None,
    routes: Tensor,
    group_size: int,
    regions: tuple[int, int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    from ..attention.triton_forward import merge_blocks, merge_splits
    from .triton_forward import attend_lists

    b, t, hq, d = q.shape
    s, hkv, r, width = k.shape[1], k.shape[2], hq // k.shape[2], routes.shape[-1]
    arch = tuning.architecture(q.device)
    config = tuning.configuration("hga_attention", arch, head_dim=d, segment_len=0, dtype=q.dtype)
    pack, wide = power(r), power(width)
    config = low_tile(config, t, pack, wide, q.dtype)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    size, entries = block_m // pack, block_m * wide
    block_d, block_e = column_blocks(d, q.dtype)

    tiles = -(-t // size)
    keys = min((regions[1] + regions[2] + 1) * regions[0] + entries * group_size, s)
    splits = splits_for(tiles * hkv * b, -(-keys // block_n), multiprocessors(q.device))
    out, lse = q.new_empty(q.shape), q.new_empty((b, hq, t), dtype=torch.float32)
    parts, part_lse = out, lse
    if splits > 1:
        parts = q.new_empty((splits, *q.shape), dtype=torch.float32)
        part_lse = q.new_empty((splits, b, hq, t), dtype=torch.float32)
    steps = (0, 0) if index is None else index.stride()
    for start, stop in query_steps(t, b * hkv, block_m, pack, wide):
        ids, sums, counts = unite(routes, index, start, stop, s - t, hkv, group_size, regions, block_m)
        attend_lists[(counts.shape[-1] * splits, hkv, b)](
            q,
            k,
            v,
            index,
            columns,
            ids,
            sums,
            counts,
            parts,
            part_lse,
            abs(scale) or 1.0,
            (abs(scale) or 1.0) * LOG2E,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *steps,
            0 if columns is None else columns.stride(0),
            s - t,
            start,
            stop,
            t,
            hkv,
            r,
            splits,
            entries,
            *regions,
            GROUP_SIZE=group_size,
            HEAD_DIM=d,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            BLOCK_E=block_e,
            PACK=pack,
            SIGN=(scale > 0) - (scale < 0),
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
    if splits > 1:
        blocks = merge_blocks(d)
        merge_splits[(-(-b * t * hq // blocks["BLOCK_R"]),)](
            parts, part_lse, out, lse, b * t * hq, t, hq, splits, HEAD_DIM=d, **blocks, num_warps=4, num_stages=1
        )
    return out, lse


def low_tile(config: dict[str, int], t: int, pack: int, wide: int, dtype: torch.dtype) -> dict[str, int]:
    """The configuration with a tile no taller than the rows there are, nor than lists of ``wide`` entries a row allow.

    pack: heads of a kv group, as a power of two.
    """
    block_m = max(min(config["BLOCK_M"], MOST_ROWS, power(t * pack), MOST_ENTRIES // wide), 16, pack)
    low = block_m < config["BLOCK_M"] and dtype != torch.float32
    warps = min(config["num_warps"], 4) if low else config["num_warps"]
    return config | {"BLOCK_M": block_m, "num_warps": warps}


def query_steps(t: int, rows: int, block_m: int, pack: int, wide: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the queries whose lists are in memory together; rows: of the batch, times kv heads."""
    step = max(SCRATCH // (block_m * wide * rows), 1) * (block_m // pack)
    for start in range(0, t, step):
        yield start, min(start + step, t)


def unite(
    routes: Tensor,
    index: Tensor | None,
    start: int,
    stop: int,
    first: int,
    heads: int,
    group_size: int,
    regions: tuple[int, int, int],
    block_m: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, sums, counts) of :func:`.triton_lists.unite_routes` for queries [start, stop); heads: of keys."""
    from .triton_lists import unite_routes

    b, _, hq, width = routes.shape
    pack, wide = power(hq // heads), power(width)
    lists = (b, heads, -(-(stop - start) // (block_m // pack)))
    entries = block_m * wide
    ids = routes.new_empty((*lists, entries), dtype=torch.int32)
    sums = routes.new_empty((*lists, entries), dtype=torch.int64)
    counts = routes.new_empty(lists, dtype=torch.int32)
    unite_routes[(lists[2], heads, b)](
        routes,
        index,
        ids,
        sums,
        counts,
        *routes.stride()[:3],
        *((0, 0) if index is None else index.stride()),
        first,
        start,
        stop,
        heads,
        hq // heads,
        width,
        *regions,
        GROUP_SIZE=group_size,
        BLOCK_M=block_m,
        PACK=pack,
        WIDTH=wide,
        num_warps=max(min(entries // 512, 8), 1),
        num_stages=1,
    )
    return ids, sums, counts


def backward(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of (q, k, v)."""
    from .triton_backward_launch import backward as launch

    return launch(grad_out, grad_lse, out, lse, *arguments)
