"""hga_summaries: schema and shapes of the torch.library operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._dispatch import select
from ..._library import register

NAMES = ("k", "inv_freq", "positions", "chunk_size", "group_size")


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, impl = arguments
    return select("hga_summaries", impl, *given).forward(*given)


def _forward_fake(k: Tensor, inv_freq: Tensor, positions: Any, chunk_size: int, group_size: int, impl: str) -> Any:
    b, s, hkv, d = k.shape
    n = s // chunk_size
    return k.new_empty((b, n, hkv, d)), k.new_empty((b, n, chunk_size // group_size, hkv, d))


summaries_forward = register(
    "hga_summaries",
    "(Tensor k, Tensor inv_freq, Tensor? positions, SymInt chunk_size, SymInt group_size, str impl) -> "
    "(Tensor, Tensor)",
    _forward,
    _forward_fake,
)
