"""hga_route: the formula in eager torch, one tile of queries at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...rope import working_dtype
from ..hga_summaries.reference import ordered_sum

# Queries per tile, and numbers per scratch tensor of the scores. Rows are independent, so they only set memory.
ROWS = 256
NUMBERS = 1 << 21


class Regions(NamedTuple):
    """Of queries at index p: active chunk n, sinks [0, f), pool [f, l), window [l, n), all in chunks; shape of p."""

    n: Tensor
    f: Tensor
    l: Tensor  # noqa: E741  the paper's name


def regions(p: Tensor, chunk_size: int, keep_first: int, keep_last: int) -> Regions:
    """n = p // C;  f = min(F, n);  l = min(max(F, n - W), n)."""
    n = torch.div(p, chunk_size, rounding_mode="floor")
    return Regions(n, n.clamp(max=keep_first), torch.minimum((n - keep_last).clamp(min=keep_first), n))


def top(score: Tensor, count: int) -> Tensor:
    """Ids [..., count] of the highest scores, equal ones by lowest id; -1 where only -inf is left."""
    value, index = torch.sort(score, dim=-1, descending=True, stable=True)
    return torch.where(value[..., :count] > -torch.inf, index[..., :count], -1)


def ascending(ids: Tensor) -> Tensor:
    """Sorted along the last dim, with -1 at the end."""
    last = torch.iinfo(ids.dtype).max
    ids = torch.where(ids < 0, last, ids).sort(-1).values
    return torch.where(ids == last, -1, ids)


def running_max(x: Tensor, run: Tensor, span: int) -> Tensor:
    """max of x [B, E, ...] over the rows up to each row with the same ``run`` [B, E]; a run has at most span rows."""
    lowest = -torch.inf if x.is_floating_point() else 0
    step = 1
    while step < min(span, x.shape[1]):
        same = (run[:, step:] == run[:, :-step]).view(x.shape[0], -1, *([1] * (x.ndim - 2)))
        x = torch.cat((x[:, :step], torch.maximum(x[:, step:], torch.where(same, x[:, :-step], lowest))), 1)
        step *= 2
    return x


def whole_max(x: Tensor, run: Tensor, span: int) -> Tensor:
    """max of x [B, E, ...] over all rows with the same ``run``."""
    after = running_max(x.flip(1), run.flip(1), span).flip(1)
    return torch.maximum(running_max(x, run, span), after)


