"""Correctness of the HGA operations on a device: problems for :mod:`.gpu_checks`.

Queries and keys are few halves, and keys are summarised without rotation (frequency 0): means and scores are then exact
in every dtype and in any order of additions, with many ties, so that routes must be those of the truth, and outputs can
be compared end to end, summaries and routes included. Rotation is checked where summaries are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ..config import HGAConfig
from ..ops.hga_attention.api import hga_attention
from ..ops.hga_route.api import hga_route
from ..ops.hga_summaries.api import hga_summaries
from ..rope import Rope
from .case import Inputs, Outputs
from .gpu_check import ALL, Check
from .gpu_dense import seeded

TWO = (torch.bfloat16, torch.float32)
SMALL: dict[str, Any] = {
    "chunk_size": 16,
    "group_size": 4,
    "keep_first": 1,
    "keep_last": 1,
    "topk_chunks": 3,
    "topk_groups": 5,
}


def halves(seed: int, device: torch.device) -> Any:
    """draw(*shape): -1, -0.5, 0, 0.5 or 1 in float64, the same on every device."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g, dtype=torch.int8).to(device).double() / 2

    return draw


def summaries(device: torch.device) -> Iterator[Check]:
    def problem(
        name: str, dtype: torch.dtype, *, s: int = 700, d: int = 128, rotary: int | None = None, **options: Any
    ) -> Check:
        rope = Rope.from_theta(1e6, rotary or d)

        def call(x: Inputs, impl: str) -> Outputs:
            return hga_summaries(x["k"], rope=rope, impl=impl, **options)

        return Check(
            "hga_summaries",
            name,
            dtype,
            lambda number: {"k": seeded(s + d + 10000 * number, device)(2, s, 2, d)},
            call,
            lambda x: call(x, "reference"),
            gradients=False,
        )

    far = (torch.arange(700) * 3 + 100_000).to(device)
    for dtype in ALL:
        for d in (64, 80, 128, 256):
            yield problem(f"D {d}", dtype, d=d)
    for dtype in TWO:
        yield problem("half of the dims turn", dtype, rotary=64)
        yield problem("positions", dtype, positions=far)
        yield problem("odd", dtype, s=100, d=6, rotary=2, chunk_size=6, group_size=3)
        yield problem("one token a chunk", dtype, s=90, chunk_size=1, group_size=1)


def gathered(device: torch.device) -> Iterator[Check]:
    def problem(name: str, row_bytes: int, rows: int, found: bool = False) -> Check:
        """found: addresses that the device knows alone, some of them none, of rows that go to places of their own."""
        dtype = torch.float32
        numbers = row_bytes // dtype.itemsize
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
        there = (order % 3 > 0)[:, None].to(device) if found else None

        def call(x: Inputs, impl: str) -> Outputs:
            memory = x["memory"].cpu()
            memory = memory.pin_memory() if device.type == "cuda" else memory
            arguments: tuple[Any, ...] = memory.data_ptr() + order * row_bytes, row_bytes, device
            if there is not None:
                addresses = torch.where(there[:, 0], arguments[0].to(device), 0)
                out = torch.zeros(rows, row_bytes, dtype=torch.uint8, device=device)
                arguments = addresses, row_bytes, device, row_bytes % 16 == 0, out, torch.arange(rows, device=device)
            out = _dispatch.select("gather_rows", impl, *arguments).forward(*arguments).view(dtype)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the memory must outlive the launch
            return (out,)

        return Check(
            "gather_rows",
            name,
            dtype,
            lambda number: {"memory": seeded(rows + number, device)(rows, numbers)},
            call,
            lambda x: (x["memory"][order.to(device)] * (1 if there is None else there),),
            gradients=False,
        )

    for row_bytes in (4, 60, 4096, 32768, 32772):
        yield problem(f"rows of {row_bytes} bytes", row_bytes, 50)
        yield problem(f"rows of {row_bytes} bytes found on the device", row_bytes, 50, found=True)


