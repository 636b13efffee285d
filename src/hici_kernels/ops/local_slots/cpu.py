"""local_slots in C++: csrc/cpu/local_slots.h says how a call is cut, kernels/local_slots*.cpp how it is computed.

Sums in float32. Results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native


def unavailable() -> str | None:
    return _native.status()


def rejects(hidden: Tensor, *rest: object) -> str | None:
    if not hidden.is_cpu:
        return f"it serves CPU tensors, hidden is on {hidden.device}"
    if hidden.dtype == torch.float64:
        return "it serves float32, bfloat16 and float16, hidden is float64"
    if hidden.shape[-1] > 1 and hidden.stride(-1) != 1:
        return f"it serves hidden contiguous in its last dimension, got strides {hidden.stride()}"
    return None


def forward(
    hidden: Tensor,
    slot_queries: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    num_heads: int,
    segment_len: int,
    total_segments: int,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    empty: str,
) -> Tensor:
    out = torch.empty((hidden.shape[0], total_segments, *slot_queries.shape), dtype=hidden.dtype)
    _native.library().local_slots_forward(
        hidden,
        *(_rows(x) for x in (slot_queries, k_weight, v_weight)),
        num_heads,
        segment_len,
        _mask(attention_mask),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        empty == "uniform",
        out,
        *_native.execution(),
    )
    return out


def backward(
    grad_out: Tensor,
    hidden: Tensor,
    slot_queries: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    num_heads: int,
    segment_len: int,
    total_segments: int,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    empty: str,
) -> tuple[Tensor, ...]:
    """Gradients of (hidden, slot_queries, k_weight, v_weight)."""
    inputs = (hidden, slot_queries, k_weight, v_weight)
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in inputs)
    _native.library().local_slots_backward(
        grad_out.contiguous(),
        hidden,
        *(_rows(x) for x in inputs[1:]),
        num_heads,
        segment_len,
        _mask(attention_mask),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        empty == "uniform",
        *gradients,
        *_native.execution(),
    )
    return gradients


def _rows(x: Tensor) -> Tensor:
    """Weights are small beside hidden: one that is not contiguous in its last dimension is copied."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _mask(attention_mask: Tensor | None) -> Tensor | None:
    return attention_mask if attention_mask is None or attention_mask.dtype == torch.bool else attention_mask != 0
