"""hga_attention: schema, shapes and gradient of the torch.library operation.

``routes``, if given, are the routes of the queries, and nothing is summarised or scored: a cache has its own summaries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dispatch import select
from ..._library import register, register_gradient
from ...rope import working_dtype
from ..hga_route.op import width

ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor inv_freq, Tensor? positions, Tensor? attention_mask, Tensor? routes, "
    "SymInt group_size, SymInt chunk_size, SymInt keep_first, SymInt keep_last, SymInt topk_chunks, "
    "SymInt topk_groups, str routing, SymInt route_block, str share, SymInt super_chunk, SymInt topk_supers, "
    "float scale, str impl"
)
NAMES = tuple(argument.split()[-1] for argument in ARGUMENTS.split(", "))[:-1]
TENSORS = 7


def _select(given: list[Any], impl: str) -> Any:
    return select("hga_attention", impl, *given)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, impl = arguments
    return _select(given, impl).forward(*given)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = dict(zip(NAMES, arguments, strict=False))
    q = given["q"]
    b, t, hq, _ = q.shape
    lse = q.new_empty((b, hq, t), dtype=working_dtype(q.dtype))
    if given["routes"] is not None:
        w = given["routes"].shape[-1]
    else:
        chunks = given["k"].shape[1] // given["chunk_size"]
        w = width(given["topk_groups"], chunks, given["chunk_size"] // given["group_size"])
    return q.new_empty(q.shape), lse, q.new_empty((b, t, hq, w), dtype=torch.int32)


def _backward(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, impl = arguments
    return _select(given, impl).backward(grad_out, grad_lse, out, lse, *given)


def _backward_fake(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in arguments[:3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse, routes = output
    q, k, v, inv_freq, positions, attention_mask = inputs[:6]
    ctx.rest = inputs[TENSORS:]
    ctx.mark_non_differentiable(routes)
    ctx.save_for_backward(out, lse, q, k, v, inv_freq, positions, attention_mask, routes)


def _gradient(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    found = attention_backward(grad_out, grad_lse, out, lse, *tensors, *ctx.rest)
    return (*found, *([None] * (TENSORS - 3 + len(ctx.rest))))


attention_forward = register("hga_attention", f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake)
attention_backward = register(
    "hga_attention_backward",
    f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register_gradient("hga_attention", _gradient, _setup)
