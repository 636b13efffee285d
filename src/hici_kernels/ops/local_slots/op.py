"""local_slots: schema, shapes and gradient of the torch.library operation.

``segment_len`` 0 stands for one segment (per document).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._dispatch import select
from ..._library import fake_gradients, register, register_gradient

ARGUMENTS = (
    "Tensor hidden, Tensor slot_queries, Tensor k_weight, Tensor v_weight, SymInt num_heads, SymInt segment_len, "
    "SymInt total_segments, Tensor? attention_mask, Tensor? cu_seqlens, str empty, str impl"
)


def _select(arguments: tuple[Any, ...], impl: str) -> Any:
    return select("local_slots", impl, *arguments)


def _forward(*arguments: Any) -> Tensor:
    *given, impl = arguments
    return _select(tuple(given), impl).forward(*given)


def _forward_fake(hidden: Tensor, slot_queries: Tensor, *rest: Any) -> Tensor:
    m, e = slot_queries.shape
    return hidden.new_empty((hidden.shape[0], rest[4], m, e))


def _backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, impl = arguments
    return _select(tuple(given), impl).backward(grad_out, *given)


def _backward_fake(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return fake_gradients(arguments[:4])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = {i: x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    ctx.at = tuple(tensors)
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*tensors.values())


def _gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    arguments = list(ctx.rest)
    for i, x in zip(ctx.at, ctx.saved_tensors, strict=True):
        arguments[i] = x
    found = local_slots_backward(grad_out, *arguments)
    return (*found, *(None for _ in arguments[4:]))


local_slots_forward = register("local_slots", f"({ARGUMENTS}) -> Tensor", _forward, _forward_fake)
local_slots_backward = register(
    "local_slots_backward",
    f"(Tensor grad_out, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register_gradient("local_slots", _gradient, _setup)
