"""hga_attention in Triton: the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ..attention.triton_backward_launch import dense, padded
from ..hga_route.triton import power
from .triton import LOG2E, low_tile, query_steps, tokens, unite
from .triton_backward import list_queries, row_levels, sound_tokens
from .triton_backward_keys import add_parts, listed_keys, near_keys, route_pairs

# Pairs of a group and a row in memory at the same time: 8 bytes each, several times that while they are sorted.
PAIRS = 1 << 22
# Pairs of a group that one program takes. Others of the same group are added up in memory.
RUN = 1024
# Queries that a program of the sinks takes, where memory for so many parts may be had: numbers of one of dK and dV.
SINK_QUERIES, SINK_NUMBERS = 1024, 1 << 24
# Of the kernels that only move numbers: rows and columns a program has in flight.
ROWS, COLUMNS = 32, 1024


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor | None,
    attention_mask: Tensor | None,
    routes: Tensor,
    group_size: int,
    chunk_size: int,
    keep_first: int,
    keep_last: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v) with J_t fixed, each in its input's dtype and contiguous.

    Args:
        grad_out: [B, T, Hq, D]; grad_lse: [B, Hq, T]; out, lse: what forward returned.
        others: as the operation's schema up to ``scale``; routes int32 [B, T, Hq, w].

    float32, bfloat16, float16. Products take operands in the inputs' dtype (P and dS are rounded to it) and sum in
    float32, dK and dV over all queries. Deterministic: no atomics, every sum in a fixed order. Nothing is read back
    from the device. Temporary memory: dK and dV in float32, 8 bytes per query and head, and what PAIRS, SINK_NUMBERS
    and the forward pass's SCRATCH allow.
    """
    if q.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    with torch.cuda.device_of(q):
        regions = (chunk_size, keep_first, keep_last)
        given = (grad_out, grad_lse, out, lse, q, k, v, positions, attention_mask, routes)
        return _Call(*given, group_size, regions, rest[-1]).gradients()


