"""hga_summaries in C++ (csrc/cpu/hga_summaries.h): one pass over the keys, sums in float32.

Results do not depend on the number of threads. A chunk's summaries are a function of its own keys, so a cache forms
those of the chunk it has just closed with :func:`into`, straight into its tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native


def unavailable() -> str | None:
    return _native.status()


def rejects(k: Tensor, *rest: object) -> str | None:
    if not k.is_cpu:
        return f"it serves CPU tensors, k is on {k.device}"
    if k.dtype == torch.float64:
        return "it serves float32, bfloat16 and float16, k is float64"
    return None


def forward(
    k: Tensor, inv_freq: Tensor, positions: Tensor | None, chunk_size: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """(chunk_keys [B, n, Hkv, D], group_keys [B, n, M, Hkv, D])."""
    return of_rows(k, inv_freq, positions, None, chunk_size, group_size)


def of_rows(
    k: Tensor, inv_freq: Tensor, positions: Tensor | None, columns: Tensor | None, chunk_size: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """The same with token j of row b in column ``columns[b, j]``; int64 [B, S], None = j."""
    b, s, hkv, d = k.shape
    n = s // chunk_size
    chunk_keys = k.new_empty(b, n, hkv, d)
    group_keys = k.new_empty(b, n, chunk_size // group_size, hkv, d)
    into(k, inv_freq, positions, chunk_size, group_size, chunk_keys, group_keys, columns=columns)
    return chunk_keys, group_keys


def into(
    k: Tensor,
    inv_freq: Tensor,
    positions: Tensor | None,
    chunk_size: int,
    group_size: int,
    chunk_keys: Tensor,
    group_keys: Tensor,
    *,
    columns: Tensor | None = None,
) -> None:
    """Write the summaries of k [B, S, Hkv, D] into chunk_keys [B, n, Hkv, D] and group_keys [B, n, M, Hkv, D].

    The tables may have any strides with a contiguous last dim (a slice of a larger table); dtype as k.
    """
    if positions is not None:
        positions = positions.to(torch.int64).expand(k.shape[0], k.shape[1])
    _native.library().hga_summaries(
        k,
        inv_freq.to("cpu", torch.float64),
        positions,
        columns,
        chunk_size,
        group_size,
        chunk_keys,
        group_keys,
        *_native.execution(),
    )