class Router:
    """One call. Scores have heads [G, 1] for share="kv" and [G, r] otherwise; G = Hkv, r = Hq / Hkv."""

    def __init__(
        self,
        chunk_keys: Tensor,
        group_keys: Tensor,
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
        super_keys: Tensor | None,
    ) -> None:
        self.m = group_keys.shape[2]
        self.wide = working_dtype(chunk_keys.dtype)
        self.chunk_keys = chunk_keys
        self.group_keys = group_keys
        # [B, G, n M, D]: a picked chunk's groups are rows of one table
        self.table = group_keys.permute(0, 3, 1, 2, 4).flatten(2, 3)
        self.chunk_size, self.keep_first, self.keep_last = chunk_size, keep_first, keep_last
        self.topk_chunks, self.topk_groups = topk_chunks, topk_groups
        self.routing, self.share = routing, share
        self.super_chunk, self.topk_supers, self.super_keys = super_chunk, topk_supers, super_keys
        self.span = {"strict": 1, "prefix": chunk_size, "block": min(chunk_size, route_block)}[routing]

    def shared(self, score: Tensor) -> Tensor:
        return score.amax(3, keepdim=True) if self.share == "kv" else score

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """q [B, E, G, r, D] with keys [B, N, G, D] -> [B, E, G, r, N]."""
        b, e, g, r, d = q.shape
        count = keys.shape[1]
        # D in front: halves of the sum are then contiguous
        rows = keys.to(self.wide).permute(3, 0, 2, 1).unsqueeze(2).unsqueeze(4).contiguous()
        wide = q.to(self.wide).permute(4, 0, 1, 2, 3).unsqueeze(-1)
        step = max(1, NUMBERS // max(1, b * g * r * d * count))
        parts = [ordered_sum(wide[:, :, i : i + step] * rows, 0) for i in range(0, e, step)]
        return self.shared(torch.cat(parts, 1))

    def candidate_scores(self, q: Tensor, ids: Tensor) -> Tensor:
        """q [B, E, G, r, D] with the groups ids [B, E, G, r or 1, N] -> [B, E, G, r or 1, N]; negative ids give any."""
        b, e, g, r, d = q.shape
        row = torch.arange(b, device=q.device).view(-1, 1, 1, 1, 1)
        head = torch.arange(g, device=q.device).view(1, 1, -1, 1, 1)
        step = max(1, NUMBERS // max(1, b * g * r * d * ids.shape[-1]))
        parts = []
        for i in range(0, e, step):
            keys = self.table[row, head, ids[:, i : i + step].clamp(min=0)].to(self.wide)
            parts.append(ordered_sum(q[:, i : i + step].to(self.wide).unsqueeze(-2) * keys, -1))
        return self.shared(torch.cat(parts, 1))

    def pick(self, score: Tensor, region: Regions, count: int) -> Tensor:
        """Chunk ids [B, E, G, r, count] of the highest scores; W = 0: chunk n - 1 in place of the lowest pick."""
        picks = top(score, count)
        if self.keep_last == 0:
            previous = (region.n - 1)[:, :, None, None, None]
            inside = (region.n > region.f)[:, :, None, None, None] & (previous < self.chunk_keys.shape[1])
            absent = inside & ~(picks == previous).any(-1, keepdim=True)
            rank = torch.arange(picks.shape[-1], device=picks.device)
            lowest = rank == ((picks >= 0).sum(-1, keepdim=True) - 1)
            picks = torch.where(absent & lowest, previous, picks)
        return picks

    def tile(self, q: Tensor, p: Tensor, run: Tensor, chunks: int) -> Tensor:
        """Opened group ids [B, E, G, r, w] of queries q [B, E, G, r, D] at p [B, E]; chunks below ``chunks`` only."""
        region = regions(p, self.chunk_size, self.keep_first, self.keep_last)
        c = torch.arange(chunks, device=q.device)
        pool = (c >= region.f.unsqueeze(-1)) & (c < region.l.unsqueeze(-1)) & (p >= 0).unsqueeze(-1)
        pool = pool[:, :, None, None]
        if self.super_keys is not None:
            pool = pool & self.survivors(q, region, c)
        least = torch.finfo(self.wide).min  # a real score stays above "not a candidate", whatever its size
        sigma = torch.where(pool, self.scores(q, self.chunk_keys[:, :chunks]).clamp(min=least), -torch.inf)
        count = min(self.topk_chunks, chunks)
        own = sigma
        if self.routing == "prefix":
            sigma = running_max(sigma, run, self.span)
        elif self.routing == "block":
            sigma = whole_max(sigma, run, self.span)
        picks = ascending(self.pick(sigma, region, count))
        candidates = picks.unsqueeze(-1) * self.m + torch.arange(self.m, device=q.device)
        candidates = torch.where(picks.unsqueeze(-1) < 0, -1, candidates).flatten(-2)
        if self.routing == "prefix":
            # a query's candidates need the scores of earlier queries that did not pick them: score every group
            gamma = running_max(self.scores(q, self.group_keys[:, :chunks].flatten(1, 2)), run, self.span)
            gamma = gamma.gather(-1, candidates.clamp(min=0))
        else:
            gamma = self.candidate_scores(q, candidates)
        gamma = torch.where(candidates >= 0, gamma.clamp(min=least), -torch.inf)
        budget = min(self.topk_groups, candidates.shape[-1])
        if self.routing != "block":
            return ascending(_at(candidates, top(gamma, budget)))
        return self.block(own, gamma, picks, candidates, region, run, budget)

    def survivors(self, q: Tensor, region: Regions, c: Tensor) -> Tensor:
        """bool [B, E, G, r, chunks]: False for chunks of super-chunks inside the pool that are not among the best."""
        assert self.super_keys is not None
        x = self.super_chunk
        supers = torch.arange(len(c) // x, device=q.device)
        inside = (supers * x >= region.f.unsqueeze(-1)) & ((supers + 1) * x <= region.l.unsqueeze(-1))
        inside = inside[:, :, None, None]
        least = torch.finfo(self.wide).min
        score = self.scores(q, self.super_keys[:, : len(supers)]).clamp(min=least)
        best = _members(top(torch.where(inside, score, -torch.inf), self.topk_supers), len(supers)) > 0
        kept = (best | ~inside).repeat_interleave(x, -1)
        return torch.nn.functional.pad(kept, (0, len(c) - kept.shape[-1]), value=True)

    def block(
        self, sigma: Tensor, gamma: Tensor, picks: Tensor, candidates: Tensor, region: Regions, run: Tensor, budget: int
    ) -> Tensor:
        """open = materialised for the block, requested by some s <= t of it, in a chunk requested by some s <= t."""
        requests = _members(top(sigma, picks.shape[-1]), sigma.shape[-1])
        visible = running_max(requests, run, self.span).gather(-1, picks.clamp(min=0)) > 0
        if self.keep_last == 0:
            visible |= picks == (region.n - 1)[:, :, None, None, None]
        visible &= picks >= 0
        width = candidates.shape[-1]
        materialised = _members(top(whole_max(gamma, run, self.span), budget), width)
        requested = _members(top(gamma, min(self.topk_groups // 2, width)), width)
        opened = (materialised > 0) & (running_max(requested, run, self.span) > 0)
        opened &= visible.repeat_interleave(self.m, -1)
        return ascending(torch.where(opened, candidates, -1))[..., :budget]


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[index] along the last dim; index -1 gives -1."""
    return torch.where(index < 0, -1, values.gather(-1, index.clamp(min=0)))


def _members(ids: Tensor, width: int) -> Tensor:
    """uint8 [..., width]: 1 at the ids; -1 is no id."""
    marks = torch.zeros(*ids.shape[:-1], width + 1, dtype=torch.uint8, device=ids.device)
    return marks.scatter_(-1, torch.where(ids < 0, width, ids), 1)[..., :width]


def runs(p: Tensor, chunk_size: int, route_block: int | None) -> Tensor:
    """Number of each query's run [B, T]: queries of one chunk, cut after every route_block of them if given.

    Queries that see nothing (p < 0), which stand last, are runs of their own.
    """
    t = torch.arange(p.shape[1], device=p.device).expand_as(p)
    chunk = torch.div(p, chunk_size, rounding_mode="floor")
    first = torch.ones_like(p, dtype=torch.bool)
    first[:, 1:] = chunk[:, 1:] != chunk[:, :-1]
    if route_block is not None:
        since = t - torch.where(first, t, 0).cummax(1).values
        first |= since % route_block == 0
    return torch.where(p < 0, -1 - t, first.cumsum(1))


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
    b, t, hq, _ = q.shape
    n, hkv = chunk_keys.shape[1], chunk_keys.shape[2]
    routes = torch.full((b, t, hq, min(topk_groups, n * group_keys.shape[2])), -1, dtype=torch.int32, device=q.device)
    if routes.numel() == 0 or n == 0 or topk_chunks == 0:
        return routes[:, context:]
    with torch.no_grad():
        if positions is None:
            p = (torch.arange(t, device=q.device) + max(t, n * chunk_size) - t).expand(b, t)
        else:
            p = positions.long()
        order = None
        if routing != "strict":
            # a run must stand in adjacent rows: queries that see nothing go last
            order = torch.argsort((p < 0).to(torch.uint8), dim=1, stable=True)
            p = p.gather(1, order)
            q = q.gather(1, order[:, :, None, None].expand_as(q))
        router = Router(
            chunk_keys,
            group_keys,
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
            super_keys,
        )
        run = runs(p, chunk_size, route_block if routing == "block" else None)
        q = q.unflatten(2, (hkv, hq // hkv))
        before = 0 if routing == "strict" else router.span - 1
        after = before if routing == "block" else 0
        for t0 in range(0, t, ROWS):
            t1 = min(t0 + ROWS, t)
            rows = slice(max(0, t0 - before), min(t, t1 + after))
            chunks = n
            if p.device.type == "cpu":  # reading it is free there, and early queries have few chunks to score
                chunks = min(n, max(0, int(p[:, rows].max()) // chunk_size))
            if chunks == 0:
                continue
            found = router.tile(q[:, rows], p[:, rows], run[:, rows], chunks)
            found = found[:, t0 - rows.start : t1 - rows.start].to(torch.int32)
            found = found.expand(-1, -1, hkv, hq // hkv, -1).flatten(2, 3)
            routes[:, t0:t1, :, : found.shape[-1]] = found
        if order is not None:
            index = order[:, :, None, None].expand_as(routes)
            routes = torch.empty_like(routes).scatter_(1, index, routes)
    return routes[:, context:]
