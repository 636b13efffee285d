"""Segments: how a sequence, or packed documents, are cut."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Columns [start, stop) of one segment; ``first`` = it opens its document."""

    start: int
    stop: int
    first: bool


def count(length: int, segment_len: int | None) -> int:
    """Number of segments of a sequence: ceil(length / segment_len); None = one segment."""
    if segment_len is None:
        return 1 if length else 0
    return -(-length // segment_len)


def count_packed(cu_seqlens: Tensor, segment_len: int | None) -> int:
    """Number of segments over all documents. Reads ``cu_seqlens`` (a synchronisation on a device)."""
    entries = cu_seqlens.tolist()
    return sum(count(b - a, segment_len) for a, b in itertools.pairwise(entries))


def spans(length: int, segment_len: int | None, cu_seqlens: Tensor | None) -> list[Span]:
    """All segments in order. Reads ``cu_seqlens``."""
    entries = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    found = []
    for a, b in itertools.pairwise(entries):
        step = segment_len or max(b - a, 1)
        found += [Span(s, min(s + step, b), s == a) for s in range(a, b, step)]
    return found


def cu_segments(cu_seqlens: Tensor, segment_len: int) -> Tensor:
    """int32 [docs+1]: segments before each document, by tensor operations alone."""
    # int64, and rounded up without a sum: segment_len may be as large as an integer can be
    per_document = -torch.div(-cu_seqlens.diff().long(), segment_len, rounding_mode="floor")
    return torch.nn.functional.pad(per_document.cumsum(0), (1, 0)).to(torch.int32)


def document_of(offsets: Tensor, total: int) -> Tensor:
    """int64 [total]: which document element 0..total-1 lies in, given its offsets [docs+1]."""
    at = torch.arange(total, device=offsets.device, dtype=offsets.dtype)
    # an element past the last offset (only where trusted contents are wrong) stays in the last document
    return torch.searchsorted(offsets, at, right=True).sub(1).clamp(0, max(offsets.shape[0] - 2, 0))


def segment_of(cu_seqlens: Tensor, segment_len: int, total: int) -> Tensor:
    """int64 [total]: segment number of every column of packed documents."""
    document = document_of(cu_seqlens, total)
    inside = torch.arange(total, device=cu_seqlens.device) - cu_seqlens.long()[document]
    return cu_segments(cu_seqlens, segment_len)[document] + torch.div(inside, segment_len, rounding_mode="floor")
