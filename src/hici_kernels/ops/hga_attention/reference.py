"""hga_attention: the formula in eager torch, one tile of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...rope import working_dtype
from ..hga_route.reference import forward as route
from ..hga_route.reference import regions
from ..hga_summaries.reference import forward as summarise
from ..hga_summaries.supers import super_chunk_keys

# Queries per tile and numbers per score matrix. Rows are independent, so they only set memory.
ROWS = 256
NUMBERS = 1 << 23


def take(x: Tensor, order: Tensor | None) -> Tensor:
    """x [B, S, ...] with row b in the order ``order[b]``; None = as it is."""
    return x if order is None else x.gather(1, order.view(*order.shape, *([1] * (x.ndim - 2))).expand_as(x))


class Tokens(NamedTuple):
    """The call with every row's tokens in front: p [B, T] index of each query, -1 = sees nothing."""

    order: Tensor | None
    p: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, positions: Tensor | None, attention_mask: Tensor | None) -> Tokens:
        b, t = q.shape[:2]
        s = k.shape[1]
        if attention_mask is None:
            p = torch.arange(s - t, s, device=q.device).expand(b, t) if positions is None else positions.long()
            return cls(None, torch.where((p >= 0) & (p < s), p, -1))
        mask = attention_mask != 0
        place = mask.cumsum(1)
        p = place[:, s - t :] - 1 if positions is None else positions.long()
        exists = mask[:, s - t :] & (p >= 0) & (p < mask.sum(1, keepdim=True))
        return cls(torch.argsort((~mask).to(torch.uint8), dim=1, stable=True), torch.where(exists, p, -1))


