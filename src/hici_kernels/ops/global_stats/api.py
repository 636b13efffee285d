"""global_stats: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._dispatch import check_impl
from ..._library import call
from .op import global_stats_forward


def global_stats(
    local: Tensor,
    *,
    causal: bool = False,
    valid: Tensor | None = None,
    cu_segments: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Five statistics per channel over the slots of all segments (HiCI, arXiv 2603.20843).

    Formula, over the k slot vectors x that count (all M slots of every valid segment), per channel:
        row 0: mean = sum x / k
        row 1: max x
        row 2: min x
        row 3: std  = max( sqrt( sum (x - mean)^2 / k ), 1e-6 )
        row 4: mean / max( ||mean||_2, 1e-6 ), the norm taken over the H channels
    causal=True gives them for every segment i, over segments 0..i. Where no slot counts, all five rows are 0.

    Args:
        local: [B, N, M, H], the M slots of N segments; any strides with a contiguous last dimension.
        causal: running statistics over segments 0..i instead of all segments.
        valid: bool [B, N]; False = the segment is left out, its values (NaN included) are never read into a result.
        cu_segments: int32 [docs+1] from 0 to N, B == 1: packed documents, document d owns segments
            cu_segments[d] .. cu_segments[d+1]-1 and gets statistics of its own. Contents are trusted on a device.
        impl: implementation name, or None for the fastest that serves the call.

    Returns:
        In local.dtype: [B, 5, H]; causal [B, N, 5, H]; packed [docs, 5, H]; packed and causal [1, N, 5, H], restarting
        at every document. N = 0 and B = 0 give zeros or empty results.

        Differentiable once in ``local``. max and min send their gradient to the first of equal entries in (segment,
        slot) order. Where the std is at its floor (variance <= 1e-12) row 3 has gradient 0; where the norm is at its
        floor it is a constant of row 4. Variances are sums of squared deviations, never a difference of large
        numbers; accumulation in float32 (float64 for float64). Deterministic on the CPU. float32, bfloat16, float16,
        float64. NaN or inf in a valid segment reach the statistics they belong to.

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    usual = _checks.usual(local, 4)
    if not usual:
        _checks.tensor("local", local, "B, N, M, H")
        _checks.floats(local=local)
    b, n, m, h = local.shape
    if m < 1:
        raise ValueError(f"local must have at least 1 slot per segment, got shape {tuple(local.shape)}")
    if h < 1:
        raise ValueError(f"local must have at least 1 channel, got shape {tuple(local.shape)}")
    if not usual:
        _checks.last_contiguous(local=local)
    _checks.boolean("causal", causal)
    if valid is not None:
        _checks.tensor("valid", valid, "B, N")
        if valid.dtype != torch.bool:
            raise TypeError(f"valid must be bool, got {valid.dtype}")
        _checks.shape("valid", valid, (b, n), "B, N")
        if valid.device != local.device:
            raise ValueError(f"valid is on {valid.device}, expected {local.device} like local")
    if cu_segments is not None:
        _checks.offsets("cu_segments", cu_segments, n)
        if b != 1:
            raise ValueError(f"cu_segments needs batch 1 (packed documents), got local with batch {b}")
        if cu_segments.device != local.device:
            if cu_segments.device.type != "cpu":
                raise ValueError(f"cu_segments is on {cu_segments.device}, expected {local.device} like local")
            cu_segments = cu_segments.to(local.device, non_blocking=True)
    return call(global_stats_forward, local, causal, valid, cu_segments, check_impl(impl))
