"""global_stats: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._dispatch import check_impl
from .op import global_stats_forward


def global_stats(
    local: Tensor,
    *,
    causal: bool = False,
    valid: Tensor | None = None,
    cu_segments: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Multi-view statistics of all slots, per channel.

    Formula (HiCI, arXiv 2603.20843), over the slot vectors x of all (valid) segments:
        mean;  max;  min;  std = max(sqrt(mean((x - mean)^2)), 1e-6);  mean / max(||mean||_2, 1e-6)
    in this order, the norm over all H channels. causal: for each segment i, over segments 0..i.

    Args:
        local: [B, N, M, H].
        causal: one set of statistics per segment.
        valid: bool [B, N]; False = the segment is left out and never read into a result.
        cu_segments: int32 [docs+1], B == 1: packed documents, segments before each; statistics restart at every
            document. On the CPU its contents are checked, on a device they are trusted.
        impl: implementation name, or None for the fastest that serves the call.

    Returns:
        [B, 5, H]; causal [B, N, 5, H]; packed [docs, 5, H], causal [1, N, 5, H]; in local.dtype. An empty set gives 0.
        Differentiable once in local: max and min send their gradient to the first of equal entries (in segment and
        slot order), at the std and norm floors the gradient through them is 0. Sums are kept in float32 at least,
        without cancellation where the mean is large. Deterministic. float32, bfloat16, float16, float64.

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    _checks.tensor("local", local, "B, N, M, H")
    _checks.floats(local=local)
    _checks.last_contiguous(local=local)
    b, n, m, h = local.shape
    if m < 1 or h < 1:
        raise ValueError(f"local must have at least 1 slot and 1 channel, got shape {tuple(local.shape)}")
    _checks.boolean("causal", causal)
    if valid is not None:
        _checks.tensor("valid", valid, "B, N")
        if valid.dtype != torch.bool:
            raise TypeError(f"valid must be bool, got {valid.dtype}")
        _checks.shape("valid", valid, (b, n), "B, N")
        if valid.device != local.device:
            raise ValueError(f"valid is on {valid.device}, expected {local.device} like local")
    if cu_segments is not None:
        if b != 1:
            raise ValueError(f"cu_segments needs batch 1 (packed documents), got local with batch {b}")
        _checks.offsets("cu_segments", cu_segments, n)
    return global_stats_forward(local, causal, valid, cu_segments, check_impl(impl))
