"""global_stats in C++: csrc/cpu/global_stats.cpp. One pass over memory forward, two backward."""

from __future__ import annotations

from torch import Tensor

from ... import _native


def unavailable() -> str | None:
    return _native.status()


def rejects(local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> str | None:
    if not local.is_cpu:
        return f"it serves CPU tensors, local is on {local.device}"
    _, n, m, _ = local.shape
    if n * m >= 2**31:
        return f"it serves fewer than 2^31 slots per batch row, local has shape {tuple(local.shape)}"
    return None


def forward(local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> Tensor:
    b, n, _, h = local.shape
    # sizes one by one: a tuple of them takes half as long again to read
    if causal:
        out = local.new_empty(b, n, 5, h)
    else:
        out = local.new_empty(b if cu_segments is None else cu_segments.shape[0] - 1, 5, h)
    _native.library().global_stats_forward(local, causal, valid, _plain(cu_segments), out, *_native.execution())
    return out


def backward(grad_out: Tensor, local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> Tensor:
    grad = local.new_empty(local.shape)
    given = (grad_out.contiguous(), local, causal, valid, _plain(cu_segments), grad, *_native.execution())
    _native.library().global_stats_backward(*given)
    return grad


def _plain(cu_segments: Tensor | None) -> Tensor | None:
    return None if cu_segments is None else cu_segments.contiguous()