class Scores:
    """The score matrix of one call, a tile of queries at a time; tensors as [B, Hkv, rows, D]."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        p: Tensor,
        routes: Tensor,
        group_size: int,
        chunk_size: int,
        keep_first: int,
        keep_last: int,
        scale: float,
    ) -> None:
        self.wide = working_dtype(q.dtype)
        self.group_size, self.chunk_size, self.scale = group_size, chunk_size, scale
        self.q, self.p, self.routes = q, p, routes
        self.region = regions(p, chunk_size, keep_first, keep_last)
        # A token whose key or value is not finite must reach those who see it and nobody else, but 0 * NaN is NaN in
        # every product over tokens. So its key is NaN where scores are masked afterwards, and 0 where they are not.
        bad = ~(k.isfinite().all(-1, keepdim=True) & v.isfinite().all(-1, keepdim=True))
        keys, values = k.to(self.wide), v.to(self.wide)
        self.k_score = torch.where(bad, torch.nan, keys).transpose(1, 2)
        self.k = torch.where(bad, 0.0, keys).transpose(1, 2)
        self.v = torch.where(bad, 0.0, values).transpose(1, 2)

    def tiles(self) -> Iterator[tuple[slice, int]]:
        """(queries, end): the queries see keys [0, end) at most."""
        b, t, hq, _ = self.q.shape
        s = self.k.shape[2]
        step = max(1, min(ROWS, NUMBERS // max(1, b * hq * s)))
        for t0 in range(0, t, step):
            rows = slice(t0, min(t0 + step, t))
            end = s
            if self.p.device.type == "cpu" and b:  # reading it is free there
                end = int(self.p[:, rows].max()) + 1
            if end > 0:
                yield rows, end

    def rows(self, x: Tensor) -> Tensor:
        """[B, t, Hq, D] -> [B, Hkv, r t, D] in the working dtype; 0 for queries that see nothing."""
        return x.to(self.wide).unflatten(2, (self.k.shape[1], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def queries(self, rows: slice, alive: Tensor) -> Tensor:
        """Queries with 0 where ``alive`` [B, t, Hq or 1] is False: what they hold must not reach a sum over queries."""
        return self.rows(torch.where(alive.unsqueeze(-1), self.q[:, rows], 0.0))

    def heads(self, x: Tensor, t: int) -> Tensor:
        """[B, Hkv, r t, D] -> [B, t, Hq, D]."""
        return x.unflatten(2, (-1, t)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def seen(self, rows: slice, end: int) -> Tensor:
        """J_t as bool [B, t, Hq, end]."""
        j = torch.arange(end, device=self.p.device)
        f, l, p = (x[:, rows, None, None] for x in (self.region.f, self.region.l, self.p))  # noqa: E741
        always = (j < f * self.chunk_size) | ((j >= l * self.chunk_size) & (j <= p))
        groups = -(-end // self.group_size)
        ids = self.routes[:, rows].long()
        opened = torch.zeros(*ids.shape[:3], groups + 1, dtype=torch.bool, device=ids.device)
        opened = opened.scatter_(-1, torch.where(ids < 0, groups, ids), True)[..., :groups]
        return opened.repeat_interleave(self.group_size, -1)[..., :end] | always

    def masked(self, queries: Tensor, rows: slice, end: int, alive: Tensor) -> Tensor:
        """scale q_t . k_j for j in J_t, else -inf, as for a query that is not ``alive``: [B, Hkv, r t, end]."""
        s = queries @ self.k_score[:, :, :end].transpose(-1, -2)
        hidden = ~(self.seen(rows, end) & alive.unsqueeze(-1))
        hidden = hidden.unflatten(2, (self.k.shape[1], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return s.mul_(self.scale).masked_fill_(hidden, -torch.inf)


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
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((b, hq, t), -torch.inf, dtype=working_dtype(q.dtype), device=q.device)
    with torch.no_grad():
        order, p = Tokens.of(q, k, positions, attention_mask)
        k, v = take(k, order), take(v, order)
        if routes is None:
            chunk_keys, group_keys = summarise(k, inv_freq, None, chunk_size, group_size)
            routes = route(
                q,
                chunk_keys,
                group_keys,
                p,
                0,
                chunk_size,
                keep_first,
                keep_last,
                topk_chunks,
                topk_groups,
                routing,
                route_block,
                share,
                super_chunk,
                topk_supers,
                super_chunk_keys(chunk_keys, super_chunk) if super_chunk else None,
            )
        else:
            routes = routes.clone()
        scores = Scores(q, k, v, p, routes, group_size, chunk_size, keep_first, keep_last, scale)
        for rows, end in scores.tiles():
            alive = (p[:, rows] >= 0).unsqueeze(-1)
            s = scores.masked(scores.queries(rows, alive), rows, end, alive)
            highest = s.amax(-1, keepdim=True)
            # exp(-inf - -inf) is NaN: a row that sees nothing is shifted by 0 instead of its maximum
            shift = torch.where(highest == -torch.inf, 0.0, highest)
            weight = s.sub_(shift).exp_()
            total = weight.sum(-1, keepdim=True)
            part = weight @ scores.v[:, :, :end] / torch.where(total == 0, 1.0, total)
            count = rows.stop - rows.start
            out[:, rows] = scores.heads(part, count).to(q.dtype)
            lse[:, :, rows] = (total.log() + shift).unflatten(2, (-1, count)).flatten(1, 2).squeeze(-1)
    return out, lse, routes


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
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v) with J_t fixed. P = exp(S - lse), G = grad_out, g = grad_lse:

    dV = P^T G;  dS = P * (G V^T - (G . out - g));  dQ = scale dS K;  dK = scale dS^T Q.
    Sums over queries are kept in the working dtype, in tile order.
    """
    scale = rest[-1]
    assert isinstance(scale, float)
    order, p = Tokens.of(q, k, positions, attention_mask)
    scores = Scores(q, take(k, order), take(v, order), p, routes, group_size, chunk_size, keep_first, keep_last, scale)
    dq = torch.zeros(q.shape, dtype=scores.wide, device=q.device)
    dk, dv = torch.zeros_like(scores.k), torch.zeros_like(scores.v)
    for rows, end in scores.tiles():
        count = rows.stop - rows.start
        given, given_lse = grad_out[:, rows].to(scores.wide), grad_lse[:, :, rows].transpose(1, 2)
        # a query that sees nothing, or of which nothing is asked, passes nothing on, whatever its numbers are
        alive = (p[:, rows] >= 0).unsqueeze(-1) & ((given != 0).any(-1) | (given_lse != 0))
        queries = scores.queries(rows, alive)
        g_out, o = (torch.where(alive.unsqueeze(-1), x, 0.0) for x in (given, out[:, rows].to(scores.wide)))
        g_lse, level = (torch.where(alive, x, 0.0) for x in (given_lse, lse[:, :, rows].transpose(1, 2)))
        delta = (g_out * o).sum(-1) - g_lse
        weight = scores.masked(queries, rows, end, alive).sub_(scores.rows(level.unsqueeze(-1))).exp_()
        g = scores.rows(g_out)
        dv[:, :, :end] += weight.transpose(-1, -2) @ g
        ds = weight.mul_((g @ scores.v[:, :, :end].transpose(-1, -2)).sub_(scores.rows(delta.unsqueeze(-1))))
        dq[:, rows] = scores.heads(ds @ scores.k[:, :, :end], count) * scale
        dk[:, :, :end] += (ds.transpose(-1, -2) @ queries) * scale
    dk, dv = dk.transpose(1, 2), dv.transpose(1, 2)
    if order is not None:
        back = torch.argsort(order, 1)
        dk, dv = take(dk, back), take(dv, back)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
