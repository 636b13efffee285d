"""Keys that stand for several chunks: what a very long history is searched by first."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rope import working_dtype
from .reference import ordered_sum


def super_chunk_keys(chunk_keys: Tensor, super_chunk: int) -> Tensor:
    """Mean of the keys of every ``super_chunk`` consecutive chunks.

    Args:
        chunk_keys: [B, n, Hkv, D] of :func:`hga_summaries`.
        super_chunk: X chunks; the n mod X last ones belong to none yet.

    Returns:
        [B, n // X, Hkv, D] in chunk_keys.dtype; sums in float32 (float64 for float64) in one order, so that a
        super-chunk gives the same bits however many others are formed with it. Not differentiable.
    """
    n = chunk_keys.shape[1] // super_chunk
    with torch.no_grad():
        parts = chunk_keys[:, : n * super_chunk].unflatten(1, (n, super_chunk)).to(working_dtype(chunk_keys.dtype))
        return (ordered_sum(parts, 2) / super_chunk).to(chunk_keys.dtype)
