"""attention: schema, shapes and gradient of the torch.library operation.

``segment_len`` 0 stands for one segment (per document). An empty ``grad_lse`` stands for one that is absent;
implementations that define ``ABSENT_LSE_GRADIENT`` get it so, the others get zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dispatch import select
from ..._library import drop_absent, fake_gradients, register, register_gradient
from ...rope import working_dtype

DIFFERENTIABLE = (0, 1, 2, 5, 6, 7, 8)
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, SymInt segment_len, SymInt recurrence_len, Tensor? global_k, Tensor? global_v, "
    "Tensor? local_k, Tensor? local_v, Tensor? prefix_mask, Tensor? attention_mask, Tensor? cu_seqlens, bool causal, "
    "float scale, str impl"
)


def _select(arguments: tuple[Any, ...], impl: str) -> Any:
    return select("attention", impl, *arguments)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, impl = arguments
    return _select(tuple(given), impl).forward(*given)


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, t, hq, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, hq, t), dtype=working_dtype(q.dtype))


def _backward(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, impl = arguments
    module = _select(tuple(given), impl)
    if grad_lse.numel() == 0 and not getattr(module, "ABSENT_LSE_GRADIENT", False):
        grad_lse = torch.zeros_like(lse)
    return module.backward(grad_out, grad_lse, out, lse, *given)


def _backward_fake(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> Any:
    return fake_gradients([arguments[i] for i in DIFFERENTIABLE])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # a zero gradient of an unused lse would have to be treated like any other
    ctx.set_materialize_grads(False)
    tensors = {i: x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    ctx.at = tuple(tensors)
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*output, *tensors.values())


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = lse.new_empty(0) if grad_lse is None else grad_lse
    arguments = list(ctx.rest)
    for i, x in zip(ctx.at, tensors, strict=True):
        arguments[i] = x
    found = attention_backward(grad_out, grad_lse, out, lse, *arguments)
    gradients: list[Tensor | None] = [None] * len(arguments)
    for i, g in zip(DIFFERENTIABLE, drop_absent([arguments[i] for i in DIFFERENTIABLE], found), strict=True):
        gradients[i] = g
    return tuple(gradients)


attention_forward = register("attention", f"({ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
attention_backward = register(
    "attention_backward",
    f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, {ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register_gradient("attention", _gradient, _setup)
