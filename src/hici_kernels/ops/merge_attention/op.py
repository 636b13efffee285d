"""merge_attention: schema, shapes and gradient of the torch.library operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._dispatch import select
from ..._library import register, register_gradient
from ...rope import working_dtype


def _forward(outs: list[Tensor], lses: list[Tensor], impl: str) -> tuple[Tensor, Tensor]:
    return select("merge_attention", impl, outs, lses).forward(outs, lses)


def _forward_fake(outs: list[Tensor], lses: list[Tensor], impl: str) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape, dtype=working_dtype(outs[0].dtype))


def _backward(grad_out: Tensor, grad_lse: Tensor, outs: list[Tensor], lses: list[Tensor], impl: str) -> list[Tensor]:
    return select("merge_attention", impl, outs, lses).backward(grad_out, grad_lse, outs, lses)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor, outs: list[Tensor], lses: list[Tensor], impl: str
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (*outs, *lses)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    outs, lses, ctx.impl = inputs
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses)


def _gradient(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    n, saved = ctx.parts, ctx.saved_tensors
    grads = merge_backward(grad_out, grad_lse, list(saved[:n]), list(saved[n:]), ctx.impl)
    return list(grads[:n]), list(grads[n:]), None


merge_forward = register(
    "merge_attention", "(Tensor[] outs, Tensor[] lses, str impl) -> (Tensor, Tensor)", _forward, _forward_fake
)
merge_backward = register(
    "merge_attention_backward",
    "(Tensor grad_out, Tensor grad_lse, Tensor[] outs, Tensor[] lses, str impl) -> Tensor[]",
    _backward,
    _backward_fake,
)
register_gradient("merge_attention", _gradient, _setup)
