"""Lists with an entry for every record or page of the history: they grow with it, by eighths."""

from __future__ import annotations

import torch
from torch import Tensor


def room(held: int, count: int) -> int:
    """Entries to make room for when ``count`` are needed."""
    return held if count <= held else max(count, held + held // 8, 64)


def enlarge(old: Tensor, count: int, fill: int = 0) -> Tensor:
    """``old`` [n, ...], or a longer copy with ``fill`` behind it."""
    size = room(len(old), count)
    if size == len(old):
        return old
    new = torch.full((size, *old.shape[1:]), fill, dtype=old.dtype)
    new[: len(old)] = old
    return new


def added(old: Tensor, count: int) -> int:
    """Bytes that :func:`enlarge` needs beside ``old``, which is there until it is copied."""
    size = room(len(old), count)
    return 0 if size == len(old) else size * (old[:1].nbytes if len(old) else _row_bytes(old))


def _row_bytes(empty: Tensor) -> int:
    return torch.Size(empty.shape[1:]).numel() * empty.element_size()
