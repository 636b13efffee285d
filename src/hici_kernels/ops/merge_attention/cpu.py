"""merge_attention in C++: csrc/cpu/kernels/merge_attention.cpp.

Every part is read once, in place. Sums in float32 (float64 for float64). Results do not depend on the number of
threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ...rope import working_dtype


def unavailable() -> str | None:
    return _native.status()


def rejects(outs: list[Tensor], lses: list[Tensor]) -> str | None:
    if outs[0].device.type != "cpu":
        return f"it serves CPU tensors, outs[0] is on {outs[0].device}"
    return None


def forward(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    first = outs[0]
    out = torch.empty(first.shape, dtype=first.dtype)
    lse = torch.empty(lses[0].shape, dtype=working_dtype(first.dtype))
    _native.library().merge_attention_forward(*_native.execution(), out, lse, *map(_rows, outs), *lses)
    return out, lse


def backward(grad_out: Tensor, grad_lse: Tensor, outs: list[Tensor], lses: list[Tensor]) -> list[Tensor]:
    gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (*outs, *lses)]
    _native.library().merge_attention_backward(
        *_native.execution(), _rows(grad_out), grad_lse.contiguous(), *map(_rows, outs), *lses, *gradients
    )
    return gradients


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
