"""global_stats: the formula in eager torch.

Rows are summarised per segment and the summaries merged by Chan's rule, so that running statistics of any number of
documents need no loop over segments and no difference of large sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import vjp
from ...rope import working_dtype
from ...segments import document_of

STD_FLOOR = NORM_FLOOR = 1e-6
VARIANCE_FLOOR = STD_FLOOR**2


class Summary(NamedTuple):
    """Statistics of sets of rows, [B, G, H] each (``rows``: how many, [B, G, 1]).

    mean is relative to a shift per document. Where that lies far from what follows, as the first token of a text may,
    few of its digits are left: enough for squares, but the mean that is shown comes from total.
    """

    rows: Tensor
    total: Tensor  # sum of x, in float64 where there is one
    mean: Tensor
    squares: Tensor  # sum of (x - mean)^2
    top: Tensor
    top_at: Tensor  # row number of the first maximum
    low: Tensor
    low_at: Tensor


def global_stats(local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> Tensor:
    """mean, max, min, max(std, 1e-6), mean / max(||mean||, 1e-6), per document; running over segments if causal."""
    b, n, m, h = local.shape
    if not causal and cu_segments is None:
        # without documents or order, everything is one segment
        keep = local.new_ones((b, n), dtype=torch.bool) if valid is None else valid
        rows = _running(local.reshape(b, 1, n * m, h), keep.repeat_interleave(m, 1).unsqueeze(1), None)
        return rows.squeeze(1)
    keep = local.new_ones((b, n), dtype=torch.bool) if valid is None else valid
    rows = _running(local, keep.unsqueeze(2).expand(b, n, m), cu_segments)
    if causal or cu_segments is None:
        return rows
    if n == 0:
        return local.new_zeros((cu_segments.shape[0] - 1, 5, h))
    last = rows[0, (cu_segments[1:].long() - 1).clamp(0, n - 1)]
    return torch.where((cu_segments.diff() > 0)[:, None, None], last, 0.0)


def _running(local: Tensor, keep: Tensor, cu_segments: Tensor | None) -> Tensor:
    """[B, G, 5, H] of local [B, G, R, H]: over rows with ``keep`` [B, G, R] of groups up to g of g's document."""
    b, g, r, h = local.shape
    if b == 0 or g == 0 or r == 0:
        return local.new_zeros((b, g, 5, h))
    document = _zeros(local, g) if cu_segments is None else document_of(cu_segments, g)
    docs = 1 if cu_segments is None else cu_segments.shape[0] - 1
    # replaced, not multiplied by 0: rows that do not count may hold NaN
    x = torch.where(keep.unsqueeze(-1), local.to(working_dtype(local.dtype)), 0.0)
    shift = _shift(x.detach(), keep, document, docs)
    found = _scan(_summarise(x, keep, shift), document)
    seen = found.rows > 0
    mean = torch.where(seen, found.total / found.rows.clamp(min=1), 0.0).to(x.dtype)
    flat = x.flatten(1, 2)
    top = torch.where(seen, flat.gather(1, found.top_at), 0.0)
    low = torch.where(seen, flat.gather(1, found.low_at), 0.0)
    variance = found.squares / found.rows.clamp(min=1)
    # the inner where keeps the infinite slope of the root at 0 out of the gradient
    flat_std = variance <= VARIANCE_FLOOR
    std = torch.where(flat_std, STD_FLOOR, torch.where(flat_std, 1.0, variance).sqrt())
    square = mean.square().sum(-1, keepdim=True)
    flat_norm = square <= NORM_FLOOR**2
    norm = torch.where(flat_norm, NORM_FLOOR, torch.where(flat_norm, 1.0, square).sqrt())
    rows = (mean, top, low, torch.where(seen, std, 0.0), mean / norm)
    return torch.stack(rows, 2).to(local.dtype)


def _zeros(like: Tensor, count: int) -> Tensor:
    return like.new_zeros(count, dtype=torch.int64)


def _shift(x: Tensor, keep: Tensor, document: Tensor, docs: int) -> Tensor:
    """[B, G, H]: the mean of the first group of each group's document that counts.

    Deviations from it are as large as the spread of the set, so neither mean nor variance loses digits to a common
    offset; an early segment, because the sets that hold few segments are the first ones.
    """
    b, g, _, h = x.shape
    count = keep.sum(2)
    at = torch.where(count > 0, torch.arange(g, device=x.device), g)
    first = at.new_full((b, docs), g).scatter_reduce(1, document.expand(b, g), at, "amin")[:, document]
    mean = x.sum(2) / count.clamp(min=1).unsqueeze(-1)
    return mean.gather(1, first.clamp(max=g - 1).unsqueeze(-1).expand(b, g, h))


def _summarise(x: Tensor, keep: Tensor, shift: Tensor) -> Summary:
    """Statistics of each group of rows by itself."""
    _, g, r, _ = x.shape
    keep = keep.unsqueeze(-1)
    count = keep.sum(2).to(x.dtype)
    moved = torch.where(keep, x - shift.unsqueeze(2), 0.0)
    mean = moved.sum(2) / count.clamp(min=1)
    squares = torch.where(keep, moved - mean.unsqueeze(2), 0.0).square().sum(2)
    group = torch.arange(g, device=x.device).view(1, g, 1) * r
    ends = []
    for fill, extreme in ((-torch.inf, torch.max), (torch.inf, torch.min)):
        end, at = extreme(torch.where(keep, x.detach(), fill), 2)  # torch documents: the first of equal entries
        ends += [end, at + group]
    # what does not count has been replaced by 0
    widest = torch.float32 if x.device.type == "mps" else torch.float64
    return Summary(count, x.sum(2, dtype=widest), mean, squares, *ends)


def _scan(part: Summary, document: Tensor) -> Summary:
    """Running merge along dim 1, restarting where the document changes: after s doublings, group g holds the last
    2^s groups up to g of its document."""
    step, g = 1, part.mean.shape[1]
    while step < g:
        left, right = (Summary(*(t[:, at] for t in part)) for at in (slice(None, -step), slice(step, None)))
        same = (document[step:] == document[:-step]).view(1, -1, 1)
        both = zip(part, _merge(left, right), right, strict=True)
        part = Summary(*(torch.cat((t[:, :step], torch.where(same, new, old)), 1) for t, new, old in both))
        step *= 2
    return part


def _merge(left: Summary, right: Summary) -> Summary:
    """Statistics of the union of two disjoint sets (Chan, Golub and LeVeque 1979); the left one comes first."""
    count = left.rows + right.rows
    share = right.rows / count.clamp(min=1)
    gap = right.mean - left.mean
    mean = left.mean + gap * share
    squares = left.squares + right.squares + gap.square() * (left.rows * share)
    higher = (right.top > left.top) | (right.top.isnan() & ~left.top.isnan())
    lower = (right.low < left.low) | (right.low.isnan() & ~left.low.isnan())
    return Summary(
        count,
        left.total + right.total,
        mean,
        squares,
        torch.where(higher, right.top, left.top),
        torch.where(higher, right.top_at, left.top_at),
        torch.where(lower, right.low, left.low),
        torch.where(lower, right.low_at, left.low_at),
    )


def forward(local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> Tensor:
    with torch.no_grad():
        return global_stats(local, causal, valid, cu_segments)


def backward(grad_out: Tensor, local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> Tensor:
    return vjp(lambda x: global_stats(x, causal, valid, cu_segments), (local,), (grad_out,))[0]
