"""hga_summaries in Triton: one launch, one pass over the keys, sums in float32.

A chunk's summaries are a function of its own keys, so a cache forms those of the chunk it has just closed with
:func:`into`, straight into its tables. float32, bfloat16, float16; not float64. Infinities in keys give results that
are not finite where the reference's are not, but which of them are inf and which NaN may differ: a chunk's key is
turned twice, from its tokens to the anchor of their group and from there to its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ..._triton import rejects_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 512
LARGEST_GRID = 65535


def rejects(k: Tensor, *rest: Any) -> str | None:
    from ..attention.triton_forward import INTERPRET

    if k.dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, k is {k.dtype}"
    foreign = rejects_device("k", k, INTERPRET.value)
    if foreign is not None:
        return foreign
    if k.shape[-1] > LARGEST_HEAD:
        return f"it serves head_dim up to {LARGEST_HEAD}, k has {k.shape[-1]}"
    if k.shape[0] > LARGEST_GRID:
        return f"it serves a batch of at most {LARGEST_GRID}, k has shape {tuple(k.shape)}"
    if k.shape[1] * k.shape[2] >= 2**31:
        return f"it serves fewer than 2^31 keys per batch row, k has shape {tuple(k.shape)}"
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
    chunk_keys = k.new_empty((b, n, hkv, d))
    group_keys = k.new_empty((b, n, chunk_size // group_size, hkv, d))
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
    from .triton_kernel import summarise

    b, s, hkv, d = k.shape
    n, half = s // chunk_size, inv_freq.shape[0]
    if b * n * hkv == 0:
        return
    inv_freq = inv_freq.to(k.device)
    if inv_freq.dtype not in (torch.float32, torch.float64):
        inv_freq = inv_freq.float()
    if columns is not None:
        columns = columns.contiguous()
    steps = (0, 0) if positions is None else positions.expand(b, s).stride()
    arch = tuning.architecture(k.device)
    config = tuning.configuration("hga_summaries", arch, head_dim=d, segment_len=chunk_size, dtype=k.dtype)
    rest = d - 2 * half
    with torch.cuda.device_of(k):
        summarise[(n * hkv, b)](
            k,
            inv_freq.contiguous(),
            positions,
            columns,
            chunk_keys,
            group_keys,
            *k.stride()[:3],
            *steps,
            s if columns is not None else 0,
            *chunk_keys.stride()[:3],
            *group_keys.stride()[:4],
            n,
            hkv,
            CHUNK=chunk_size,
            GROUP=group_size,
            HALF=half,
            HEAD_DIM=d,
            PAIRS=_power(half),
            REST=_power(rest) if rest else 0,
            BLOCK_S=min(config["BLOCK_S"], _power(group_size)),
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )


def _power(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(value - 1, 0).bit_length()
