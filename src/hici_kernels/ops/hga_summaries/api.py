"""hga_summaries: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ..._dispatch import check_impl
from ...config import LARGEST_CHUNK
from ...rope import Rope
from .op import summaries_forward


def hga_summaries(
    k: Tensor,
    *,
    rope: Rope,
    positions: Tensor | None = None,
    chunk_size: int = 64,
    group_size: int = 16,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One key for every closed chunk and one for every group of it.

    Formula (HGA, arXiv 2606.30709), for a set T of consecutive roped keys k_j, w = inv_freq, R(x) = rotation by x
    positions, pair i = dims (i, i + rotary_dim/2):
        tok(T) = mean_j k_j                          pairs that turn fast within a chunk
        anc(T) = mean_j R(a_T - j) k_j               slow pairs: all keys turned to the anchor a_T, then averaged
        K(T)   = tok(T) where i < cut, anc(T) where i >= cut
        cut    = 1 + max{i: max(1, C - 1) w_i > 0.5}, 0 if there is no such i; C = chunk_size, also for groups
        a_T    = (len(T) - 1) // 2 counted from the first token of T
    Dims beyond rotary_dim are plain means. An attention factor is already in the keys, so R is a unit rotation.

    Args:
        k: [B, S, Hkv, D], roped.
        rope: of the keys; only inv_freq is read.
        positions: int [S] or [B, S], RoPE positions of the keys; default consecutive. Only differences within a chunk
            matter: an offset changes nothing.
        chunk_size: C tokens, at most 1,048,576; the S mod C tokens of the last, open chunk are left out.
        group_size: tokens per group, divides C; M = C / group_size.
        impl: implementation name, or None for the fastest that serves the call.

    Returns:
        (chunk_keys [B, n, Hkv, D], group_keys [B, n, M, Hkv, D]) in k.dtype, n = S // C. Sums are kept in float32
        (float64 for float64) in one fixed order: a chunk gives the same bits however many others are summarised with
        it. Not differentiable: the results carry no gradient. Deterministic.

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    (k,) = _checks.autocast(k)  # type: ignore[assignment]
    _checks.tensor("k", k, "B, S, Hkv, D")
    _checks.floats(k=k)
    _checks.last_contiguous(k=k)
    b, s, _, d = k.shape
    if d < 1:
        raise ValueError(f"k must have head_dim at least 1, got shape {tuple(k.shape)}")
    check_rope(rope, d)
    _checks.integer("chunk_size", chunk_size, 1, LARGEST_CHUNK)
    _checks.integer("group_size", group_size, 1, LARGEST_CHUNK)
    if chunk_size % group_size:
        raise ValueError(f"group_size must divide chunk_size {chunk_size}, got {group_size}")
    if positions is not None:
        check_integers("positions", positions, k.device)
        if tuple(positions.shape) not in ((s,), (b, s)):
            raise ValueError(f"positions must be [S] = [{s}] or [B, S] = [{b}, {s}], got {list(positions.shape)}")
    chunk_keys, group_keys = summaries_forward(
        k.detach(), rope.frequencies(k.device), positions, chunk_size, group_size, check_impl(impl)
    )
    return chunk_keys, group_keys


def check_rope(rope: object, head_dim: int) -> None:
    if not isinstance(rope, Rope):
        raise TypeError(f"rope must be a Rope, got {type(rope).__name__}")
    rope.check_head_dim(head_dim)


def check_integers(name: str, value: object, device: torch.device) -> None:
    """An integer tensor on ``device``; contents are not read."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integer, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device}")
