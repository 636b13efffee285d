"""The HGA operations at one layer of Qwen3-8B, for ``hici bench --suite gpu`` and ``hici tune``.

FLOPs and bytes are what a pass must do at least: of routed attention those of the tokens that are seen, every group
read once for all queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ..config import HGAConfig
from ..ops.hga_attention.api import hga_attention
from ..ops.hga_attention.op import attention_forward
from ..ops.hga_route.api import budgets, hga_route
from ..ops.hga_summaries.api import hga_summaries
from ..rope import Rope
from .case import Inputs, Outputs
from .gpu_case import Baseline, GpuCase, Work
from .gpu_store_case import store_case

HEADS, KV_HEADS = 32, 8
NO_BACKWARD = Work(0, 0)
#: Share of the rows that must be those of the reference where routes are found in the same call.
ALIKE = 0.98


def _random(device: torch.device, dtype: torch.dtype, *sizes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator(device).manual_seed(0)
    return [torch.randn(size, generator=g, device=device).to(dtype) for size in sizes]


def hga_cases(dtype: torch.dtype) -> list[GpuCase]:
    """What ``hici bench --suite gpu`` measures of HGA."""
    return [
        summaries_case(32768, dtype),
        route_case(512, 4096, dtype),
        route_case(1024, 1, dtype),
        route_case(16384, 1, dtype),
        routed_case(32768, 32768, dtype),
        routed_case(32768, 4096, dtype),
        decode_case(1 << 16, dtype),
        decode_case(1 << 20, dtype),
        store_case((1 << 16) + 7, 4096, dtype),
        store_case((1 << 16) + 7, 0, dtype),
        *(gather_case(row_bytes, (64 << 20) // row_bytes, dtype) for row_bytes in (1 << 12, 1 << 13, 1 << 14, 1 << 15)),
    ]


def summaries_case(tokens: int, dtype: torch.dtype, d: int = 128) -> GpuCase:
    """Summaries of a whole text."""
    c, rope = HGAConfig(), Rope.from_theta(1e6, d)
    sizes: dict[str, Any] = {"chunk_size": c.chunk_size, "group_size": c.group_size}
    numbers = tokens * KV_HEADS * d
    outs = tokens // c.chunk_size * (1 + c.groups_per_chunk) * KV_HEADS * d

    def call(x: Inputs, impl: str) -> Outputs:
        return hga_summaries(x["k"], rope=rope, impl=impl, **sizes)

    return GpuCase(
        op="hga_summaries",
        name=f"{tokens} tokens",
        shape=f"{tokens} tokens, {KV_HEADS} kv heads, D {d}, chunks of {c.chunk_size}, groups of {c.group_size}",
        dtype=dtype,
        inputs=lambda device: dict(zip("k", _random(device, dtype, (1, tokens, KV_HEADS, d)), strict=True)),
        options=sizes,
        call=call,
        forward=Work(5 * numbers, dtype.itemsize * (numbers + outs)),
        backward=NO_BACKWARD,
        arguments=lambda x: (x["k"], rope.inv_freq, None, c.chunk_size, c.group_size),
        truth="reference",
    )


def route_case(chunks: int, queries: int, dtype: torch.dtype, d: int = 128) -> GpuCase:
    """Routes of the last queries of a history, strict."""
    c = HGAConfig()
    m = c.groups_per_chunk
    names = ("q", "chunk_keys", "group_keys")
    shapes = ((1, queries, HEADS, d), (1, chunks, KV_HEADS, d), (1, chunks, m, KV_HEADS, d))
    scanned = queries * HEADS * (chunks + c.topk_chunks * m)
    picked = (
        min(queries * HEADS * c.topk_chunks, chunks * KV_HEADS) * m * d
    )  # group keys: each once, however many rows want it
    read = chunks * KV_HEADS * d + queries * HEADS * d + picked

    def call(x: Inputs, impl: str) -> Outputs:
        return (hga_route(x["q"], x["chunk_keys"], x["group_keys"], c, impl=impl),)

    return GpuCase(
        op="hga_route",
        name=f"{queries} queries over {chunks} chunks",
        shape=f"{queries} queries, {chunks} chunks, {HEADS}/{KV_HEADS} heads, D {d}, {c.topk_chunks} chunks, "
        f"{c.topk_groups} groups",
        dtype=dtype,
        inputs=lambda device: dict(zip(names, _random(device, dtype, *shapes), strict=True)),
        options={"config": c},
        call=call,
        forward=Work(2 * d * scanned, dtype.itemsize * read + 4 * queries * HEADS * c.topk_groups),
        backward=NO_BACKWARD,
        arguments=lambda x: (*(x[n] for n in names), None, 0, *budgets(c), None),
        truth="reference",
        agreement=ALIKE,
    )


def routed_case(tokens: int, queries: int, dtype: torch.dtype, d: int = 128) -> GpuCase:
    """Routed attention of the last queries of a text, routes found in the same call."""
    c, rope, names = HGAConfig(), Rope.from_theta(1e6, d), "qkv"
    shapes = ((1, queries, HEADS, d), (1, tokens, KV_HEADS, d), (1, tokens, KV_HEADS, d))
    seen = min((c.keep_first + c.keep_last) * c.chunk_size + c.chunk_size // 2 + c.topk_groups * c.group_size, tokens)
    rest = (c.group_size, *budgets(c), d**-0.5)
    flops = 4 * d * HEADS * queries * seen
    read = dtype.itemsize * 2 * d * KV_HEADS * min(queries * seen, tokens)

    def call(x: Inputs, impl: str) -> Outputs:
        return (hga_attention(x["q"], x["k"], x["v"], c, rope=rope, impl=impl),)

    return GpuCase(
        op="hga_attention",
        name=f"{queries} queries of {tokens} tokens",
        shape=f"{queries} queries, {tokens} tokens, {HEADS}/{KV_HEADS} heads, D {d}, default budgets",
        dtype=dtype,
        inputs=lambda device: dict(zip(names, _random(device, dtype, *shapes), strict=True)),
        options={"config": c},
        call=call,
        forward=Work(flops, read + dtype.itemsize * 2 * d * HEADS * queries),
        # q, out and its gradient read, dq written; dk and dv of all tokens, seen or not
        backward=Work(5 * flops // 2, read + dtype.itemsize * 2 * d * (2 * HEADS * queries + KV_HEADS * tokens)),
        baselines={"sdpa, every token": Baseline(_dense, 2 * d * HEADS * tokens * tokens, same=False)}
        if queries == tokens
        else {},
        arguments=lambda x: (*(x[n] for n in names), rope.inv_freq, None, None, None, *rest),
        truth="reference",
        agreement=ALIKE,
    )


def decode_case(tokens: int, dtype: torch.dtype, d: int = 128) -> GpuCase:
    """One query over a history of which a cache keeps the summaries: its route, and attention to what it shows."""
    c, inv_freq, names = HGAConfig(), torch.ones(d // 2), ("q", "k", "v", "chunk_keys", "group_keys")
    n, m = tokens // c.chunk_size, c.groups_per_chunk
    seen = min((c.keep_first + c.keep_last + 1) * c.chunk_size + c.topk_groups * c.group_size, tokens)
    shapes = (
        (1, 1, HEADS, d),
        (1, tokens, KV_HEADS, d),
        (1, tokens, KV_HEADS, d),
        (1, n, KV_HEADS, d),
        (1, n, m, KV_HEADS, d),
    )
    rest = (c.group_size, *budgets(c), d**-0.5)
    # windows are one for all heads; opened groups may be different ones of each
    own = (seen - c.topk_groups * c.group_size) * KV_HEADS + c.topk_groups * c.group_size * HEADS
    read = 2 * own * d + n * KV_HEADS * d + c.topk_chunks * m * HEADS * d

    def call(x: Inputs, impl: str) -> Outputs:
        routes = hga_route(x["q"], x["chunk_keys"], x["group_keys"], c, impl=impl)
        return (attention_forward(x["q"], x["k"], x["v"], inv_freq, None, None, routes, *rest, impl)[0],)

    return GpuCase(
        op="hga_attention",
        name=f"decoding at {tokens} tokens",
        shape=f"1 query, {tokens} tokens and their summaries, {HEADS}/{KV_HEADS} heads, D {d}, default budgets",
        dtype=dtype,
        inputs=lambda device: dict(zip(names, _random(device, dtype, *shapes), strict=True)),
        options={"config": c},
        call=call,
        forward=Work(4 * d * HEADS * seen + 2 * d * HEADS * (n + c.topk_chunks * m), dtype.itemsize * read),
        backward=NO_BACKWARD,
        truth="reference",
        agreement=1 - 2 / HEADS,  # of one query
        baselines={"sdpa, every token": Baseline(_dense, 4 * d * HEADS * tokens, same=False)},
    )


def gather_case(row_bytes: int, rows: int, dtype: torch.dtype) -> GpuCase:
    """Rows anywhere in pinned memory brought to the device, by its processors and by its copy engines."""
    order = torch.randperm(2 * rows, generator=torch.Generator().manual_seed(0))[:rows]

    def inputs(device: torch.device) -> Inputs:
        size = (2 * rows, row_bytes)
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        return {"memory": memory.random_(generator=torch.Generator().manual_seed(0))}

    def target(x: Inputs) -> torch.device:
        return torch.device("cuda" if x["memory"].is_pinned() else "cpu")

    def arguments(x: Inputs) -> tuple[Any, ...]:
        return x["memory"].data_ptr() + order * row_bytes, row_bytes, target(x)

    def call(x: Inputs, impl: str) -> Outputs:
        given = arguments(x)
        return (_dispatch.select("gather_rows", impl, *given).forward(*given),)

    def on_the_host(x: Inputs, options: dict[str, Any]) -> tuple[Callable[[], Outputs], list[Tensor]]:
        staging = torch.empty_like(x["memory"][:rows], pin_memory=x["memory"].is_pinned())

        def copied() -> Outputs:
            torch.index_select(x["memory"], 0, order, out=staging)
            return (staging.to(target(x), non_blocking=True),)

        return copied, []

    def row_by_row(x: Inputs, options: dict[str, Any]) -> tuple[Callable[[], Outputs], list[Tensor]]:
        out, at = torch.empty(rows, row_bytes, dtype=torch.uint8, device=target(x)), order.tolist()

        def copied() -> Outputs:
            for i, j in enumerate(at):
                out[i].copy_(x["memory"][j], non_blocking=True)
            return (out,)

        return copied, []

    def at_once(x: Inputs, options: dict[str, Any]) -> tuple[Callable[[], Outputs], list[Tensor]]:
        return lambda: (x["memory"][:rows].to(target(x), non_blocking=True, copy=True),), []

    return GpuCase(
        op="gather_rows",
        name=f"{rows} rows of {row_bytes} bytes",
        shape=f"{rows} rows of {row_bytes} bytes in pinned memory, {rows * row_bytes >> 20} MiB",
        dtype=dtype,
        inputs=inputs,
        options={},
        call=call,
        # over the link once, into device memory once
        forward=Work(0, 2 * rows * row_bytes),
        backward=NO_BACKWARD,
        baselines={
            "host gather, one copy": Baseline(on_the_host, 0),
            "one copy a row": Baseline(row_by_row, 0),
            "one copy, consecutive": Baseline(at_once, 0, same=False),
        },
        arguments=arguments,
        truth="host gather, one copy",
    )


def _dense(x: Inputs, options: dict[str, Any]) -> tuple[Callable[[], Outputs], list[Tensor]]:
    """Dense attention of the same queries: all of a text, or one."""
    q, k, v = (x[n].transpose(1, 2).detach().requires_grad_() for n in "qkv")
    causal = q.shape[2] > 1

    def call() -> Outputs:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return (out.transpose(1, 2),)

    return call, [q, k, v]
