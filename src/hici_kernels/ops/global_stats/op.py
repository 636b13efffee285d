"""global_stats: schema, shapes and gradient of the torch.library operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._dispatch import select
from ..._library import register, register_gradient

ARGUMENTS = "Tensor local, bool causal, Tensor? valid, Tensor? cu_segments, str impl"


def _select(local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None, impl: str) -> Any:
    return select("global_stats", impl, local, causal, valid, cu_segments)


def _forward(local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None, impl: str) -> Tensor:
    return _select(local, causal, valid, cu_segments, impl).forward(local, causal, valid, cu_segments)


def _forward_fake(local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None, impl: str) -> Tensor:
    b, n, _, h = local.shape
    if causal:
        return local.new_empty((b, n, 5, h))
    return local.new_empty((b if cu_segments is None else cu_segments.shape[0] - 1, 5, h))


def _backward(
    grad_out: Tensor, local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None, impl: str
) -> Tensor:
    chosen = _select(local, causal, valid, cu_segments, impl)
    return chosen.backward(grad_out, local, causal, valid, cu_segments)


def _backward_fake(grad_out: Tensor, local: Tensor, *rest: Any) -> Tensor:
    return local.new_empty(local.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    local, ctx.causal, valid, cu_segments, ctx.impl = inputs
    ctx.save_for_backward(local, valid, cu_segments)


def _gradient(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    local, valid, cu_segments = ctx.saved_tensors
    grad = global_stats_backward(grad_out, local, ctx.causal, valid, cu_segments, ctx.impl)
    return grad, None, None, None, None


global_stats_forward = register("global_stats", f"({ARGUMENTS}) -> Tensor", _forward, _forward_fake)
global_stats_backward = register(
    "global_stats_backward", f"(Tensor grad_out, {ARGUMENTS}) -> Tensor", _backward, _backward_fake
)
register_gradient("global_stats", _gradient, _setup)
