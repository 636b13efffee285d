"""local_slots in Triton, weight-absorbed: k_weight is folded into the slot queries, v_weight applied to averages.

    Q[m, h] = k_weight[h]^T slot_queries[m, h]         a = softmax_t(Q . x_t / sqrt(E / heads))
    Y[i, m, h] = sum_t a_t x_t                         out[i, m, h] = v_weight[h] Y[i, m, h]

so that no [S, E] keys or values exist. Forward: two sweeps over hidden. The first computes scores; the second, which
needs them for a whole row of hidden and 64 x H sums that no multiprocessor can hold, runs the other way round, from
the last token to the first, so that what the L2 cache kept of the first sweep is not fetched again. Bytes from and to
memory for R = heads * M rows, in the tensors' dtype of ``size`` bytes, n splits of 512 to 4096 tokens:

    hidden          size * B S H + max(0, size * B S H - L2)       (one read where hidden fits the cache)
    weights P       2 * size * B S R                                (1.6 % of hidden each way at R 64, H 4096)
    partial sums    2 * 4 * n R H                                   (12 % of hidden at 2048 tokens a split)

Backward (:mod:`.triton_backward`): again two sweeps over hidden, scores and weight gradients of the first kept as
P, W [R, S], and one write of the gradient.

Where more rows than E, or segments so short that their averages outweigh their tokens, make that the dearer way
(:func:`absorbs`), keys and values are computed by torch.matmul and the same kernels run on them, one group per head.

Both directions are deterministic: no atomics, partial sums merged in the order of splits. float32, bfloat16, float16;
not float64. Products take operands in the tensors' dtype and sum in float32. With ``cu_seqlens`` on a device nothing
is read back: the launch covers the largest number of tiles that ``total_segments`` segments can have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import tuning
from ..._triton import rejects_device
from .triton_cut import cut_evenly, cut_packed, tiles_in_split

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = 1.4426950408889634

# What an H100 or H200 computes (16-bit, dense) while it moves one byte.
FLOPS_PER_BYTE = 200


def rejects(
    hidden: Tensor, slot_queries: Tensor, k_weight: Tensor, v_weight: Tensor, num_heads: int, *rest: Any
) -> str | None:
    from .triton_forward import INTERPRET

    if hidden.dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, hidden is {hidden.dtype}"
    foreign = rejects_device("hidden", hidden, INTERPRET.value)
    if foreign is not None:
        return foreign
    if hidden.shape[2] > 1 and hidden.stride(2) != 1:
        return f"hidden must be contiguous in its last dimension, got strides {hidden.stride()}"
    if hidden.shape[1] >= 2**31 - 2**16:
        return f"it serves fewer than 2^31 tokens per row, hidden has shape {tuple(hidden.shape)}"
    if num_heads > 65535:
        return f"it serves at most 65535 heads, got {num_heads}"
    return None


def absorbs(tokens: int, segments: int, slots: int, heads: int, width: int, hidden: int, size: int) -> bool:
    """Whether folding the weights is cheaper than keys and values: FLOPs, and bytes at the FLOPs they take the time of.

    Absorbed: R = slots * heads rows of H for scores and average, weights applied once per segment, hidden read twice,
    one R x H float32 average per segment written and read. Unabsorbed: two projections of E columns, hidden read by
    each, keys and values written and read. With long segments that is R < E, nearly.
    """
    rows = slots * heads
    folded = 4 * rows * hidden * tokens + 2 * slots * width * hidden * (1 + segments)
    folded += FLOPS_PER_BYTE * (2 * size * hidden * tokens + 8 * rows * hidden * segments)
    plain = 4 * width * hidden * tokens + 4 * slots * width * tokens
    plain += FLOPS_PER_BYTE * (2 * size * hidden * tokens + 4 * size * width * tokens + 8 * slots * width * segments)
    return folded <= plain


def power(value: int, low: int, high: int) -> int:
    """The smallest power of two in [low, high] that is at least ``value``, or ``high``."""
    return min(max(1 << max(value - 1, 0).bit_length(), low), high)


class Problem:
    """The arguments of one call, in either form, and the buffers both directions share."""

    def __init__(
        self,
        op: str,
        hidden: Tensor,
        slot_queries: Tensor,
        k_weight: Tensor,
        v_weight: Tensor,
        num_heads: int,
        segment_len: int,
        total_segments: int,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        empty: str,
    ) -> None:
        self.hidden = hidden
        self.slot_queries = slot_queries.contiguous()
        self.k_weight, self.v_weight = (w if w.stride(1) == 1 else w.contiguous() for w in (k_weight, v_weight))
        self.b, self.s, self.h = hidden.shape
        self.m, self.e = slot_queries.shape
        self.heads, self.d, self.n = num_heads, self.e // num_heads, total_segments
        self.absorbed = absorbs(
            self.b * self.s, self.b * self.n, self.m, self.heads, self.e, self.h, hidden.element_size()
        )
        self.groups = 1 if self.absorbed else self.heads
        self.rows = self.heads * self.m if self.absorbed else self.m
        self.width = self.h if self.absorbed else self.d
        arch = tuning.architecture(hidden.device)
        length = segment_len or self.s
        self.config = tuning.configuration(op, arch, head_dim=self.h, segment_len=length, dtype=hidden.dtype)
        self.options = {k: self.config.pop(k) for k in ("num_warps", "num_stages")}
        block = self.config["BLOCK_S"]
        self.block_h = min(self.config["BLOCK_H"], power(self.width, 16, 4096))
        self.block_c = min(self.config.get("BLOCK_C", self.config["BLOCK_H"]), power(self.width, 16, 4096))
        self.block_r = power(self.rows, 16, 64)
        self.row_blocks = -(-self.rows // self.block_r)
        programs = -(-self.width // self.block_c) * self.row_blocks * self.groups
        each = tiles_in_split(self.b * self.s, programs, block, hidden.device)
        if cu_seqlens is None:
            self.cut = cut_evenly(self.s, self.n, segment_len, block, each)
        else:
            cu = cu_seqlens.to(hidden.device, non_blocking=True)
            self.cut = cut_packed(cu, self.s, self.n, segment_len, block, each)
        self.mask = None
        self.alive = None
        if attention_mask is not None:
            keep = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
            self.mask = keep.contiguous().view(torch.uint8)
            if empty == "uniform":
                self.alive = self._alive(keep)

    def _alive(self, keep: Tensor) -> Tensor:
        """uint8 [B, N]: which segments have a token."""
        if self.cut.start is not None and self.cut.stop is not None:
            counts = F.pad(keep[0].cumsum(0), (1, 0))
            return (counts[self.cut.stop] > counts[self.cut.start])[None].to(torch.uint8)
        length = self.cut.segment_len
        return F.pad(keep, (0, self.n * length - self.s)).view(self.b, self.n, length).any(2).to(torch.uint8)

    @property
    def flags(self) -> dict[str, bool]:
        return {
            "HAS_MASK": self.mask is not None,
            "UNIFORM": self.alive is not None,
            "PACKED": self.cut.packed,
        }

    def floats(self, *shape: int) -> Tensor:
        return self.hidden.new_empty(shape, dtype=torch.float32)

    def fold(self, rows: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """rows [n, M, E] times the head's rows of ``weight`` [E, H]: ([n, heads, M, H] in dtype, float32 scales)."""
        from .triton_forward import fold_rows

        count = rows.shape[0] * self.m
        folded = rows.new_empty((rows.shape[0], self.heads, self.m, self.h))
        scale = self.floats(rows.shape[0], self.heads, self.m)
        block_m, block_h = power(count, 16, 64), power(self.h, 16, 64)
        grid = (-(-count // block_m), -(-self.h // block_h), self.heads)
        fold_rows[grid](
            rows,
            weight,
            folded,
            scale,
            weight.stride(0),
            count,
            self.m,
            self.heads,
            self.d,
            self.h,
            factor,
            BLOCK_M=block_m,
            BLOCK_D=power(self.d, 16, 64),
            BLOCK_H=block_h,
            EVEN_H=self.h % block_h == 0,
            num_warps=4,
            num_stages=2,
        )
        return folded, scale

    def queries(self) -> tuple[Tensor, Tensor]:
        """Q [G, R, W] in the tensors' dtype and its float32 scale [G, R]; 2^(scale * Q . x) is e^score."""
        factor = self.d**-0.5 * LOG2E
        if self.absorbed:
            folded, scale = self.fold(self.slot_queries[None], self.k_weight, factor)
            return folded.view(1, self.rows, self.h), scale.view(1, self.rows)
        return self.by_head(self.slot_queries), torch.full_like(self.floats(self.groups, self.rows), factor)

    def by_head(self, rows: Tensor) -> Tensor:
        """[..., M, E] -> [..., heads, M, d]."""
        return rows.unflatten(-1, (self.heads, self.d)).transpose(-3, -2).contiguous()

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """What scores and averages run over: hidden itself, or keys and values [B, S, E]."""
        if self.absorbed:
            return self.hidden, self.hidden
        return self.hidden @ self.k_weight.T, self.hidden @ self.v_weight.T

    def counted(self) -> Tensor:
        """hidden with 0 where no result reads it: a column under the mask may hold NaN, and 0 * NaN is NaN."""
        if self.mask is None:
            return self.hidden
        keep = self.mask.bool()
        if self.alive is not None:
            column = torch.arange(self.s, device=keep.device, dtype=torch.int32)
            if self.cut.start is None:
                segment = (column // self.cut.segment_len).long()
            else:
                segment = torch.searchsorted(self.cut.start, column, right=True).sub(1).clamp(min=0)
            keep = keep | (self.alive[:, segment] == 0)
        return torch.where(keep[..., None], self.hidden, 0.0)

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Over batch, tokens and groups."""
        return x.stride(0), x.stride(1), 0 if self.absorbed else self.d


def forward(*arguments: Any) -> Tensor:
    """[B, N, M, E] in hidden.dtype; arguments as the operation's schema up to ``empty``."""
    hidden, slot_queries, total = arguments[0], arguments[1], arguments[6]
    out = hidden.new_empty((hidden.shape[0], total, *slot_queries.shape))
    if out.numel() == 0 or hidden.shape[1] == 0:
        return out.zero_()
    with torch.cuda.device_of(hidden):
        return _forward(Problem("local_slots", *arguments), out)


def _forward(x: Problem, out: Tensor) -> Tensor:
    from .triton_forward import average_splits, merge_splits, project_splits, score_tiles

    cut = x.cut
    queries, scale = x.queries()
    keys, values = x.keys_values()
    p = keys.new_empty((x.b, x.groups, cut.tiles, x.rows, cut.block))
    top = x.floats(x.b, x.groups, cut.tiles, x.rows)
    total = torch.empty_like(top)
    score_tiles[(x.row_blocks * cut.tiles * x.b * x.groups,)](
        keys,
        queries,
        scale,
        x.mask,
        x.alive,
        cut.tile_table,
        p,
        top,
        total,
        *x.strides(keys),
        x.groups,
        x.rows,
        x.width,
        **cut.shape,
        tiles=cut.tiles,
        tiles_per_segment=cut.tiles_per_segment,
        BLOCK_S=cut.block,
        BLOCK_H=x.block_h,
        BLOCK_R=x.block_r,
        EVEN_H=x.width % x.block_h == 0,
        **x.flags,
        **x.options,
    )
    u = x.floats(x.b, x.groups, cut.splits, x.rows, x.width)
    split_top = x.floats(x.b, x.groups, cut.splits, x.rows)
    split_total = torch.empty_like(split_top)
    chunks = -(-x.width // x.block_c)
    average_splits[(chunks * x.row_blocks * cut.splits * x.b * x.groups,)](
        values,
        p,
        top,
        total,
        x.mask,
        x.alive,
        cut.split_table,
        u,
        split_top,
        split_total,
        *x.strides(values),
        x.groups,
        x.rows,
        x.width,
        **cut.shape,
        tiles=cut.tiles,
        tiles_per_segment=cut.tiles_per_segment,
        splits=cut.splits,
        splits_per_segment=cut.splits_per_segment,
        BLOCK_S=cut.block,
        BLOCK_C=x.block_c,
        BLOCK_R=x.block_r,
        TILES=cut.tiles_in_split,
        STAGES=x.options["num_stages"],
        EVEN_C=x.width % x.block_c == 0,
        **x.flags,
        **x.options,
    )
    common = {
        **cut.shape,
        "splits": cut.splits,
        "splits_per_segment": cut.splits_per_segment,
        "split_tokens": cut.split_tokens,
        "PACKED": cut.packed,
        "num_warps": 4,
    }
    if x.absorbed:
        block_m, block_d = power(x.m, 16, 64), 16
        blocks = -(-x.m // block_m) * -(-x.d // block_d)
        project_splits[(blocks * x.heads * x.b * x.n,)](
            u,
            split_top,
            split_total,
            cut.first_split,
            x.v_weight,
            out,
            x.v_weight.stride(0),
            x.m,
            x.heads,
            x.d,
            x.h,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            BLOCK_C=power(x.h, 16, 128),
            num_stages=2,
            **common,
        )
    else:
        block_r, block_c = power(x.rows, 16, 64), power(x.width, 16, 64)
        merge_splits[(-(-x.width // block_c) * -(-x.rows // block_r) * x.groups * x.b * x.n,)](
            u,
            split_top,
            split_total,
            cut.first_split,
            out,
            x.m * x.e,
            x.e,
            x.d,
            x.groups,
            x.rows,
            x.width,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_stages=1,
            **common,
        )
    return out


def backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of (hidden, slot_queries, k_weight, v_weight); arguments as the operation's schema up to ``empty``."""
    hidden, total = arguments[0], arguments[6]
    if grad_out.numel() == 0 or hidden.shape[1] == 0 or total == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in arguments[:4])
    with torch.cuda.device_of(hidden):
        return _backward(Problem("local_slots_backward", *arguments), grad_out.contiguous())


def _backward(x: Problem, grad_out: Tensor) -> tuple[Tensor, ...]:
    from .triton_backward import (
        accumulate_splits,
        hidden_gradients,
        merge_sums,
        score_gradients,
        segment_totals,
        weight_gradients,
    )

    cut, dtype = x.cut, x.hidden.dtype
    queries, q_scale = x.queries()
    keys, values = x.keys_values()
    if x.absorbed:
        grads, g_scale = x.fold(grad_out.view(x.b * x.n, x.m, x.e), x.v_weight, 1.0)
    else:
        grads = x.by_head(grad_out)
        g_scale = torch.ones_like(x.floats(x.b * x.n, x.heads, x.m))
    s = x.floats(x.b, x.groups, cut.tiles, x.rows, cut.block)
    c = torch.empty_like(s)
    top = x.floats(x.b, x.groups, cut.tiles, x.rows)
    total, cross, peak = (torch.empty_like(top) for _ in range(3))
    tiles = {"tiles": cut.tiles, "tiles_per_segment": cut.tiles_per_segment}
    splits = {"splits": cut.splits, "splits_per_segment": cut.splits_per_segment}
    packed, uniform = cut.packed, x.alive is not None
    score_gradients[(x.row_blocks * cut.tiles * x.b * x.groups,)](
        keys,
        values,
        queries,
        grads,
        q_scale,
        g_scale,
        x.mask,
        x.alive,
        cut.tile_table,
        s,
        c,
        top,
        total,
        cross,
        peak,
        *x.strides(keys)[:2],
        *x.strides(values)[:2],
        x.strides(keys)[2],
        x.groups,
        x.rows,
        x.width,
        **cut.shape,
        **tiles,
        BLOCK_S=cut.block,
        BLOCK_H=x.block_h,
        BLOCK_R=x.block_r,
        EVEN_H=x.width % x.block_h == 0,
        **x.flags,
        SAME=x.absorbed,
        **x.options,
    )
    totals = x.floats(x.b, x.n, x.groups, 4, x.rows)
    segment_totals[(x.row_blocks * x.groups * x.b * x.n,)](
        top,
        total,
        cross,
        peak,
        cut.first_tile,
        totals,
        x.groups,
        x.rows,
        **cut.shape,
        **tiles,
        BLOCK_S=cut.block,
        BLOCK_R=x.block_r,
        BLOCK_K=16,
        PACKED=packed,
        num_warps=4,
        num_stages=1,
    )
    p = torch.empty_like(s, dtype=dtype)
    w = torch.empty_like(p)
    weight_gradients[(x.row_blocks * cut.tiles * x.b * x.groups,)](
        s,
        c,
        totals,
        x.alive,
        cut.tile_table,
        p,
        w,
        x.groups,
        x.rows,
        **cut.shape,
        **tiles,
        BLOCK_S=cut.block,
        BLOCK_R=x.block_r,
        UNIFORM=uniform,
        PACKED=packed,
        num_warps=4,
        num_stages=1,
    )
    del s, c
    chunks = -(-x.width // x.block_c)
    v = x.floats(x.b, x.groups, cut.splits, x.rows, x.width)
    u = torch.empty_like(v) if x.absorbed else v
    accumulate_splits[(chunks * x.row_blocks * cut.splits * x.b * x.groups,)](
        keys,
        p,
        w,
        x.mask,
        x.alive,
        cut.split_table,
        u,
        v,
        *x.strides(keys),
        x.groups,
        x.rows,
        x.width,
        **cut.shape,
        **tiles,
        **splits,
        BLOCK_S=cut.block,
        BLOCK_C=x.block_c,
        BLOCK_R=x.block_r,
        TILES=cut.tiles_in_split,
        EVEN_C=x.width % x.block_c == 0,
        **x.flags,
        BOTH=x.absorbed,
        **x.options,
    )
    block_r, block_c = power(x.rows, 16, 32), power(x.width, 16, 64)
    z = x.floats(x.heads, x.b * x.n, x.m, x.width)
    y = torch.empty_like(z) if x.absorbed else z
    merge_sums[(-(-x.width // block_c) * -(-x.rows // block_r) * x.groups * x.b * x.n,)](
        u,
        v,
        totals,
        cut.first_split,
        y,
        z,
        x.groups,
        x.rows,
        x.m,
        x.width,
        x.b * x.n,
        **cut.shape,
        **splits,
        split_tokens=cut.split_tokens,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        PACKED=packed,
        BOTH=x.absorbed,
        num_warps=4,
        num_stages=1,
    )
    # columns behind the last document are in no segment
    empty = x.hidden.new_zeros if packed else x.hidden.new_empty
    if x.absorbed:
        dx = empty(x.b, x.s, x.h)
        dy = dx
    else:
        both = empty(x.b, x.s, 2 * x.e)
        dx, dy = both[..., : x.e], both[..., x.e :]
    hidden_gradients[(chunks * cut.splits * x.b * x.groups,)](
        p,
        w,
        queries,
        grads,
        q_scale,
        g_scale,
        totals,
        cut.split_table,
        dx,
        dy,
        *x.strides(dx),
        x.groups,
        x.rows,
        x.width,
        **cut.shape,
        **tiles,
        **splits,
        factor=1 / LOG2E,
        BLOCK_S=cut.block,
        BLOCK_C=x.block_c,
        BLOCK_R=x.block_r,
        ROWS=power(x.rows, 16, 1 << 30),
        TILES=cut.tiles_in_split,
        EVEN_C=x.width % x.block_c == 0,
        PACKED=packed,
        SAME=x.absorbed,
        ONE_BLOCK=x.row_blocks == 1,
        num_warps=x.options["num_warps"],
        # rows in several blocks are fetched again for every tile: prefetching them would take the memory of all
        num_stages=x.options["num_stages"] if x.row_blocks == 1 else 1,
    )
    scale = x.d**-0.5
    q_rows = x.by_head(x.slot_queries).float()
    to_q = z.sum(1) * scale
    if x.absorbed:
        g_rows = grad_out.view(x.b * x.n * x.m, x.heads, x.d).permute(1, 2, 0).float()
        dv = torch.bmm(g_rows, y.view(x.heads, x.b * x.n * x.m, x.h))
        dk = torch.bmm(q_rows.transpose(1, 2), to_q)
        dq = torch.bmm(to_q, x.k_weight.float().view(x.heads, x.d, x.h).transpose(1, 2))
        found = dk.view(x.e, x.h), dv.view(x.e, x.h)
    else:
        dq = to_q
        flat = both.view(x.b * x.s, 2 * x.e)
        found = (flat.T @ x.counted().reshape(x.b * x.s, x.h)).split(x.e)
        dx = (flat @ torch.cat((x.k_weight, x.v_weight))).view(x.b, x.s, x.h)
    dq = dq.transpose(0, 1).reshape(x.m, x.e)
    return dx, dq.to(dtype), *(f.to(dtype) for f in found)
