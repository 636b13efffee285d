"""KVStore on disk: reading beside a bare reader, decode steps beside all-in-memory, bytes beside the limits.

A Qwen3-8B layer (32/8 heads, D 128, bfloat16): a page (64 keys and values of one kv head) is 32 KiB, a record 256 KiB.
The history is random numbers written through the store's own tier. A decode step is a whole call of the store; its
routing runs over tables of random numbers, and what is attended are routes that are given, so that the steps of all
tiers do the same work:

    replayed   those of the model shipped with the demo, one byte of a text after another; heads mapped cyclically,
               layers in turn
    disjoint   every step opens groups at random, no two query heads the same

Host memory of the tier "disk" is a sixteenth of the history. "fetching" is the time a step spends in the tier. Dense
decode is the fastest of three ways to say it in PyTorch (see hga_layer), over two such layers in turn.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .._outputs import progress
from ..config import HGAConfig
from ..demo.lm import ByteLM
from ..kv import KVStore, in_place, step
from ..kv.records import Records
from ..rope import Rope
from .hga_layer import QWEN3_8B, TRACE, dense_forms, kept_routes
from .machine import spread
from .run import alternate
from .shapes import Layer, drawn

DEPTH = 32
STAGES = ("size", "reading", "steps", "parts", "memory", "dense", "growth", "cold")
WARM = 3  # steps before the first that counts
REQUEST = 512  # pages: what 32 query heads that agree in nothing open in one step of a layer


class Size(NamedTuple):
    """What is measured; ``share`` of the history is the host memory of the tier "disk", and ``growth`` times as long is
    the history whose memory is looked at."""

    layer: Layer
    layers: int
    tokens: int
    reads: int
    steps: int
    share: int = 16
    growth: int = 16
    dtype: torch.dtype = torch.bfloat16


FULL = Size(QWEN3_8B, 8, 65536, 4096, 15)
TEST = Size(Layer("tiny", 64, 4, 2, 16), 2, 4096, 64, 3, growth=4)


def sizes(suite: str) -> list[Size]:
    """What a suite measures; nothing where there is no native library."""
    return [FULL] if suite == "hga" and _native.status() is None else []


def measure(size: Size = FULL, directory: str | None = None, rounds: int = 7) -> dict[str, Any]:
    """All rows; ``directory`` on the disk to be measured, default the system's for temporary files.

    Raises:
        ImplError: no native library.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=directory) as path, torch.no_grad():
        for name, value in progress(_measured(size, path, rounds), "history on disk", total=len(STAGES)):
            found[name] = value
    return found


def _measured(size: Size, path: str, rounds: int) -> Iterator[tuple[str, Any]]:
    """The results by the names in STAGES, in that order."""
    torch.manual_seed(0)
    with _filled(size, "disk", path) as far:
        yield "size", _described(size, far)
        yield "reading", _reading(far, size, rounds)
        with _filled(size, "host", None) as near:
            trace = _trace(size)
            kinds = ("replayed", "replayed, no prefetch", "disjoint")
            yield "steps", [_steps(near, far, size, routes, trace) for routes in kinds]
            yield "parts", _parts(near, size, trace)
        yield "memory", _memory(far)
    yield "dense", _dense(size, rounds)
    yield "growth", _growth(size, path)
    yield "cold", _cold(size)


