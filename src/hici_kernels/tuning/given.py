"""What an implementation's backward is called with, by those who call it without autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def backward_arguments(
    op: str, outs: tuple[Tensor, ...], arguments: tuple[Any, ...], gradient: Callable[[Tensor], Tensor]
) -> tuple[Any, ...]:
    """Arguments of ``ops/<op>``'s backward after a forward of ``arguments`` gave ``outs``.

    gradient: that of an output; made for those that have one, in their order.
    """
    if op == "hga_attention":
        out, lse, routes = outs
        return (gradient(out), gradient(lse), out, lse, *arguments[:6], routes, *arguments[7:])
    grads = tuple(gradient(x) for x in outs)
    return (*grads, *(outs if op == "attention" else ()), *arguments)