class _Call:
    """The arguments of one call, and the buffers its kernels share."""

    def __init__(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None,
        attention_mask: Tensor | None,
        routes: Tensor,
        group_size: int,
        regions: tuple[int, int, int],
        scale: float,
    ) -> None:
        self.grad_out, self.grad_lse, self.out, self.lse = dense(grad_out), grad_lse, dense(out), lse
        self.q, self.k, self.v, self.routes = dense(q), dense(k), dense(v), dense(routes)
        self.b, self.t, self.hq, self.d = q.shape
        self.s, self.heads = k.shape[1], k.shape[2]
        self.group = self.hq // self.heads
        self.group_size, self.regions = group_size, regions
        self.pack, self.wide = power(self.group), power(routes.shape[-1])
        self.scale, self.fused = scale, q.dtype != torch.float32
        self.factor = scale * LOG2E if self.fused else scale
        index, self.columns = tokens(q, k, positions, attention_mask)
        if index is None:
            index = torch.arange(self.s - self.t, self.s, device=q.device).expand(self.b, -1)
        self.index = index.to(torch.int64).contiguous()
        self.delta = q.new_empty((self.b, self.t, self.hq), dtype=torch.float32)
        self.level = torch.empty_like(self.delta)

    def configuration(self, table: str) -> dict[str, int]:
        arch = tuning.architecture(self.q.device)
        return tuning.configuration(table, arch, head_dim=self.d, segment_len=0, dtype=self.q.dtype)

    @property
    def widths(self) -> dict[str, Any]:
        return {"HEAD_DIM": self.d, "BLOCK_D": padded(self.d), "FUSED": self.fused}

    @property
    def strides(self) -> tuple[int, ...]:
        """Of q, k, v and grad_out, but that of the last dim, which is 1."""
        return tuple(n for x in (self.q, self.k, self.v, self.grad_out) for n in x.stride()[:3])

    @property
    def column_stride(self) -> int:
        return 0 if self.columns is None else self.columns.stride(0)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        self._row_levels()
        dq = self._queries()
        found = self._near()
        if self.routes.shape[-1] and self.s >= self.group_size:
            self._listed(*found)
        if self.columns is not None:
            # columns are the order of tokens: the place of each is the order of columns
            places = torch.argsort(self.columns, 1)[:, :, None, None]
            found = tuple(x.gather(1, places.expand_as(x)) for x in found)  # type: ignore[assignment]
        return dq, found[0].to(self.k.dtype), found[1].to(self.v.dtype)

    def _row_levels(self) -> None:
        row_levels[(-(-self.t * self.hq // ROWS), self.b)](
            self.q,
            self.out,
            self.grad_out,
            self.lse,
            self.grad_lse,
            self.index,
            self.delta,
            self.level,
            *self.q.stride()[:3],
            *self.out.stride()[:3],
            *self.grad_out.stride()[:3],
            *self.lse.stride(),
            *self.grad_lse.stride(),
            *self.index.stride(),
            self.t,
            self.hq,
            **self.widths,
            BLOCK_M=ROWS,
            num_warps=4,
            num_stages=1,
        )

    def _queries(self) -> Tensor:
        dq = self.q.new_empty(self.q.shape)
        sound = self.k.new_empty(self.k.shape[:3], dtype=torch.uint8)
        sound_tokens[(-(-self.s * self.heads // ROWS), self.b)](
            self.k,
            self.v,
            sound,
            *self.k.stride()[:3],
            *self.v.stride()[:3],
            self.s,
            self.heads,
            HEAD_DIM=self.d,
            BLOCK_D=padded(self.d),
            BLOCK_N=ROWS,
            num_warps=4,
            num_stages=1,
        )
        config = self.configuration("hga_attention_backward_dq")
        config = low_tile(config, self.t, self.pack, self.wide, self.q.dtype)
        block_m = config["BLOCK_M"]
        for start, stop in query_steps(self.t, self.b * self.heads, block_m, self.pack, self.wide):
            ids, sums, counts = unite(
                self.routes, self.index, start, stop, 0, self.heads, self.group_size, self.regions, block_m
            )
            list_queries[(counts.shape[-1], self.heads, self.b)](
                self.q,
                self.k,
                self.v,
                sound,
                self.grad_out,
                self.level,
                self.delta,
                self.index,
                self.columns,
                ids,
                sums,
                counts,
                dq,
                self.scale,
                self.factor,
                *self.strides,
                *self.index.stride(),
                self.column_stride,
                start,
                stop,
                self.t,
                self.s,
                self.heads,
                self.group,
                ids.shape[-1],
                *self.regions,
                GROUP_SIZE=self.group_size,
                PACK=self.pack,
                **self.widths,
                **config,
            )
        return dq

    def _near(self) -> tuple[Tensor, Tensor]:
        """dK, dV float32 [B, S, Hkv, D] of windows and sinks, in the order of indices."""
        chunk_size, keep_first, keep_last = self.regions
        config = self.configuration("hga_attention_backward")
        ordered, order = self.index.sort(dim=1, stable=True)
        first = torch.arange(0, self.s, config["BLOCK_N"], device=self.q.device)
        # the first chunk that begins at the end of a block or later: the window of these queries begins there
        chunk = (first + (config["BLOCK_N"] + chunk_size - 1)) // chunk_size
        last = torch.where(chunk <= keep_first, chunk, chunk + keep_last) * chunk_size
        given = (config, ordered, order)
        dk, dv = self._near_keys(*given, first, last, self.s, 1, sinks=False)
        sinks = min(keep_first * chunk_size, self.s)
        if sinks and self.s > chunk_size:
            splits = SINK_NUMBERS // (self.b * sinks * self.heads * self.d)
            splits = max(min(splits, -(-self.t // SINK_QUERIES)), 1)
            first = torch.arange(0, sinks, config["BLOCK_N"], device=self.q.device)
            first = (first // chunk_size + 1) * chunk_size
            last = torch.full_like(first, self.s)
            parts = self._near_keys(*given, first, last, sinks, splits, sinks=True)
            for x, part in zip((dk, dv), parts, strict=True):
                x[:, :, :sinks] += part.sum(0, keepdim=True)
        return dk[0], dv[0]

    def _near_keys(
        self,
        config: dict[str, int],
        ordered: Tensor,
        order: Tensor,
        first: Tensor,
        last: Tensor,
        count: int,
        splits: int,
        *,
        sinks: bool,
    ) -> tuple[Tensor, Tensor]:
        """[splits, B, count, Hkv, D] each; first, last [blocks]: indices of the queries that see one begin and end."""
        size = config["BLOCK_N"]
        block_m = max(config["BLOCK_M"], self.pack)
        edges = torch.cat((first, last)).expand(self.b, -1).contiguous()
        ranges = torch.searchsorted(ordered, edges)
        dk, dv = (self.delta.new_empty((splits, self.b, count, self.heads, self.d)) for _ in "kv")
        near_keys[(-(-count // size) * splits, self.heads, self.b)](
            self.q,
            self.k,
            self.v,
            self.grad_out,
            self.level,
            self.delta,
            ordered,
            order,
            ranges,
            self.columns,
            dk,
            dv,
            self.scale,
            self.factor,
            *self.strides,
            self.column_stride,
            self.t,
            count,
            self.heads,
            self.group,
            splits,
            *self.regions,
            PACK=self.pack,
            SINKS=sinks,
            **self.widths,
            **config | {"BLOCK_M": block_m},
        )
        return dk, dv

    def _listed(self, dk: Tensor, dv: Tensor) -> None:
        """Adds what routes show to dK, dV, as many queries at a time as PAIRS allows, one after the other."""
        width, groups = self.routes.shape[-1], self.s // self.group_size
        owners = self.b * self.heads * groups
        step = min(max(PAIRS // (self.b * self.hq * width), 1), self.t)
        shift = (step * self.pack - 1).bit_length()
        starts_at = torch.arange(owners + 1, device=self.q.device) << shift
        config = self.configuration("hga_attention_backward")
        size = min(config["BLOCK_N"], power(self.group_size, 16))
        if size < config["BLOCK_N"]:
            config |= {"BLOCK_N": size, "num_warps": min(config["num_warps"], 4)}
        slots = -(-self.b * step * self.hq * width // RUN)
        parts = self.delta.new_empty((slots, 2, self.group_size, self.d))
        for start in range(0, self.t, step):
            stop = min(start + step, self.t)
            pairs = self.index.new_empty(self.b * (stop - start) * self.hq * width)
            route_pairs[(-(-(stop - start) * self.hq // ROWS), self.b)](
                self.routes,
                self.level,
                self.index,
                pairs,
                *self.routes.stride()[:3],
                *self.index.stride(),
                start,
                stop,
                self.t,
                self.heads,
                self.group,
                groups,
                width,
                shift,
                *self.regions,
                GROUP_SIZE=self.group_size,
                ROWS=ROWS,
                PACK=self.pack,
                WIDTH=self.wide,
                num_warps=4,
                num_stages=1,
            )
            pairs = pairs.sort().values
            starts = torch.searchsorted(pairs, starts_at)
            slots = -(-pairs.numel() // RUN)
            listed_keys[(owners + slots, -(-self.group_size // size))](
                self.q,
                self.k,
                self.v,
                self.grad_out,
                self.level,
                self.delta,
                pairs,
                starts,
                self.columns,
                dk,
                dv,
                parts,
                self.scale,
                self.factor,
                *self.strides,
                self.column_stride,
                start,
                self.t,
                self.s,
                self.heads,
                self.group,
                groups,
                owners,
                shift,
                GROUP_SIZE=self.group_size,
                PACK=self.pack,
                RUN=RUN,
                **self.widths,
                **config,
            )
            add_parts[(slots, -(-self.group_size * self.d // COLUMNS))](
                pairs,
                starts,
                parts,
                dk,
                dv,
                self.s,
                self.heads,
                groups,
                owners,
                shift,
                GROUP_SIZE=self.group_size,
                HEAD_DIM=self.d,
                RUN=RUN,
                COLUMNS=COLUMNS,
                num_warps=4,
                num_stages=1,
            )