def routes(device: torch.device) -> Iterator[Check]:
    def problem(
        name: str,
        dtype: torch.dtype,
        *,
        t: int = 100,
        n: int = 40,
        d: int = 128,
        hq: int = 8,
        hkv: int = 2,
        positions: Tensor | None = None,
        **changes: Any,
    ) -> Check:
        c = HGAConfig(**changes)
        m = c.groups_per_chunk

        def draw(number: int) -> Inputs:
            of = halves(t + n + d + 10000 * number, device)
            return {"q": of(2, t, hq, d), "chunk_keys": of(2, n, hkv, d), "group_keys": of(2, n, m, hkv, d)}

        def call(x: Inputs, impl: str) -> Outputs:
            found = hga_route(x["q"], x["chunk_keys"], x["group_keys"], c, positions=positions, impl=impl).long()
            # how often each group is opened, and whether ids rise; unused entries fall into the first column
            opened = x["q"].new_zeros((2, t, hq, n * m + 1))
            opened.scatter_add_(-1, found + 1, torch.ones_like(found, dtype=opened.dtype))
            rising = (found[..., 1:] > found[..., :-1]) | (found[..., 1:] < 0)
            return opened[..., 1:], rising.to(opened)

        return Check("hga_route", name, dtype, draw, call, lambda x: call(x, "reference"), gradients=False)

    holes = (torch.arange(2400, 2500)).repeat(2, 1)
    holes[0, ::7] = -1
    holes = holes.to(device)
    for dtype in ALL:
        yield problem("strict", dtype)
        yield problem("one query, 64K tokens", dtype, t=1, n=1024)
    for dtype in TWO:
        for d in (5, 64, 80, 256):
            yield problem(f"D {d}", dtype, d=d)
        yield problem("one query, 1M tokens", dtype, t=1, n=16384)
        yield problem("one head", dtype, hq=1, hkv=1)
        yield problem("3 heads of a kv head", dtype, hq=6, hkv=2)
        yield problem("no window", dtype, keep_last=0)
        yield problem("small chunks", dtype, t=10, n=12, **SMALL)
        for routing in ("strict", "prefix", "block"):
            yield problem(f"{routing}, kv", dtype, routing=routing, share="kv")
            yield problem(f"{routing}, positions", dtype, routing=routing, positions=holes)
        yield problem("prefix", dtype, routing="prefix")
        yield problem("block", dtype, routing="block", route_block=16)


def attention(device: torch.device) -> Iterator[Check]:
    def problem(
        name: str,
        dtype: torch.dtype,
        *,
        b: int = 2,
        s: int = 1500,
        t: int | None = None,
        d: int = 128,
        hq: int = 4,
        hkv: int = 2,
        mask: Tensor | None = None,
        gradients: bool = True,
        scale: float | None = None,
        **changes: Any,
    ) -> Check:
        c = HGAConfig(**{"keep_last": 2, "topk_chunks": 4, "topk_groups": 8, **changes})
        rope = Rope(torch.zeros(d // 2))

        def draw(number: int) -> Inputs:
            of, normal = halves(s + d + 10000 * number, device), seeded(s + d + 10000 * number, device)
            return {"q": of(b, t or s, hq, d), "k": of(b, s, hkv, d), "v": normal(b, s, hkv, d)}

        def call(x: Inputs, impl: str) -> Outputs:
            found = hga_attention(
                x["q"], x["k"], x["v"], c, rope=rope, attention_mask=mask, scale=scale, return_lse=True, impl=impl
            )
            assert found.lse is not None
            return found.out, found.lse

        return Check("hga_attention", name, dtype, draw, call, lambda x: call(x, "reference"), gradients=gradients)

    holes = (torch.rand(2, 1500, generator=torch.Generator().manual_seed(1)) > 0.2).to(device)
    for dtype in ALL:
        for d in (64, 80, 128, 256):
            yield problem(f"D {d}", dtype, d=d)
    for dtype in TWO:
        yield problem("default budgets", dtype, s=3000, keep_last=8, topk_chunks=16, topk_groups=32)
        # more pairs of a group and a row than the backward pass takes at a time
        many: dict[str, Any] = {"keep_last": 8, "topk_chunks": 16, "topk_groups": 32}
        yield problem("20,000 tokens", dtype, b=1, s=20_000, hq=8, **many)
        # whole windows open the same few groups
        yield problem("two groups a query", dtype, s=3000, topk_chunks=1, topk_groups=2, share="kv")
        yield problem("the last 5 positions", dtype, t=5)
        yield problem("a text of one chunk", dtype, s=64)
        yield problem("small chunks", dtype, s=200, t=10, **SMALL)
        yield problem("holes", dtype, mask=holes)
        yield problem("prefix", dtype, routing="prefix")
        yield problem("block, kv", dtype, routing="block", share="kv")
        yield problem("one kv head, scale below 0", dtype, hkv=1, scale=-0.05)
        yield problem("8 heads of a kv head", dtype, hq=8, hkv=1, t=70)
        for tokens, what in ((1 << 16, "64K"), (1 << 20, "1M")):
            long: dict[str, Any] = {"keep_last": 8, "topk_chunks": 16, "topk_groups": 32}
            yield problem(f"one query, {what} tokens", dtype, b=1, s=tokens + 37, t=1, hq=8, gradients=False, **long)