def goals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals, each with its number."""
    reading, replayed, disjoint = found["reading"], found["steps"][0], found["steps"][-1]
    memory, growth = found["memory"], found["growth"]
    over = max(memory["peak_bytes"][t] / memory["limits"][t] for t in ("device", "host"))
    dense = min(x["median_s"] for x in found["dense"].values())
    rows: list[tuple[str, float, float, bool]] = [
        ("disk tier: share of what a bare reader reads", statistics.median(reading["share"]), 0.85, False),
        (
            "decode step, disk over all in memory, replayed routes",
            replayed["disk"]["median_s"] / replayed["host"]["median_s"],
            2.0,
            True,
        ),
        ("peak bytes over their limit", max(over, *(g["over"] for g in growth)), 1.0, True),
        ("bytes but for key tables, longest over shortest history", growth[-1]["rest"] / growth[0]["rest"], 1.1, True),
    ]
    rows += [
        (f"decode step in memory, {x['routes']} routes: dense over ours", dense / x["host"]["median_s"], 40.0, False)
        for x in (replayed, disjoint)
    ]
    return [{"goal": text, "value": value, "needed": needed, "at_most": most} for text, value, needed, most in rows]


def show(print_: Callable[[str], object], found: dict[str, Any]) -> None:
    """The rows as text."""
    print_(f"KVStore: {found['size']['text']}")
    r = found["reading"]
    low, high = min(r["share"]), max(r["share"])
    print_(
        f"reading {r['pages']} pages of {r['page_bytes']} bytes at random, {r['depth']} in flight, {r['backend']}, "
        f"{'direct' if r['direct'] else 'buffered'}: bare reader {_rate(r['bare'])}, the same by threads "
        f"{_rate(r['threads'])}, through the tier with checksums and bank {_rate(r['tier'])}: "
        f"{100 * statistics.median(r['share']):.0f} % ({low * 100:.0f} to {high * 100:.0f}) of the bare reader"
    )
    for s in found["steps"]:
        parts = [
            f"{tier} {1e3 * s[tier]['median_s']:.2f} ms ({1e3 * s[tier]['fastest_s']:.2f} to "
            f"{1e3 * s[tier]['slowest_s']:.2f}; fetching {1e3 * s[tier]['fetching_s']:.2f})"
            for tier in ("host", "disk")
        ]
        ratio = s["disk"]["median_s"] / s["host"]["median_s"]
        print_(
            f"decode step of a layer, {s['routes']} routes: {', '.join(parts)}: {ratio:.2f} x; {s['pages']:.0f} pages "
            f"each, hit rate {100 * s['hit_rate']:.1f} %, same bits: {s['equal']}"
        )
    made_of = ", ".join(f"{name} {1e6 * x['median_s']:.0f}" for name, x in found["parts"].items())
    print_(f"a step in memory by part, replayed routes, median microseconds: {made_of}")
    dense_ = ", ".join(
        f"{name.removeprefix('dense, ')} {1e3 * x['median_s']:.1f} ms" for name, x in found["dense"].items()
    )
    print_(f"dense decode over the same history: {dense_}")
    for g in found["growth"]:
        print_(
            f"{g['tokens']} tokens of a layer: tables {g['tables'] / 1e6:.1f} MB, the rest {g['rest'] / 1e6:.2f} MB "
            f"(lists of records and pages {g['lists'] / 1e6:.2f}), peak {100 * g['over']:.0f} % of the limits"
        )
    m = found["memory"]
    for tier in ("device", "host"):
        print_(f"{tier} memory: peak {m['peak_bytes'][tier] / 1e6:.1f} MB, limit {m['limits'][tier] / 1e6:.1f} MB")
    c = found["cold"]
    print_(
        f"8-bit records: {c['bytes']} bytes a page for {c['exact_bytes']}; error of attention over all groups, normal "
        f"numbers: largest {c['error_max']:.1e}, mean {c['error_mean']:.1e}; exact records {c['exact_error_max']:.1e}"
    )
    for g in goals(found):
        sign = "<=" if g["at_most"] else ">="
        reached = g["value"] <= g["needed"] if g["at_most"] else g["value"] >= g["needed"]
        verdict = "reached" if reached else "missed"
        print_(f"goal {g['goal']}: {g['value']:.2f}, needed {sign} {g['needed']:.2f}: {verdict}")


def _rate(times: dict[str, float]) -> str:
    return f"{times['gb_per_s']:.2f} GB/s"


def _config() -> HGAConfig:
    return HGAConfig()


def _make(size: Size, tier: str, path: str | None, **more: Any) -> KVStore:
    layer, config = size.layer, _config()
    history = size.layers * size.tokens * layer.hkv * layer.d * 2 * size.dtype.itemsize
    if tier == "disk" and "host_bytes" not in more:
        # tables, sinks and windows, and the scratch of a step
        tables = size.layers * (size.tokens // config.chunk_size) * layer.hkv * layer.d * size.dtype.itemsize
        more |= {"host_bytes": history // size.share, "device_bytes": 16 * tables + (64 << 20)}
    if tier == "disk":
        more |= {"path": path, "queue_depth": DEPTH}
    return KVStore(
        config,
        rope=Rope.from_theta(1e6, layer.d),
        layers=size.layers,
        kv_heads=layer.hkv,
        head_dim=layer.d,
        dtype=size.dtype,
        device="cpu",
        tier=tier,
        **more,
    )


@contextlib.contextmanager
def _filled(size: Size, tier: str, path: str | None, **more: Any) -> Iterator[KVStore]:
    """A store of ``tokens`` random tokens in every layer, without the attention that would have put them there."""
    store = _make(size, tier, path, **more)
    with store:
        for number in range(size.layers):
            _fill(store, size, number, size.tokens)
        assert store.lengths.tolist() == [size.tokens] and store.config.keep_first
        yield store


def _fill(store: KVStore, size: Size, number: int, tokens: int) -> None:
    """Append random tokens to a layer: blocks of 4096, drawn anew 16 times and then again from the first."""
    layer = size.layer
    held = step.route_forward, step.attention_forward, step.summaries_forward
    try:
        # what is appended does not depend on what is attended, and routes are given later
        step.route_forward, step.attention_forward = _no_routes, _no_attention
        step.summaries_forward = _no_summaries
        blocks: list[list[Tensor]] = []
        for i in range(tokens // 4096):
            if len(blocks) < 16:
                seeds = (1000 * number + 2 * i, 1000 * number + 2 * i + 1)
                blocks.append([drawn(size.dtype, x, 1, 4096, layer.hkv, layer.d) for x in seeds])
            k, v = blocks[i % 16]
            store.attend(number, k.repeat_interleave(layer.hq // layer.hkv, 2), k, v)
    finally:
        step.route_forward, step.attention_forward, step.summaries_forward = held
    generator = torch.Generator().manual_seed(number)
    for name in ("chunk_keys", "group_keys"):
        store._layers[number].buffers[name].normal_(generator=generator)


def _no_routes(q: Tensor, *_: Any) -> Tensor:
    return torch.full((*q.shape[:3], 1), -1, dtype=torch.int32)


def _no_summaries(k: Tensor, _inv_freq: Tensor, _positions: Any, c: int, g: int, *_: Any) -> tuple[Tensor, Tensor]:
    b, s, h, d = k.shape
    return k.new_zeros(b, s // c, h, d), k.new_zeros(b, s // c, c // g, h, d)  # random numbers follow


def _no_attention(q: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    return q, None, None


def _described(size: Size, store: KVStore) -> dict[str, Any]:
    history = size.layers * size.tokens * size.layer.hkv * size.layer.d * 2 * size.dtype.itemsize
    text = (
        f"{size.layers} layers of {size.tokens} tokens, {size.layer.hq}/{size.layer.hkv} heads, D {size.layer.d}, "
        f"{str(size.dtype).removeprefix('torch.')}, {history / 1e9:.2f} GB of history, host memory for 1/{size.share}"
    )
    return {"text": text, "history_bytes": history, "disk_bytes": store.stats()["resident_bytes"]["disk"]}


def _reading(store: KVStore, size: Size, rounds: int) -> dict[str, Any]:
    """Distinct random pages, in requests of REQUEST: a bare reader of the same file, and the tier."""
    assert store._engine is not None
    tier: Any = store._engine.tier
    records: Records = store._engine.records
    file, stride = tier.file, tier.layout.stride
    last = records.end * records.pages
    path = f"/proc/{os.getpid()}/fd/{file.descriptor}"
    library = _native.library()
    times: dict[str, list[float]] = {"bare": [], "threads": [], "tier": []}
    generator = torch.Generator().manual_seed(0)
    count = min(size.reads, last)
    batch = max(1, min(REQUEST, tier.bank.slots))
    for _ in range(rounds + 1):
        pages = torch.randperm(last, generator=generator)[:count]
        parts = pages.split(batch)
        for name, backend in (("bare", file.backend), ("threads", "threads")):
            backend = "threads" if backend == "threads" else "auto"
            seconds = library.read_blocks(path, pages * stride, stride, file.depth, backend, file.direct)
            if seconds < 0:
                raise OSError(int(-seconds), os.strerror(int(-seconds)), file.name)
            times[name].append(seconds)
        tier.bank.drop(pages)
        began = time.perf_counter()
        for part in parts:
            tier._resident(part)
        times["tier"].append(time.perf_counter() - began)
    moved = count * stride
    found: dict[str, Any] = {"pages": count, "page_bytes": stride, "depth": file.depth}
    found |= {"backend": file.backend, "direct": file.direct}
    for name, seconds in times.items():
        found[name] = spread(seconds[1:]) | {"gb_per_s": moved / statistics.median(seconds[1:]) / 1e9}
    best = [min(a, b) for a, b in zip(times["bare"], times["threads"], strict=True)]
    found["share"] = [a / b for a, b in zip(best[1:], times["tier"][1:], strict=True)]
    return found


def _trace(size: Size) -> list[Tensor]:
    """Per layer of the shipped model [1, steps, its heads, Kg]: what it opens at the end of a text, byte after byte."""
    return kept_routes(HGAConfig(), min(TRACE, size.tokens), WARM + size.steps)


class _Routes:
    """Routes [1, 1, Hq, Kg] of a step of one layer after another, the same sequence for every tier."""

    def __init__(self, size: Size, config: HGAConfig, trace: list[Tensor] | None) -> None:
        self.config, self.trace, self.heads = config, trace, size.layer.hq
        self.generator = torch.Generator().manual_seed(5)
        chunks = size.tokens // config.chunk_size - config.keep_first - config.keep_last
        self.pool = chunks * config.groups_per_chunk
        self.mapped = _heads(size.layer, trace[0].shape[2]) if trace else []

    def next(self, layer: int, number: int) -> Tensor:
        if self.trace is not None:
            return self.trace[layer % len(self.trace)][:, number : number + 1, self.mapped].contiguous()
        kg, m = min(self.config.topk_groups, self.pool), self.config.groups_per_chunk
        chunks = torch.rand(self.heads, self.pool // m, generator=self.generator)
        chunks = chunks.topk(min(self.config.topk_chunks, self.pool // m)).indices
        picks = torch.rand(self.heads, chunks.shape[1] * m, generator=self.generator)
        picks = picks.topk(min(kg, picks.shape[1])).indices
        ids = chunks.gather(1, picks // m) * m + picks % m + self.config.keep_first * m
        return ids.sort(-1).values[None, None].int()


def _heads(layer: Layer, theirs: int) -> list[int]:
    """Query heads of the shipped model (two kv heads) that those of the layer take after, kv heads after kv heads."""
    model = ByteLM.load().config
    ratio, r = theirs // model.num_key_value_heads, layer.hq // layer.hkv
    return [(g % model.num_key_value_heads) * ratio + i % ratio for g in range(layer.hkv) for i in range(r)]


@contextlib.contextmanager
def _given(routes: Tensor) -> Iterator[None]:
    """Routing runs, and these are attended."""
    plain = step.route_forward

    def route(*arguments: Any) -> Tensor:
        plain(*arguments)
        return routes

    step.route_forward = route
    try:
        yield
    finally:
        step.route_forward = plain


def _token(size: Size, number: int) -> list[Tensor]:
    layer = size.layer
    return [
        drawn(size.dtype, 99 + 3 * number + i, 1, 1, h, layer.d) for i, h in enumerate((layer.hq, *[layer.hkv] * 2))
    ]


def _steps(near: KVStore, far: KVStore, size: Size, routes: str, trace: list[Tensor]) -> dict[str, Any]:
    """Steps of one token through all layers, tier after tier in every step."""
    far.prefetch = routes != "replayed, no prefetch"
    source = _Routes(size, near.config, None if routes == "disjoint" else trace)
    times: dict[str, list[float]] = {"host": [], "disk": []}
    fetching: dict[str, list[float]] = {"host": [], "disk": []}
    equal, pages = True, 0
    before = far.stats()
    for number in range(WARM + size.steps):
        if number == WARM:
            before, pages = far.stats(), 0
        step_routes = [source.next(i, number) for i in range(size.layers)]
        x = _token(size, number)
        outs: dict[str, list[Tensor]] = {}
        for name, store in (("host", near), ("disk", far)):
            outs[name] = []
            assert store._engine is not None
            with _timed(store._engine.tier) as spent:
                whole = 0.0
                for i, given in enumerate(step_routes):
                    with _given(given):
                        began = time.perf_counter()
                        outs[name].append(store.attend(i, *x))
                        whole += time.perf_counter() - began
                times[name].append(whole / size.layers)
            fetching[name].append(spent[0] / size.layers)
        equal = equal and all(torch.equal(a, b) for a, b in zip(outs["host"], outs["disk"], strict=True))
        pages += sum(len(s.last_pages) for s in far._layers if s.last_pages is not None)
        for store in (near, far):
            store.rewind(size.tokens)
    far.prefetch = True
    after = far.stats()
    hits, misses, ahead = (after[n] - before[n] for n in ("hits", "misses", "prefetched"))
    row: dict[str, Any] = {"routes": routes, "equal": equal, "pages": pages / size.steps / size.layers}
    row |= {"hit_rate": hits / max(1, hits + misses), "prefetched": ahead / size.steps / size.layers}
    for name, seconds in times.items():
        row[name] = spread(seconds[WARM:]) | {"fetching_s": statistics.median(fetching[name][WARM:])}
    return row


def _parts(store: KVStore, size: Size, trace: list[Tensor]) -> dict[str, dict[str, float]]:
    """What a step in memory is made of; the parts overlap in nothing, "the rest" is what they leave of a call."""
    engine: Any = store._engine
    source = _Routes(size, store.config, trace)
    places = {
        "routing": (engine, "_route"),
        "lists of pages": (in_place, "lists"),
        "addresses": (engine.tier, "located"),
        "attention": (in_place, "attend_pages"),
        "appending": (engine, "commit"),
    }
    spent = dict.fromkeys(places, 0.0)
    times: dict[str, list[float]] = {name: [] for name in (*places, "the rest")}

    def measured(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return plain(*arguments, **named)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    held = {name: getattr(*place) for name, place in places.items()}
    try:
        for name, (owner, attribute) in places.items():
            setattr(owner, attribute, measured(name, held[name]))
        for number in range(WARM + size.steps):
            x = _token(size, number)
            for i in range(size.layers):
                with _given(source.next(i, number)):
                    spent.update(dict.fromkeys(places, 0.0))
                    began = time.perf_counter()
                    store.attend(i, *x)
                    whole = time.perf_counter() - began
                if number >= WARM:
                    for name, seconds in spent.items():
                        times[name].append(seconds)
                    times["the rest"].append(whole - sum(spent.values()))
            store.rewind(size.tokens)
    finally:
        for name, (owner, attribute) in places.items():
            setattr(owner, attribute, held[name])
    return {name: spread(seconds) for name, seconds in times.items()}


class _Dense(NamedTuple):
    k: Tensor
    v: Tensor


def _dense(size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """The forms of dense decode in PyTorch over ``tokens``, two layers in turn."""
    layer = size.layer
    part = min(size.tokens, 4096)
    histories: list[Any] = [
        _Dense(
            *(
                drawn(size.dtype, i + j, 1, layer.hkv, part, layer.d)
                .repeat(1, 1, size.tokens // part, 1)
                .transpose(1, 2)
                for j in range(2)
            )
        )
        for i in (0, 2)
    ]
    forms: dict[str, Callable[[], object]] = dict(dense_forms(histories, _token(size, 0)[0]))
    return {name: spread(times) for name, times in alternate(forms, rounds, set()).items()}


@contextlib.contextmanager
def _timed(tier: Any) -> Iterator[list[float]]:
    """Seconds spent in ``tier.located``."""
    spent, plain = [0.0], tier.located

    def located(pages: Tensor) -> Tensor | None:
        began = time.perf_counter()
        found: Tensor | None = plain(pages)
        spent[0] += time.perf_counter() - began
        return found

    tier.located = located
    try:
        yield spent
    finally:
        del tier.located


def _growth(size: Size, path: str) -> list[dict[str, Any]]:
    """Bytes of one layer on disk as its history grows, under limits of everything but the tables."""
    one = size._replace(layers=1)
    layer, config = size.layer, _config()
    token = layer.hkv * layer.d * size.dtype.itemsize
    tables = size.tokens * size.growth // config.chunk_size * (1 + config.groups_per_chunk) * token
    # an eighth is kept for lists: 12 bytes a page, and as much again while they are enlarged
    pages = size.tokens * size.growth // config.chunk_size * layer.hkv
    host = max(size.tokens * 2 * token // size.share, 1 << 20) + 8 * 36 * pages
    store = _make(one, "disk", path, host_bytes=host, device_bytes=4 * tables + (64 << 20))
    found = []
    with store:
        total = 0
        for tokens in (size.tokens, size.tokens * size.growth // 4, size.tokens * size.growth):
            _fill(store, one, 0, tokens - total)
            total = tokens
            stats, state = store.stats(), store._layers[0]
            limits = {"device": store.device_bytes or 1, "host": store.host_bytes or 1}
            tables = sum(state.buffers[n].nbytes for n in ("chunk_keys", "group_keys"))
            lists = store._meter.get("host", "lists") + store._meter.get("host", "records list") + state.records.nbytes
            resident = sum(stats["resident_bytes"][t] for t in ("device", "host"))
            row = {"tokens": tokens, "tables": tables, "lists": lists, "rest": resident - tables}
            found.append(row | {"over": max(stats["peak_bytes"][t] / limits[t] for t in limits)})
    return found


def _memory(store: KVStore) -> dict[str, Any]:
    stats = store.stats()
    limits = {"device": store.device_bytes, "host": store.host_bytes}
    return {"limits": limits, "peak_bytes": stats["peak_bytes"], "resident_bytes": stats["resident_bytes"]}


def _cold(size: Size) -> dict[str, Any]:
    """Attention over every group of a short history, records in 8 bits and exact, against float64."""
    config = HGAConfig(keep_first=0, keep_last=0, topk_chunks=64, topk_groups=64)
    layer, tokens = size.layer, 512
    q, k, v = (drawn(size.dtype, i, 1, tokens, h, layer.d) for i, h in enumerate((layer.hq, layer.hkv, layer.hkv)))
    a, b, c = (x.double().transpose(1, 2) for x in (q, k, v))
    truth = torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True).transpose(1, 2)
    found: dict[str, Any] = {}
    for name, cold in (("exact_", None), ("", torch.int8)):
        with KVStore(
            config,
            rope=Rope.from_theta(1e6, layer.d),
            layers=1,
            kv_heads=layer.hkv,
            head_dim=layer.d,
            dtype=size.dtype,
            device="cpu",
            cold_dtype=cold,
        ) as store:
            store.attend(0, q[:, :-64], k[:, :-64], v[:, :-64])
            wrong = (store.attend(0, q[:, -64:], k[:, -64:], v[:, -64:]).double() - truth[:, -64:]).abs()
            assert store._engine is not None
            found[f"{name}bytes"] = store._engine.layout.page_bytes
        found[f"{name}error_max"], found[f"{name}error_mean"] = float(wrong.max()), float(wrong.mean())
    return found
