"""Documents that are packed into a row and told apart by their positions alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import LIB, register


def one_document(x: Tensor, positions: Tensor | None, method: str) -> Tensor:
    """``x``, if positions [B, S] of a call in which nothing is masked never go back; waits for them once.

    Where transformers cannot see it: under a tracing compiler, and in calls with a cache. An operation, so that a
    compiled graph looks too; ``x`` passes through it, since what nobody uses would not be run.

    Raises:
        ValueError: positions restart, so several documents would be read as one.
    """
    if positions is None or positions.ndim != 2:
        return x
    if torch.compiler.is_compiling():
        return torch.ops.hici.one_document(x, positions, method)
    _check(positions, method)
    return x


def _check(positions: Tensor, method: str) -> None:
    if bool((positions.diff(dim=1) < 0).any()):
        raise ValueError(
            f"position_ids restart within a row, and {method} would read one document: with a cache and under "
            "torch.compile it is not told of several. HiCI sees them by cu_seq_lens_q, or by position_ids without "
            "either, use_cache=False"
        )


def _kernel(x: Tensor, positions: Tensor, method: str) -> Tensor:
    _check(positions, method)
    return x.clone()


OPERATION = register(
    "one_document",
    "(Tensor x, Tensor positions, str method) -> Tensor",
    _kernel,
    lambda x, positions, method: torch.empty_like(x, memory_format=torch.contiguous_format),
)
torch.library.register_autograd(
    "hici::one_document", lambda ctx, grad: (grad, None, None), setup_context=lambda ctx, inputs, output: None, lib=LIB
)
