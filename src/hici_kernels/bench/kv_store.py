"""KVStore on disk: reading beside a bare reader, decode steps beside all-in-memory, bytes beside the limits.

A Qwen3-8B layer (32/8 heads, D 128, bfloat16): a page (64 keys and values of one kv head) is 32 KiB, a record 256 KiB.
The history is random numbers written through the store's own tier; routes of a decode step are given, so that the steps
of all tiers do the same work:

    repeated   every layer opens the groups it opened before, but for a share CHANGED of them; heads agree in nothing
    disjoint   every step opens groups at random, no two query heads the same

Host memory of the tier "disk" is a sixteenth of the history. "fetching" is the time a step spends in the tier.
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
from ..config import HGAConfig
from ..kv import KVStore, step
from ..kv.records import Records
from ..rope import Rope
from .machine import spread
from .shapes import LLAMA3_8B, Layer, drawn

CHANGED = 0.01
DEPTH = 32
REQUEST = 512  # pages: what 32 query heads that agree in nothing open in one step of a layer


class Size(NamedTuple):
    """What is measured; ``share`` of the history is the host memory of the tier "disk"."""

    layer: Layer
    layers: int
    tokens: int
    reads: int
    steps: int
    share: int = 16
    dtype: torch.dtype = torch.bfloat16


FULL = Size(LLAMA3_8B, 8, 65536, 4096, 15)
TEST = Size(Layer("tiny", 64, 4, 2, 16), 2, 4096, 64, 3)


def sizes(suite: str) -> list[Size]:
    """What a suite measures; nothing where there is no native library."""
    return [FULL] if suite == "hga" and _native.status() is None else []


def measure(size: Size = FULL, directory: str | None = None, rounds: int = 7) -> dict[str, Any]:
    """All rows; ``directory`` on the disk to be measured, default the system's for temporary files.

    Raises:
        ImplError: no native library.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=directory) as path, torch.no_grad():
        with _filled(size, "disk", path) as far:
            found: dict[str, Any] = {"size": _described(size, far), "reading": _reading(far, size, rounds)}
            with _filled(size, "host", None) as near:
                found["steps"] = [
                    _steps(near, far, size, routes) for routes in ("repeated", "repeated, no prefetch", "disjoint")
                ]
            found["memory"] = _memory(far)
        found["cold"] = _cold(size)
    return found


