"""Suite "hga": routed attention of one Qwen3-8B layer (32/8 heads, D 128, bfloat16) beside dense attention.

Budgets are the defaults.

A decode step is hga_route over the tables of the history, then hga_attention over what a route opened. The history lies
[heads, tokens, D], the layout dense decode wants too. "Cold" rotates over 8 layers of random keys, far more than caches
hold. The routes attended are, by row,
    disjoint    every query head opens groups of its own: the most bytes a step can need
    replayed    those of the model shipped with the demo at the end of a text, heads mapped cyclically
so that every run reads the same bytes; the routing itself always runs, over the layer's own tables.

Bytes a step must touch: chunk keys of the pool, group keys of the picked chunks (each once per kv head), K and V of
sinks, window, own chunk and of the opened groups (each once per kv head).

Beside it, in the same rounds, a loop that reads those bytes (all but the group keys) and only adds them up, in runs of
one group's keys or values, wherever they lie: what memory gives to whoever reads such runs.

Dense decode in three forms, the fastest of which counts: SDPA with enable_gqa; with K and V expanded beforehand; with
the query heads of a kv head as rows of one head. Results are compared with float64 for one kv head; a wrong one has no
time.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from .. import _native
from .._outputs import progress
from ..config import HGAConfig
from ..demo.hga_part import rope_of
from ..demo.lm import ByteLM, dense_causal
from ..demo.text import held_out_streams, windows
from ..ops.hga_attention.api import hga_attention
from ..ops.hga_attention.op import attention_forward
from ..ops.hga_route.api import budgets, hga_route
from ..ops.hga_summaries.api import hga_summaries
from ..ops.hga_summaries.supers import super_chunk_keys
from ..rope import Rope
from .machine import spread
from .run import alternate, check
from .shapes import Layer

QWEN3_8B = Layer("Qwen3-8B layer", 4096, 32, 8, 128)
#: The same machinery at sizes a test can take.
SMALL = Layer("tiny", 256, 4, 2, 64)
OURS = "hici_kernels"
READING = "reading alone"
LAYERS = 8
TRACE = 8192
#: For very long histories.
SUPERS = HGAConfig(super_chunk=16, topk_supers=32)


class Sizes(NamedTuple):
    """What a run of the suite measures."""

    layer: Layer = QWEN3_8B
    cached: int = 1 << 16
    far: int = 1 << 20
    prefill: int = 1 << 15
    batch: int = 8
    trace: int = TRACE


class History:
    """Keys, values and tables of one layer; rows [heads, tokens, D] seen as [B, tokens, heads, D]."""

    def __init__(self, layer: Layer, b: int, s: int, config: HGAConfig, rope: Rope, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        # repeated from one block: drawing a million tokens would take longer than the suite
        part = min(s, 1 << 14)
        self.k, self.v = (
            torch.randn(b, layer.hkv, part, layer.d, generator=g)
            .bfloat16()
            .repeat(1, 1, -(-s // part), 1)[:, :, :s]
            .contiguous()
            .transpose(1, 2)
            for _ in "kv"
        )
        chunk_keys, group_keys = hga_summaries(
            self.k, rope=rope, chunk_size=config.chunk_size, group_size=config.group_size
        )
        self.chunk_keys = chunk_keys.transpose(1, 2).contiguous().transpose(1, 2)
        self.group_keys = group_keys.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
        self.super_keys: Tensor | None = None
        if config.super_chunk:
            self.super_keys = super_chunk_keys(self.chunk_keys, config.super_chunk)


class Step:
    """One decode step after another, each on the next layer."""

    def __init__(self, histories: list[History], routes: list[Tensor], positions: Tensor, config: HGAConfig, q: Tensor):
        self.histories, self.routes, self.positions, self.config, self.q = histories, routes, positions, config, q
        self.turn = 0

    def next(self) -> tuple[History, Tensor]:
        self.turn += 1
        return self.histories[self.turn % len(self.histories)], self.routes[self.turn % len(self.routes)]

    def route(self, impl: str | None = None) -> Tensor:
        history, _ = self.next()
        return self._route(history, impl)

    def _route(self, history: History, impl: str | None) -> Tensor:
        return hga_route(
            self.q,
            history.chunk_keys,
            history.group_keys,
            self.config,
            positions=self.positions,
            super_keys=history.super_keys,
            impl=impl,
        )

    def attend(self, history: History, routes: Tensor, impl: str | None = None) -> Tensor:
        d = self.q.shape[-1]
        given = (torch.ones(1), self.positions, None, routes, self.config.group_size, *budgets(self.config))
        return attention_forward(self.q, history.k, history.v, *given, d**-0.5, impl or "")[0]

    def __call__(self, impl: str | None = None) -> Tensor:
        history, routes = self.next()
        self._route(history, impl)
        return self.attend(history, routes, impl)

    def bytes(self) -> int:
        """Bytes a step must touch, mean over the routes."""
        c, m = self.config, self.config.groups_per_chunk
        b, _, hq, d = self.q.shape
        hkv = self.histories[0].k.shape[2]
        row = 2 * d  # bytes of one key
        total = 0
        everything = HGAConfig(**{**_fields(c), "topk_groups": c.topk_chunks * m})
        for i, routes in enumerate(self.routes):
            history = self.histories[i % len(self.histories)]
            picked = hga_route(
                self.q,
                history.chunk_keys,
                history.group_keys,
                everything,
                positions=self.positions,
                super_keys=history.super_keys,
            )
            for x in range(b):
                p = int(self.positions[x, 0])
                n = p // c.chunk_size
                near = min(c.keep_first, n) + min(c.keep_last, max(0, n - c.keep_first))
                first, last = min(c.keep_first, n), max(c.keep_first, n - c.keep_last)
                total += row * (
                    hkv * (n - near) if history.super_keys is None else self._searched(history, x, first, last)
                )
                total += hkv * (near * c.chunk_size + p % c.chunk_size + 1) * 2 * row
                for g in range(hkv):
                    heads = slice(g * (hq // hkv), (g + 1) * (hq // hkv))
                    total += _distinct(picked[x, 0, heads]) * row
                    total += _distinct(routes[x, 0, heads]) * c.group_size * 2 * row
        return total // len(self.routes)

    def reading(self) -> tuple[Callable[[], object], int]:
        """A loop that reads what a step reads of keys and values, step after step, and its bytes, mean over the steps.

        One row, strict budgets without super-chunks; the last query of the history.
        """
        c, d = self.config, self.q.shape[-1]
        r, hkv = self.q.shape[2] // self.histories[0].k.shape[2], self.histories[0].k.shape[2]
        group = torch.arange(self.histories[0].k.shape[1] // c.group_size)
        steps = []
        for i in range(max(len(self.histories), len(self.routes))):
            history, routes = self.histories[i % len(self.histories)], self.routes[i % len(self.routes)]
            own = int(self.positions[0, 0]) // c.chunk_size
            first, last = c.keep_first * c.groups_per_chunk, (own - c.keep_last) * c.groups_per_chunk
            runs = []
            for g in range(hkv):
                # chunk keys of the pool, as many of them to a run as tokens to a group
                table = torch.arange(c.keep_first // c.group_size, (own - c.keep_last) // c.group_size)
                runs.append(_runs(history.chunk_keys, g, table * c.group_size))
                opened = routes[0, 0, g * r : (g + 1) * r].unique()
                near = group[(group < first) | (group >= last)]
                seen = torch.cat((near, opened[opened >= 0].long())) * c.group_size
                runs.append(torch.stack([_runs(x, g, seen) for x in (history.k, history.v)], 1).flatten())
            steps.append(torch.cat(runs))
        size = c.group_size * d * self.q.element_size()
        where, turn = _native.execution(), itertools.cycle(steps)
        library = _native.library()
        return lambda: library.ceiling_read_runs(next(turn), size, *where), size * sum(map(len, steps)) // len(steps)

    def _searched(self, history: History, x: int, first: int, last: int) -> int:
        """Keys of super-chunks and chunks that row x scores in the pool [first, last), each once per kv head."""
        assert history.super_keys is not None
        size, hkv = self.config.super_chunk, history.k.shape[2]
        begin, end = -(-first // size), last // size
        keys = history.super_keys[x, begin:end].float()
        q = self.q[x, 0].float().unflatten(0, (hkv, -1))
        best = torch.einsum("grd,sgd->grs", q, keys).topk(min(self.config.topk_supers, end - begin)).indices
        survivors = sum(_distinct(best[g]) for g in range(hkv))
        return hkv * (end - begin + last - first - (end - begin) * size) + survivors * size

    def checked(self) -> dict[str, Any]:
        """The heads of the first kv head against float64."""
        history, routes = self.histories[0], self.routes[0]
        r = self.q.shape[2] // history.k.shape[2]
        out = self.attend(history, routes)[:, :, :r]
        part = Step([history], [routes], self.positions, self.config, self.q[:, :, :r])
        small = _heads(history, 1)
        plain = part.attend(small, routes[:, :, :r], "reference")
        part.q = part.q.double()
        truth = part.attend(_wide(small), routes[:, :, :r], "reference")
        return check([truth], [plain], [out], out.dtype)


def _runs(x: Tensor, head: int, tokens: Tensor) -> Tensor:
    """int64 [n], addresses of ``tokens`` [n] of a head of row 0 of x [B, S, H, D], whose tokens lie side by side."""
    assert x.stride(1) == x.shape[-1] and x.stride(-1) == 1
    return x.data_ptr() + (head * x.stride(2) + tokens * x.stride(1)) * x.element_size()


def _fields(config: HGAConfig) -> dict[str, Any]:
    return {n: getattr(config, n) for n in config.__dataclass_fields__}


def _distinct(ids: Tensor) -> int:
    return len(set(ids[ids >= 0].tolist()))


def _heads(history: History, count: int) -> History:
    part = object.__new__(History)
    for name in ("k", "v", "chunk_keys"):
        setattr(part, name, getattr(history, name)[:, :, :count])
    part.super_keys = None
    part.group_keys = history.group_keys[:, :, :, :count]
    return part


def _wide(history: History) -> History:
    part = object.__new__(History)
    for name in ("k", "v", "chunk_keys", "group_keys"):
        setattr(part, name, getattr(history, name).double())
    part.super_keys = None
    return part


def disjoint(layer: Layer, b: int, s: int, config: HGAConfig, seed: int) -> Tensor:
    """int32 [B, 1, Hq, topk_groups]: whole sets of picked chunks that no two query heads of a kv head share."""
    g = torch.Generator().manual_seed(seed)
    first, last = config.keep_first, s // config.chunk_size - config.keep_last - 1
    r, m, kc = layer.hq // layer.hkv, config.groups_per_chunk, config.topk_chunks
    found = torch.empty(b, 1, layer.hq, config.topk_groups, dtype=torch.int32)
    for x in range(b):
        for head in range(layer.hkv):
            chunks = torch.randperm(last - first, generator=g)[: r * kc].view(r, kc) + first
            inside = (chunks[..., None] * m + torch.arange(m)).flatten(1)
            for i in range(r):
                at = torch.randperm(kc * m, generator=g)[: config.topk_groups]
                found[x, 0, head * r + i] = inside[i, at].sort().values.int()
    return found


def kept_routes(config: HGAConfig, length: int, count: int) -> list[Tensor]:
    """Routes [1, count, heads, topk_groups] of the last bytes of a text, per layer of the shipped model."""
    model = ByteLM.load()
    ids = windows(held_out_streams(model.record["data"]["held_out"]), length, 1)[0].ids
    rope = rope_of(model)
    kept: list[Tensor] = []

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        routes = hga_attention(q[:, -count:], k, v, config, rope=rope, return_routes=True).routes
        assert routes is not None
        kept.append(routes)
        return dense_causal(i, q, k, v)

    with torch.no_grad():
        model.nll(ids, attend)
    return kept


def replayed(layer: Layer, b: int, config: HGAConfig, length: int, count: int) -> list[Tensor]:
    """Routes of the last ``count`` bytes of a text of ``length`` bytes, as the shipped model opens them in turn."""
    model, kept = ByteLM.load(), kept_routes(config, length, count)
    theirs = model.config.num_key_value_heads
    ratio = model.config.num_attention_heads // theirs
    r = layer.hq // layer.hkv
    # query head i of kv head g takes after query head i (mod) of the model's kv head g (mod)
    heads = [(g % theirs) * ratio + i % ratio for g in range(layer.hkv) for i in range(r)]
    return [kept[i % len(kept)][:, i : i + 1, heads].expand(b, -1, -1, -1).contiguous() for i in range(count)]


def dense_forms(histories: list[History], q: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The three ways to say dense decode in PyTorch, each on the next layer when called again."""
    b, _, hq, d = q.shape
    hkv = histories[0].k.shape[2]
    heads = q.transpose(1, 2)
    rows = q.view(b, hkv, hq // hkv, d)
    kv = [(h.k.transpose(1, 2), h.v.transpose(1, 2)) for h in histories]
    # expanded K and V are given for free; two layers of them are as cold as eight
    wide = [tuple(x.repeat_interleave(hq // hkv, 1) for x in pair) for pair in kv[:2]]
    turn = {"x": 0}

    def step(of: list[Any], query: Tensor, **options: Any) -> Tensor:
        turn["x"] += 1
        k, v = of[turn["x"] % len(of)]
        return F.scaled_dot_product_attention(query, k, v, **options)

    return {
        "dense, enable_gqa": functools.partial(step, kv, heads, enable_gqa=True),
        "dense, expanded": functools.partial(step, wide, heads),
        "dense, heads as rows": functools.partial(step, kv, rows),
    }


def _row(name: str, note: str, checked: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "note": note, "sides": {OURS: dict(checked)}}


def _timed(
    row: dict[str, Any], calls: Mapping[str, Callable[[], object]], rounds: int, steps: int = 1
) -> dict[str, Any]:
    """Times of all sides that may have one; fewer rounds of other sides that take seconds.

    steps: calls of ours in one timing, as one token of a model makes them, one layer after the other.
    """

    def repeated(call: Callable[[], object]) -> None:
        for _ in range(steps):
            call()

    if not row["sides"][OURS]["correct"]:
        calls = {n: c for n, c in calls.items() if n != OURS}
    ours = {n for n in calls if n.startswith((OURS, READING))} if steps > 1 else set()
    run = {n: functools.partial(repeated, c) if n in ours else c for n, c in calls.items()}
    for name, times in alternate(run, rounds, {n for n in calls if n != OURS}).items():
        times = [x / steps for x in times] if name in ours else times
        row["sides"].setdefault(name, {"correct": None})
        row["sides"][name] |= spread(times) | {"rounds": len(times)}
    return row


def _rates(row: dict[str, Any], size: int, ceilings: dict[str, Any]) -> dict[str, Any]:
    ours, read = row["sides"][OURS], ceilings.get("read_bytes_per_s")
    row["bytes"] = size
    if "median_s" in ours:
        ours["bytes_per_s"] = size / ours["median_s"]
        ours["read_share"] = ours["bytes_per_s"] / read if read else None
    if READING in row["sides"]:
        side = row["sides"][READING]
        side["bytes_per_s"] = row["reading_bytes"] / side["median_s"]
        side["read_share"] = side["bytes_per_s"] / read if read else None
    others = [s["median_s"] for n, s in row["sides"].items() if n.startswith("dense") and "median_s" in s]
    if others and "median_s" in ours:
        row["speedup"] = min(others) / ours["median_s"]
    return row


def decode_rows(sizes: Sizes, rounds: int, ceilings: dict[str, Any]) -> list[dict[str, Any]]:
    """Cold decode at sizes.cached with both kinds of routes, beside dense decode."""
    config, layer, s = HGAConfig(), sizes.layer, sizes.cached
    rope = Rope.from_theta(1e6, layer.d)
    histories = [History(layer, 1, s, config, rope, seed) for seed in range(LAYERS)]
    q = torch.randn(1, 1, layer.hq, layer.d, generator=torch.Generator().manual_seed(99)).bfloat16()
    at = torch.full((1, 1), s - 1)
    kinds = {
        "disjoint": [disjoint(layer, 1, s, config, seed) for seed in range(LAYERS)],
        "replayed": replayed(layer, 1, config, min(sizes.trace, s), LAYERS),
    }
    forms = dense_forms(histories, q)
    found = []
    for kind, routes in kinds.items():
        step = Step(histories, routes, at, config, q)
        row = _row(f"decode, {s} cached, {kind} routes", "one query, 8 layers in turn", step.checked())
        sides: dict[str, Callable[[], object]] = {OURS: step, "hici_kernels, routing alone": step.route}
        if _native.status() is None:
            sides[READING], row["reading_bytes"] = step.reading()
        sides |= forms if kind == "disjoint" else {}
        found.append(_rates(_timed(row, sides, rounds, LAYERS), step.bytes(), ceilings))
    fastest = [n for n, side in found[0]["sides"].items() if n.startswith("dense")]
    for row in found[1:]:
        row["sides"] |= {n: found[0]["sides"][n] for n in fastest}
        _rates(row, row["bytes"], ceilings)
    return found


def far_row(sizes: Sizes, rounds: int, ceilings: dict[str, Any], config: HGAConfig) -> dict[str, Any]:
    """The same step after sizes.far tokens."""
    layer, s = sizes.layer, sizes.far
    history = History(layer, 1, s, config, Rope.from_theta(1e6, layer.d), 0)
    q = torch.randn(1, 1, layer.hq, layer.d, generator=torch.Generator().manual_seed(99)).bfloat16()
    routes = [disjoint(layer, 1, s, config, seed) for seed in range(LAYERS)]
    step = Step([history], routes, torch.full((1, 1), s - 1), config, q)
    kind = f"super-chunks of {config.super_chunk}" if config.super_chunk else "full scan"
    row = _row(f"decode, {s} cached, {kind}", "one query, one layer, other groups at every step", step.checked())
    sides: dict[str, Callable[[], object]] = {OURS: step, "hici_kernels, routing alone": step.route}
    return _rates(_timed(row, sides, rounds, LAYERS), step.bytes(), ceilings)


def recall(length: int, config: HGAConfig, count: int = 64) -> float:
    """Share of the groups that the full scan opens which super-chunks open too, on a text read by the shipped model.

    Chunks and groups of a quarter of the default make as many chunks of a text that the model can read
    as a far longer one has.
    """
    fields = _fields(config) | {"chunk_size": config.chunk_size // 4, "group_size": config.group_size // 4}
    fields["topk_supers"] = max(1, length // fields["chunk_size"] // config.super_chunk // 4)
    some, every = (kept_routes(HGAConfig(**fields | x), length, count) for x in ({}, {"super_chunk": 0}))
    pairs = [
        (a, b) for x, y in zip(some, every, strict=True) for a, b in zip(x.flatten(0, 2), y.flatten(0, 2), strict=True)
    ]
    shared = [len({*a.tolist()} & {*b.tolist()}) / len({*b.tolist()}) for a, b in pairs]
    return sum(shared) / len(shared)


def batch_row(sizes: Sizes, rounds: int, ceilings: dict[str, Any]) -> dict[str, Any]:
    """sizes.batch rows of different lengths in one call, beside one call a row of the reference operations and of dense
    SDPA."""
    config, layer, s, b = HGAConfig(), sizes.layer, sizes.cached // 4, sizes.batch
    histories = [History(layer, b, s, config, Rope.from_theta(1e6, layer.d), seed) for seed in range(2)]
    q = torch.randn(b, 1, layer.hq, layer.d, generator=torch.Generator().manual_seed(98)).bfloat16()
    at = torch.tensor([[s - 1 - x * s // (2 * b)] for x in range(b)])
    shortest = int(at.min()) + 1
    step = Step(histories, [disjoint(layer, b, shortest, config, seed) for seed in range(2)], at, config, q)

    def alone(impl: str) -> None:
        history, routes = step.next()
        for x in range(b):
            end = int(at[x, 0]) + 1
            row = object.__new__(History)
            row.k, row.v = history.k[x : x + 1, :end], history.v[x : x + 1, :end]
            row.super_keys = None
            row.chunk_keys, row.group_keys = history.chunk_keys[x : x + 1], history.group_keys[x : x + 1]
            one = Step([row], [routes[x : x + 1]], at[x : x + 1], config, q[x : x + 1])
            one(impl)

    def dense() -> None:
        history, _ = step.next()
        for x in range(b):
            end = int(at[x, 0]) + 1
            k, v = (y[x : x + 1, :end].transpose(1, 2) for y in (history.k, history.v))
            F.scaled_dot_product_attention(q[x : x + 1].view(1, layer.hkv, -1, layer.d), k, v)

    row = _row(
        f"decode, batch {b}, {shortest} to {s} cached", "rows of different lengths, 2 layers in turn", step.checked()
    )
    sides: dict[str, Callable[[], object]] = {
        OURS: step,
        **({"hici_kernels, row by row": functools.partial(alone, "cpu")} if _native.status() is None else {}),
        "plain PyTorch (reference), row by row": functools.partial(alone, "reference"),
        "dense, heads as rows, row by row": dense,
    }
    row = _rates(_timed(row, sides, rounds), step.bytes(), ceilings)
    times = row["sides"]
    if "median_s" in times[OURS]:
        row["over_plain"] = times["plain PyTorch (reference), row by row"]["median_s"] / times[OURS]["median_s"]
    return row


def prefill_rows(sizes: Sizes) -> list[dict[str, Any]]:
    """A whole text at once: strict and block routing beside causal SDPA, whose faster form at a quarter is taken."""
    layer, s = sizes.layer, sizes.prefill
    g = torch.Generator().manual_seed(97)
    q, k, v = (torch.randn(1, s, h, layer.d, generator=g).bfloat16() for h in (layer.hq, layer.hkv, layer.hkv))
    rope, r = Rope.from_theta(1e6, layer.d), layer.hq // layer.hkv

    def dense(n: int, expanded: bool) -> Tensor:
        a, b, c = (x[:, :n].transpose(1, 2) for x in (q, k, v))
        if expanded:
            b, c = (x.repeat_interleave(r, 1) for x in (b, c))
        return F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=not expanded)

    tried = {x: min(alternate({"x": functools.partial(dense, s // 4, x)}, 3, {"x"}, {})["x"]) for x in (False, True)}
    expanded = tried[True] < tried[False]
    name = f"dense causal, {'expanded' if expanded else 'enable_gqa'}"
    began = time.perf_counter()
    dense(s, expanded)
    once = spread([time.perf_counter() - began]) | {"rounds": 1, "correct": None}  # it may take minutes
    found = []
    for routing in ("strict", "block"):
        config = HGAConfig(routing=routing)
        whole = hga_attention(q, k, v, config, rope=rope, return_routes=True)
        assert whole.routes is not None
        last = slice(s - 64, s)
        given = (rope.inv_freq, None, None, whole.routes[:, last, :r].contiguous(), config.group_size, *budgets(config))
        part = (q[:, last, :r], k[:, :, :1], v[:, :, :1])
        plain = attention_forward(*part, *given, layer.d**-0.5, "reference")[0]
        truth = attention_forward(*(x.double() for x in part), *given, layer.d**-0.5, "reference")[0]
        row = _row(f"prefill, {s} tokens, {routing}", "last 64 queries of one kv head compared", {})
        row["sides"][OURS] = check([truth], [plain], [whole.out[:, last, :r]], q.dtype)
        ours = functools.partial(hga_attention, q, k, v, config, rope=rope)
        found.append(_timed(row, {OURS: ours}, 3))
    for row in found:
        row["sides"][name] = once
        if "median_s" in row["sides"][OURS]:
            row["speedup"] = row["sides"][name]["median_s"] / row["sides"][OURS]["median_s"]
    return found


def measure(rounds: int, ceilings: dict[str, Any], sizes: Sizes | None = None) -> list[dict[str, Any]]:
    """All rows of the suite."""
    sizes = sizes or Sizes()

    def with_supers() -> list[dict[str, Any]]:
        return [far_row(sizes, rounds, ceilings, SUPERS) | {"recall": recall(sizes.trace, SUPERS)}]

    parts: list[Callable[[], list[dict[str, Any]]]] = [
        lambda: decode_rows(sizes, rounds, ceilings),
        lambda: [far_row(sizes, rounds, ceilings, HGAConfig())],
        with_supers,
        lambda: [batch_row(sizes, rounds, ceilings)],
        lambda: prefill_rows(sizes),
    ]
    with torch.no_grad():
        return [row for part in progress(parts, "measuring") for row in part()]


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per goal: text, value, needed, unit, verdict."""
    disjoint_, replayed_, _, far, batch, strict, block = rows

    def seconds(row: dict[str, Any]) -> float | None:
        return row["sides"][OURS].get("median_s")

    near, away = seconds(disjoint_), seconds(far)
    wanted: list[tuple[str, float | None, float | None, str, bool]] = []
    for row in (disjoint_, replayed_):
        wanted.append((f"{row['name']}: read bandwidth", row["sides"][OURS].get("read_share"), 0.65, "share", False))
        wanted.append((f"{row['name']}: over the fastest dense", row.get("speedup"), 40.0, "x", False))
    wanted.append((f"{far['name']}: over {disjoint_['name']}", away / near if away and near else None, 2.0, "x", True))
    wanted.append((f"{batch['name']}: over plain PyTorch, row by row", batch.get("over_plain"), 6.0, "x", False))
    wanted.append((f"{strict['name']}: over dense", strict.get("speedup"), 3.0, "x", False))
    wanted.append((f"{block['name']}: over dense", block.get("speedup"), 6.0, "x", False))
    wanted.append(
        (f"{far['name']}: recall of the full scan on text, a quarter kept", far.get("recall"), None, "share", False)
    )
    found = []
    for text, value, needed, unit, most in wanted:
        if value is None:
            verdict = "not measured"
        elif needed is None:
            verdict = "reported"
        else:
            verdict = "reached" if (value <= needed if most else value >= needed) else "missed"
        entry = {"goal": text, "value": value, "needed": needed, "aim": None, "unit": unit, "at_most": most}
        found.append(entry | {"verdict": verdict, "note": ""})
    return found


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Every side of every row."""
    table = Table(
        "case", "side", "median [fastest, slowest] ms", "GB/s", "of read", title="routed attention, one layer"
    )
    for row in rows:
        for name, side in row["sides"].items():
            if "median_s" not in side:
                table.add_row(row["name"], name, "WRONG" if side["correct"] is False else "-", "", "")
                continue
            middle, low, high = (1e3 * side[x] for x in ("median_s", "fastest_s", "slowest_s"))
            rate = f"{side['bytes_per_s'] / 1e9:.1f}" if "bytes_per_s" in side else ""
            share = f"{100 * side['read_share']:.0f} %" if side.get("read_share") else ""
            table.add_row(row["name"], name, f"{middle:.3g} [{low:.3g}, {high:.3g}]", rate, share)
    console.print(table, markup=False)
