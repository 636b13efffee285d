"""attention in C++: csrc/cpu/attention.h says how a call is cut, csrc/cpu/kernels/attention_*.cpp how it is computed.

Sums in float32. Results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native


def unavailable() -> str | None:
    return _native.status()


def rejects(q: Tensor, *rest: object) -> str | None:
    if not q.is_cpu:
        return f"it serves CPU tensors, q is on {q.device}"
    if q.dtype == torch.float64:
        return "it serves float32, bfloat16 and float16, q is float64"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    b, t, hq, _ = q.shape
    # half the time of an allocation by shape, which a call for one query would notice
    out = torch.empty_like(q) if q.is_contiguous() else torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(b, hq, t, dtype=torch.float32)
    _native.library().attention_forward(q, k, v, *_plain(rest), out, lse, *_native.execution())
    return out, lse


def backward(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    """Gradients of (q, k, v, global_k, global_v, local_k, local_v); an absent input gives an empty tensor."""
    q, k, v, *rest = arguments
    inputs = (q, k, v, *rest[2:6])
    gradients = [torch.empty(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else None for x in inputs]
    if grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    _native.library().attention_backward(
        grad_out, grad_lse.contiguous(), out, lse, q, k, v, *_plain(tuple(rest)), *gradients, *_native.execution()
    )
    return tuple(grad_out.new_empty(0) if g is None else g for g in gradients)


def _plain(rest: tuple[object, ...]) -> list[object]:
    """The schema's arguments after q, k, v as the library takes them: bool masks, contiguous offsets."""
    given = list(rest)
    mask, cu_seqlens = given[7], given[8]
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        given[7] = mask != 0
    if isinstance(cu_seqlens, Tensor):
        given[8] = cu_seqlens.contiguous()
    return given
