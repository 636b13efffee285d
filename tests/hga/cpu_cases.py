"""Random calls of the HGA operations for the differential tests of their kernels, and when two routes may differ."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import oracle
import torch
from torch import Tensor

from hici_kernels import HGAConfig, Rope
from hici_kernels.ops.hga_attention.api import HGAResult, hga_attention
from hici_kernels.ops.hga_route.api import budgets
from hici_kernels.ops.hga_summaries.api import hga_summaries
from hici_kernels.ops.hga_summaries.supers import super_chunk_keys

LOW = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [2, 4, 8, 16, 20, 32, 36, 64, 66, 128]
NAN = float("nan")


class Call(NamedTuple):
    tensors: dict[str, Tensor]
    config: HGAConfig
    options: dict[str, Any]  # rope, positions, attention_mask, scale
    features: frozenset[str]


def laid_out(rng: random.Random, x: Tensor) -> tuple[Tensor, str]:
    """The same values with other strides; memory between them is NaN."""
    kind = rng.choice(["plain", "plain", "heads first", "wide", "tokens apart"])
    if kind == "plain":
        return x.clone(), kind
    if kind == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2), kind
    shape, at = list(x.shape), [slice(None)] * 4
    axis, begin, step = {"wide": (3, rng.randint(0, 3), 1), "tokens apart": (1, 1, 2)}[kind]
    at[axis] = slice(begin, begin + step * shape[axis], step)
    shape[axis] = begin + step * shape[axis] + 1
    view = x.new_full(shape, NAN)[tuple(at)]
    return view.copy_(x), kind


def random_config(rng: random.Random) -> HGAConfig:
    chunk = rng.choice([1, 4, 6, 8, 16, 16, 64, 80])
    group = rng.choice([g for g in (1, 2, 3, 4, 8, 16, 20, 64, 80) if chunk % g == 0])
    routing = rng.choice(["strict", "prefix", "block"])
    return HGAConfig(
        super_chunk=rng.choice([0, 1, 2, 3, 5]) if routing == "strict" else 0,
        topk_supers=rng.randint(0, 4),
        chunk_size=chunk,
        group_size=group,
        keep_first=rng.randint(0, 2),
        keep_last=rng.randint(0, 3),
        topk_chunks=rng.randint(0, 5),
        topk_groups=rng.choice([0, 1, 2, 3, 5, 8, 12, 40]),
        routing=routing,
        route_block=rng.choice([1, 3, 8, 16, 64]),
        share=rng.choice(["query", "kv"]),
    )


def call(seed: int, draw: int = 0) -> Call:
    """One call of everything hga_attention documents, in one of the low dtypes; each draw gives it other values."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed + 1_000_003 * draw)
    config, dtype = random_config(rng), rng.choice(LOW)
    d, r, hkv, b = (
        rng.choice(HEAD_DIMS),
        rng.choice([1, 1, 2, 4, 8]),
        rng.choice([1, 1, 2, 3]),
        rng.choice([1, 1, 2, 3]),
    )
    s = min(rng.randint(0, config.chunk_size * rng.choice([2, 10, 30])), rng.choice([40, 150, 500]))
    t = s if rng.random() < 0.5 else min(s, rng.choice([0, 1, 1, 2, 3, 8, 40]))
    size = rng.choice([1.0, 1.0, 0.3, 3.0])
    tensors = {
        name: (size * torch.randn(b, length, heads, d, generator=g)).to(dtype)
        for name, length, heads in (("q", t, hkv * r), ("k", s, hkv), ("v", s, hkv))
    }
    mask = None
    if rng.random() < 0.4:
        mask = torch.rand(b, s, generator=g) < rng.choice([0.0, 0.3, 0.8, 1.0])
        tensors["q"][~mask[:, s - t :]] = NAN
        tensors["k"][~mask] = tensors["v"][~mask] = NAN
    positions = None
    if rng.random() < 0.3:
        # increasing, as "prefix" and "block" ask; beyond both ends of the text
        drawn = [torch.randperm(s + 4, generator=g)[:t].sort().values - 2 for _ in range(b)]
        positions = torch.stack(drawn) if b else torch.zeros(0, t, dtype=torch.int64)
        if config.routing == "strict" and rng.random() < 0.5:
            positions = positions.flip(1)
        positions = positions.to(rng.choice([torch.int32, torch.int64]))
    options = {
        "rope": Rope.from_theta(rng.choice([1e3, 1e4, 1e6]), 2 * rng.randint(1, d // 2)),
        "positions": positions,
        "attention_mask": mask if mask is None else mask.to(rng.choice([torch.bool, torch.int64])),
        "scale": rng.choice([None, None, 0.3, -0.2]),
    }
    features = {config.routing, config.share, str(dtype), f"heads {r}", "decode" if t * r <= 16 else "prefill"}
    for name in tensors:
        tensors[name], kind = laid_out(rng, tensors[name])
        features.add(kind)
    features |= {"super-chunks"} if config.super_chunk else set()
    features |= {"mask"} if mask is not None else set()
    features |= {"positions"} if positions is not None else set()
    features |= {"no window"} if config.keep_last == 0 else set()
    features |= {"several chunks"} if s > (config.keep_first + config.keep_last + 2) * config.chunk_size else set()
    return Call(tensors, config, options, frozenset(features))


def attend(c: Call, impl: str | None, tensors: dict[str, Tensor] | None = None) -> HGAResult:
    return hga_attention(
        **(tensors or c.tensors), config=c.config, **c.options, return_lse=True, return_routes=True, impl=impl
    )


class Row(NamedTuple):
    """One row of a call with its masked tokens left out: what oracle.py takes."""

    q: Tensor
    k: Tensor
    index: list[int]  # of each query, -1 = sees nothing


def row_of(c: Call, b: int) -> Row:
    q, k = c.tensors["q"], c.tensors["k"]
    t, s = q.shape[1], k.shape[1]
    mask = c.options["attention_mask"]
    kept = torch.ones(s, dtype=torch.bool) if mask is None else mask[b] != 0
    place = kept.cumsum(0)
    given = place[s - t :] - 1 if c.options["positions"] is None else c.options["positions"][b].long()
    exists = kept[s - t :] & (given >= 0) & (given < kept.sum())
    return Row(q[b], k[b, kept], torch.where(exists, given, -1).tolist())


def undecided(c: Call, b: int, t: int, h: int) -> bool:
    """Whether the route of query t and head h rests on a choice that rounding in float32 may turn.

    Every choice of it is looked at: the last chunk in and the first one out, the last group in and the first one out,
    of every query whose choice takes part; scores in float64 from the stored summaries.
    """
    config, row = c.config, row_of(c, b)
    r = row.q.shape[1] // row.k.shape[1]
    g = h // r
    family = [h] if config.share == "query" else list(range(g * r, g * r + r))
    keys = row.k.unsqueeze(0)
    chunks, groups = hga_summaries(
        keys, rope=c.options["rope"], chunk_size=config.chunk_size, group_size=config.group_size, impl="reference"
    )
    ck, gk = chunks[0, :, g].double(), groups[0, :, :, g].double().flatten(0, 1)
    q = row.q[:, family].double()
    sigma = torch.einsum("thd,nd->thn", q, ck).amax(1)
    gamma = torch.einsum("thd,nd->thn", q, gk).amax(1)
    # the error of a sum of D products in float32, whatever its order
    unit = 2.0**-24 * (q.shape[-1] + 2)
    loose = [
        2 * unit * torch.einsum("thd,nd->thn", q.abs(), x.abs()).amax(1).nan_to_num(0.0).amax().item() for x in (ck, gk)
    ]

    n, f, l = oracle.bounds(row.index[t], config)  # noqa: E741
    m = config.groups_per_chunk
    same = [i for i, p in enumerate(row.index[: t + 1]) if p >= 0 and p // config.chunk_size == n]
    block = oracle.block_of(t, row.index, config) if config.routing == "block" else []

    pool = list(range(f, l))
    if config.super_chunk:
        x = config.super_chunk
        inside_pool = list(range(-(-f // x), l // x))
        keys_of = super_chunk_keys(chunks, x)[0, :, g].double()
        scores = torch.einsum("hd,nd->hn", q[t], keys_of).amax(0)
        loose_super = 2 * unit * torch.einsum("hd,nd->hn", q[t].abs(), keys_of.abs()).nan_to_num(0.0)
        chosen = scores[inside_pool].sort(descending=True, stable=True)
        kept = config.topk_supers
        if 0 < kept < len(inside_pool) and chosen.values[kept - 1] - chosen.values[kept] <= loose_super.amax():
            return True
        lost = {inside_pool[i] for i in chosen.indices[kept:].tolist()}
        pool = [c for c in pool if c // x not in lost]

    def near(values: Tensor, count: int, limit: float) -> bool:
        """The choice of the ``count`` highest could fall otherwise."""
        if count == 0 or count >= len(values):
            return False
        top = values.sort(descending=True).values
        return bool(top[count - 1] - top[count] <= limit)

    def chunk_choices() -> list[Tensor]:
        if config.routing == "strict":
            return [sigma[t, pool]]
        if config.routing == "prefix":
            return [sigma[same, f:l].amax(0)]
        return [sigma[block, f:l].amax(0), *(sigma[i, f:l] for i in block)]

    if any(near(x, config.topk_chunks, loose[0]) for x in chunk_choices()):
        return True
    if config.keep_last == 0 and any(near(x, config.topk_chunks - 1, loose[0]) for x in chunk_choices()[:1]):
        return True
    picks = oracle.pick(dict(zip(pool, chunk_choices()[0].tolist(), strict=True)), n, config)
    inside = [x * m + y for x in picks for y in range(m)]
    if config.routing == "strict":
        return near(gamma[t, inside], config.topk_groups, loose[1])
    if config.routing == "prefix":
        return near(gamma[same][:, inside].amax(0), config.topk_groups, loose[1])
    own = any(near(gamma[i, inside], config.topk_groups // 2, loose[1]) for i in block)
    return own or near(gamma[block][:, inside].amax(0), config.topk_groups, loose[1])


def with_routes(c: Call, routes: Tensor) -> tuple[Any, ...]:
    """Arguments of the operation after q, k, v, with the routes given."""
    config, scale = c.config, c.options["scale"]
    d = c.tensors["q"].shape[-1]
    return (
        c.options["rope"].inv_freq,
        c.options["positions"],
        c.options["attention_mask"],
        routes,
        config.group_size,
        *budgets(config),
        d**-0.5 if scale is None else scale,
    )
