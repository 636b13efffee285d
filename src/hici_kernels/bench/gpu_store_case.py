"""Decode steps of a KVStore whose history lies in pinned host memory, for ``hici bench --suite gpu``.

The kernels' side finds and fetches pages by the device alone (``fetch="gather"``); beside it the same step with pages
found and gathered by the host, with the whole history on the device, and dense attention over it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import HGAConfig
from ..kv.store import KVStore
from ..rope import Rope
from .case import Inputs, Outputs
from .gpu_case import Baseline, GpuCase, Work

HEADS, KV_HEADS = 32, 8
#: different queries that take turns, so that routes do not repeat from one step to the next
TURNS = 8
FILLED_AT_ONCE = 4096
ON_DEVICE = "history on the device"


class _Stores:
    """One history, opened in as many ways as are asked for, and what is appended to it."""

    def __init__(self, tokens: int, layers: int, bank_pages: int, dtype: torch.dtype, d: int) -> None:
        self.tokens, self.layers, self.bank_pages, self.dtype, self.d = tokens, layers, bank_pages, dtype, d
        self._made: dict[str, tuple[KVStore, Iterator[int]]] = {}
        self._saved: Path | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="hici-bench-")

    def inputs(self, device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
        draw = {n: torch.randn(TURNS, 1, h, self.d, generator=g, device=device) for n, h in heads.items()}
        for name in "kv":
            size = (1, self.tokens, KV_HEADS, self.d)
            draw[f"{name} before"] = torch.randn(size, generator=g, device=device)
        return {n: x.to(self.dtype) for n, x in draw.items()}

    def step(self, x: Inputs, way: str) -> Outputs:
        """One token through all layers, and back; every way takes the same queries in the same turns."""
        if way not in self._made:
            self._made[way] = self._open(x, way), itertools.count()
        store, turns = self._made[way]
        turn = next(turns) % TURNS
        q, k, v = (x[n][turn : turn + 1] for n in "qkv")
        outs = [store.attend(layer, q, k, v) for layer in range(self.layers)]
        store.rewind(self.tokens)
        return (torch.stack(outs),)

    def _open(self, x: Inputs, way: str) -> KVStore:
        device = x["q"].device
        if self._saved is None:
            self._saved = Path(self._folder.name) / "history"
            rope = Rope.from_theta(1e6, self.d)
            sizes: dict[str, Any] = {"layers": self.layers, "kv_heads": KV_HEADS, "head_dim": self.d}
            with KVStore(HGAConfig(), rope=rope, dtype=self.dtype, device=device, **sizes) as store:
                q = x["q"].new_zeros(1, FILLED_AT_ONCE, HEADS, self.d)
                for layer in range(self.layers):
                    for start in range(0, self.tokens, FILLED_AT_ONCE):
                        k, v = (x[f"{n} before"][:, start : start + FILLED_AT_ONCE] for n in "kv")
                        store.attend(layer, q[:, : k.shape[1]], k, v)
                store.save(self._saved)
        ways: dict[str, dict[str, Any]] = {
            "triton": {"tier": "host", "fetch": "gather", "bank_pages": self.bank_pages},
            "reference": {"tier": "host", "bank_pages": self.bank_pages},
            "device": {"tier": "device"},
        }
        return KVStore.load(self._saved, device=device, **ways[way])


def store_case(tokens: int, bank_pages: int, dtype: torch.dtype, d: int = 128, layers: int = 4) -> GpuCase:
    """Steps of one query after ``tokens``, over ``layers`` layers with a bank of ``bank_pages`` pages for all."""
    stores, c = _Stores(tokens, layers, bank_pages, dtype, d), HGAConfig()
    pool, m = max(0, tokens // c.chunk_size - c.keep_first - c.keep_last), c.groups_per_chunk
    opened = min(c.topk_groups, pool * m) * c.group_size
    seen = min((c.keep_first + c.keep_last + 1) * c.chunk_size, tokens) + opened
    scanned = pool + min(c.topk_chunks, pool) * m
    # windows are one for all heads of a kv group, opened groups need not be
    read = 2 * d * ((seen - opened) * KV_HEADS + opened * HEADS) + d * (pool * KV_HEADS + c.topk_chunks * m * HEADS)

    def host(x: Inputs, options: dict[str, Any]) -> tuple[Callable[[], Outputs], list[Tensor]]:
        return lambda: stores.step(x, "reference"), []

    def device(x: Inputs, options: dict[str, Any]) -> tuple[Callable[[], Outputs], list[Tensor]]:
        return lambda: stores.step(x, "device"), []

    def dense(x: Inputs, options: dict[str, Any]) -> tuple[Callable[[], Outputs], list[Tensor]]:
        q, k, v = (x[n].transpose(1, 2) for n in ("q", "k before", "v before"))

        def call() -> Outputs:
            attend = torch.nn.functional.scaled_dot_product_attention
            outs = [attend(q[:1], k, v, enable_gqa=True).transpose(1, 2) for _ in range(layers)]
            return (torch.stack(outs),)

        return call, []

    return GpuCase(
        op="gather_rows",
        name=f"decoding at {tokens} tokens, history in host memory, a bank of {bank_pages} pages",
        shape=f"1 query, {tokens} tokens, {layers} layers of {HEADS}/{KV_HEADS} heads, D {d}, default budgets, {TURNS} "
        f"queries in turn",
        dtype=dtype,
        inputs=stores.inputs,
        options={},
        call=stores.step,
        forward=Work(layers * d * HEADS * (4 * seen + 2 * scanned), layers * dtype.itemsize * read),
        backward=Work(0, 0),
        baselines={
            "pages found and gathered by the host": Baseline(host, 4 * d * HEADS * seen * layers),
            ON_DEVICE: Baseline(device, 4 * d * HEADS * seen * layers),
            "sdpa, every token": Baseline(dense, 4 * d * HEADS * tokens * layers, same=False),
        },
        truth=ON_DEVICE,
    )
