"""HGA by loops in float64, one row and one query at a time, written from the paper's rules and not from the library.

A row is q [T, Hq, D], k and v [S, Hkv, D] (roped) and the index of every query. Nothing here is batched or masked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hici_kernels import HGAConfig


def cut(inv_freq: list[float], chunk_size: int) -> int:
    fast = [i for i, w in enumerate(inv_freq) if max(1, chunk_size - 1) * w > 0.5]
    return 1 + max(fast) if fast else 0


def summary(keys: Tensor, first: int, inv_freq: list[float], slow_from: int) -> Tensor:
    """One kv head: keys [len, D] at indices first..; pair by pair."""
    length, d = keys.shape
    half = len(inv_freq)
    anchor = first + (length - 1) // 2
    result = torch.zeros(d, dtype=torch.float64)
    for j in range(length):
        x = keys[j].double()
        for i in range(d):
            if i >= 2 * half or (i % half) < slow_from:
                result[i] += x[i]
            else:
                angle = (anchor - (first + j)) * inv_freq[i % half]
                a, b = float(x[i % half]), float(x[i % half + half])
                if i < half:
                    result[i] += a * math.cos(angle) - b * math.sin(angle)
                else:
                    result[i] += b * math.cos(angle) + a * math.sin(angle)
    return result / length


def summaries(k: Tensor, inv_freq: Tensor, chunk_size: int, group_size: int) -> tuple[Tensor, Tensor]:
    """(chunk keys [n, Hkv, D], group keys [n, M, Hkv, D])."""
    s, hkv, d = k.shape
    n, m = s // chunk_size, chunk_size // group_size
    w = inv_freq.double().tolist()
    at = cut(w, chunk_size)
    chunks = torch.zeros(n, hkv, d, dtype=torch.float64)
    groups = torch.zeros(n, m, hkv, d, dtype=torch.float64)
    for c in range(n):
        for h in range(hkv):
            start = c * chunk_size
            chunks[c, h] = summary(k[start : start + chunk_size, h], start, w, at)
            for g in range(m):
                first = start + g * group_size
                groups[c, g, h] = summary(k[first : first + group_size, h], first, w, at)
    return chunks, groups


def best(scores: dict[int, float], count: int) -> list[int]:
    """Ids of the highest scores, equal ones by lowest id, highest first."""
    return sorted(scores, key=lambda i: (-scores[i], i))[:count]


def bounds(p: int, config: HGAConfig) -> tuple[int, int, int]:
    n = p // config.chunk_size
    return n, min(config.keep_first, n), min(max(config.keep_first, n - config.keep_last), n)


def pick(scores: dict[int, float], n: int, config: HGAConfig) -> list[int]:
    picks = best(scores, config.topk_chunks)
    if config.keep_last == 0 and picks and n - 1 in scores and n - 1 not in picks:
        picks[-1] = n - 1
    return picks


def route(q: Tensor, chunks: Tensor, groups: Tensor, positions: list[int], config: HGAConfig) -> list[list[list[int]]]:
    """Opened groups per query and query head."""
    t_count, hq, _ = q.shape
    hkv, m = chunks.shape[1], groups.shape[1]
    r = hq // hkv
    families = (
        [[h] for h in range(hq)] if config.share == "query" else [list(range(g * r, g * r + r)) for g in range(hkv)]
    )
    opened: list[list[list[int]]] = [[[] for _ in range(hq)] for _ in range(t_count)]
    for family in families:
        g = family[0] // r

        def sigma(t: int, c: int, family=family, g=g) -> float:
            return max(float(q[t, h].double() @ chunks[c, g]) for h in family)

        def gamma(t: int, x: int, family=family, g=g) -> float:
            return max(float(q[t, h].double() @ groups[x // m, x % m, g]) for h in family)

        for t, p in enumerate(positions):
            n, f, l = bounds(p, config)  # noqa: E741
            if p < 0 or l <= f or config.topk_chunks == 0:
                continue
            pool = range(f, l)
            same_chunk = [s for s in range(t + 1) if positions[s] // config.chunk_size == n and positions[s] >= 0]
            if config.routing == "block":
                ids = block_route(t, positions, pool, n, sigma, gamma, m, config)
            else:
                seen = [t] if config.routing == "strict" else same_chunk
                picks = pick({c: max(sigma(s, c) for s in seen) for c in pool}, n, config)
                inside = [c * m + x for c in picks for x in range(m)]
                ids = best({x: max(gamma(s, x) for s in seen) for x in inside}, config.topk_groups)
            for h in family:
                opened[t][h] = sorted(ids)
    return opened


def block_of(t: int, positions: list[int], config: HGAConfig) -> list[int]:
    """Queries of the block of query t: cut at chunk ends and after route_block queries, from the first query on."""
    block: list[int] = []
    for s, p in enumerate(positions):
        if p < 0:
            continue
        if block and (
            positions[block[0]] // config.chunk_size != p // config.chunk_size or len(block) == config.route_block
        ):
            if t in block:
                break
            block = []
        block.append(s)
    return block


def block_route(t, positions, pool, n, sigma, gamma, m, config) -> list[int]:
    block = block_of(t, positions, config)
    kc = min(config.topk_chunks, len(pool))
    picks = pick({c: max(sigma(s, c) for s in block) for c in pool}, n, config)
    inside = [c * m + x for c in picks for x in range(m)]
    materialised = best({x: max(gamma(s, x) for s in block) for x in inside}, config.topk_groups)
    visible, requested = set(), set()
    for s in block:
        if s > t:
            break
        visible |= set(best({c: sigma(s, c) for c in pool}, kc))
        requested |= set(best({x: gamma(s, x) for x in inside}, config.topk_groups // 2))
    if config.keep_last == 0 and n - 1 in pool:
        visible.add(n - 1)
    return [x for x in materialised if x in requested and x // m in visible]


def visible_tokens(p: int, ids: list[int], config: HGAConfig) -> list[int]:
    """Every token a query sees, with repetitions if the rules gave any."""
    if p < 0:
        return []
    _, f, l = bounds(p, config)  # noqa: E741
    tokens = list(range(f * config.chunk_size))
    for x in ids:
        tokens += range(x * config.group_size, (x + 1) * config.group_size)
    return tokens + list(range(l * config.chunk_size, p + 1))


def attention(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, config: HGAConfig, positions: list[int] | None = None
) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
    """(out [T, Hq, D], lse [Hq, T], opened groups)."""
    t_count, hq, d = q.shape
    s, hkv = k.shape[0], k.shape[1]
    positions = list(range(s - t_count, s)) if positions is None else positions
    chunks, groups = summaries(k, inv_freq, config.chunk_size, config.group_size)
    opened = route(q, chunks, groups, positions, config)
    out = torch.zeros(t_count, hq, v.shape[-1], dtype=torch.float64)
    lse = torch.full((hq, t_count), -math.inf, dtype=torch.float64)
    for t, p in enumerate(positions):
        for h in range(hq):
            tokens = visible_tokens(p, opened[t][h], config)
            if not tokens:
                continue
            g = h // (hq // hkv)
            scores = (k[tokens, g].double() @ q[t, h].double()) * d**-0.5
            lse[h, t] = torch.logsumexp(scores, 0)
            out[t, h] = (scores - lse[h, t]).exp() @ v[tokens, g].double()
    return out, lse, opened