def goals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals, each with its number."""
    reading, repeated = found["reading"], found["steps"][0]
    share = statistics.median(reading["share"])
    ratio = repeated["disk"]["median_s"] / repeated["host"]["median_s"]
    memory = found["memory"]
    over = max(memory["peak_bytes"][t] / memory["limits"][t] for t in ("device", "host"))
    return [
        {"goal": "disk tier: share of what a bare reader reads", "value": share, "needed": 0.85, "at_most": False},
        {
            "goal": "decode step, disk over all in memory, repeated routes",
            "value": ratio,
            "needed": 2.0,
            "at_most": True,
        },
        {"goal": "peak bytes over their limit", "value": over, "needed": 1.0, "at_most": True},
    ]


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
    if tier == "disk":
        # tables, sinks and windows, and the scratch of a step
        tables = size.layers * (size.tokens // config.chunk_size) * layer.hkv * layer.d * size.dtype.itemsize
        more |= {"host_bytes": history // size.share, "path": path, "queue_depth": DEPTH}
        more |= {"device_bytes": 16 * tables + (64 << 20)}
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
    config, layer = store.config, size.layer
    held = step.route_forward, step.attention_forward, step.summaries_forward
    try:
        # what is appended does not depend on what is attended, and routes are given later
        step.route_forward, step.attention_forward = _no_routes, _no_attention
        step.summaries_forward = _no_summaries
        for number in range(size.layers):
            for start in range(0, size.tokens, 4096):
                k, v = (drawn(size.dtype, 7 * number + start + i, 1, 4096, layer.hkv, layer.d) for i in range(2))
                store.attend(number, k.repeat_interleave(layer.hq // layer.hkv, 2), k, v)
    finally:
        step.route_forward, step.attention_forward, step.summaries_forward = held
    assert store.lengths.tolist() == [size.tokens] and config.keep_first
    with store:
        yield store


def _no_routes(q: Tensor, *_: Any) -> Tensor:
    return torch.full((*q.shape[:3], 1), -1, dtype=torch.int32)


def _no_summaries(k: Tensor, _inv_freq: Tensor, _positions: Any, c: int, g: int, *_: Any) -> tuple[Tensor, Tensor]:
    b, s, h, d = k.shape
    return k.new_zeros(b, s // c, h, d), k.new_zeros(b, s // c, c // g, h, d)


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


class _Routes:
    """Routes [1, 1, Hq, Kg] of one layer after another, the same sequence for every tier."""

    def __init__(self, size: Size, config: HGAConfig, kind: str) -> None:
        self.config, self.kind, self.heads = config, kind, size.layer.hq
        self.generator = torch.Generator().manual_seed(5)
        chunks = size.tokens // config.chunk_size - config.keep_first - config.keep_last
        self.pool = chunks * config.groups_per_chunk
        self.held = [self._draw(self.heads) for _ in range(size.layers)]

    def _draw(self, heads: int) -> Tensor:
        kg = min(self.config.topk_groups, self.pool)
        m = self.config.groups_per_chunk
        chunks = torch.rand(heads, self.pool // m, generator=self.generator)
        chunks = chunks.topk(min(self.config.topk_chunks, self.pool // m)).indices
        picks = torch.rand(heads, chunks.shape[1] * m, generator=self.generator)
        picks = picks.topk(min(kg, picks.shape[1])).indices
        return chunks.gather(1, picks // m) * m + picks % m + self.config.keep_first * m

    def next(self, layer: int) -> Tensor:
        if self.kind == "disjoint":
            self.held[layer] = self._draw(self.heads)
        else:
            change = torch.rand(self.held[layer].shape, generator=self.generator) < CHANGED
            self.held[layer] = torch.where(change, self._draw(self.heads), self.held[layer])
        ids = self.held[layer].sort(-1).values
        # a change may have drawn a group twice
        ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1
        return ids[None, None].int()


def _steps(near: KVStore, far: KVStore, size: Size, routes: str) -> dict[str, Any]:
    """Steps of one token through all layers, tier after tier in every step."""
    config, layer = near.config, size.layer
    kind = "disjoint" if routes == "disjoint" else "repeated"
    far.prefetch = routes != "repeated, no prefetch"
    source = _Routes(size, config, kind)
    times: dict[str, list[float]] = {"host": [], "disk": []}
    fetching: dict[str, list[float]] = {"host": [], "disk": []}
    equal, pages, warm = True, 0, 3
    held = step.route_forward
    before = far.stats()
    try:
        for number in range(warm + size.steps):
            if number == warm:
                before, pages = far.stats(), 0
            step_routes = [source.next(i) for i in range(size.layers)]
            x = [
                drawn(size.dtype, 99 + number + i, 1, 1, h, layer.d) for i, h in enumerate((layer.hq, *[layer.hkv] * 2))
            ]
            outs: dict[str, list[Tensor]] = {}
            for name, store in (("host", near), ("disk", far)):
                outs[name] = []
                assert store._engine is not None
                with _timed(store._engine.tier) as spent:
                    began = time.perf_counter()
                    for i in range(size.layers):
                        step.route_forward = lambda *_, chosen=step_routes[i]: chosen
                        outs[name].append(store.attend(i, *x))
                    times[name].append((time.perf_counter() - began) / size.layers)
                fetching[name].append(spent[0] / size.layers)
            equal = equal and all(torch.equal(a, b) for a, b in zip(outs["host"], outs["disk"], strict=True))
            pages += sum(len(s.last_pages) for s in far._layers if s.last_pages is not None)
            for store in (near, far):
                store.rewind(size.tokens)
    finally:
        step.route_forward = held
        far.prefetch = True
    after = far.stats()
    hits, misses = (after[n] - before[n] for n in ("hits", "misses"))
    row: dict[str, Any] = {"routes": routes, "equal": equal, "pages": pages / size.steps / size.layers}
    row["hit_rate"] = hits / max(1, hits + misses)
    for name, seconds in times.items():
        row[name] = spread(seconds[warm:]) | {"fetching_s": statistics.median(fetching[name][warm:])}
    return row


@contextlib.contextmanager
def _timed(tier: Any) -> Iterator[list[float]]:
    """Seconds spent in ``tier.groups``."""
    spent, plain = [0.0], tier.groups

    def groups(pages: Tensor, group: Tensor) -> Tensor:
        began = time.perf_counter()
        found = plain(pages, group)
        spent[0] += time.perf_counter() - began
        return found

    tier.groups = groups
    try:
        yield spent
    finally:
        del tier.groups


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
