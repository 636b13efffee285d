"""global_stats: the formula in eager torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import vjp
from ...rope import working_dtype
from ...segments import document_of

STD_FLOOR = 1e-6
NORM_FLOOR = 1e-6


class Moments(NamedTuple):
    """Of a set of slot vectors, per channel: count [B, 1]; mean, sum of squared deviations, max, min [B, H]."""

    count: Tensor
    mean: Tensor
    squares: Tensor
    largest: Tensor
    smallest: Tensor


def floored_sqrt(x: Tensor, floor: float) -> Tensor:
    """max(sqrt(x), floor), with gradient 0 at and below the floor."""
    above = x > floor**2
    return torch.where(above, torch.where(above, x, 1.0).sqrt(), floor)


def rows(s: Moments) -> Tensor:
    """[B, 5, H]: mean, max, min, std, mean/||mean||; all 0 for an empty set."""
    some = s.count > 0
    std = floored_sqrt(s.squares / torch.where(some, s.count, 1.0), STD_FLOOR)
    norm = floored_sqrt(s.mean.square().sum(-1, keepdim=True), NORM_FLOOR)
    stats = torch.stack((s.mean, s.largest, s.smallest, std, s.mean / norm), 1)
    return torch.where(some.unsqueeze(1), stats, 0.0)


def moments(x: Tensor, valid: Tensor) -> Moments:
    """Of all M slots of the valid segments. x [B, N, M, H], 0 where invalid; valid bool [B, N]. Two passes."""
    b, n, m, h = x.shape
    count = valid.sum(1, keepdim=True).to(x.dtype) * m
    safe = torch.where(count > 0, count, 1.0)
    mean = x.sum((1, 2)) / safe
    inside = valid[:, :, None, None]
    deviation = torch.where(inside, x - mean[:, None, None], 0.0)
    flat = torch.where(inside, x, -torch.inf).reshape(b, n * m, h)
    # argmax names the first of equal entries: the whole gradient goes there
    largest = x.reshape(b, n * m, h).gather(1, flat.argmax(1, keepdim=True))[:, 0]
    flat = torch.where(inside, x, torch.inf).reshape(b, n * m, h)
    smallest = x.reshape(b, n * m, h).gather(1, flat.argmin(1, keepdim=True))[:, 0]
    return Moments(count, mean, deviation.square().sum((1, 2)), largest, smallest)


def union(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets: the pairwise update, which does not cancel where the mean is large."""
    count = a.count + b.count
    safe = torch.where(count > 0, count, 1.0)
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / safe)
    squares = a.squares + b.squares + delta.square() * (a.count * b.count / safe)
    # strict comparison: of equal entries the earlier one stays and gets the gradient
    take_max = (b.count > 0) & ((a.count == 0) | (b.largest > a.largest))
    take_min = (b.count > 0) & ((a.count == 0) | (b.smallest < a.smallest))
    return Moments(
        count,
        mean,
        squares,
        torch.where(take_max, b.largest, a.largest),
        torch.where(take_min, b.smallest, a.smallest),
    )


def running(x: Tensor, valid: Tensor, first: Tensor) -> Tensor:
    """[B, N, 5, H]: statistics of segments up to and with each, since the last one marked ``first`` [N]."""
    b, n, _, h = x.shape
    empty = Moments(x.new_zeros(b, 1), *(x.new_zeros(b, h) for _ in range(4)))
    state, found = empty, []
    for i in range(n):
        state = Moments(*(torch.where(first[i], e, s) for e, s in zip(empty, state, strict=True)))
        state = union(state, moments(x[:, i : i + 1], valid[:, i : i + 1]))
        found.append(rows(state))
    return torch.stack(found, 1) if found else x.new_zeros(b, 0, 5, h)


def global_stats(local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> Tensor:
    """Statistics in the working dtype: [B, 5, H]; causal [B, N, 5, H]; packed [docs, 5, H]."""
    b, n, _, h = local.shape
    x = local.to(working_dtype(local.dtype))
    if valid is None:
        valid = torch.ones(b, n, dtype=torch.bool, device=x.device)
    # an invalid segment may hold NaN: it is replaced by 0, since 0 * NaN would reach the sums
    x = torch.where(valid[:, :, None, None], x, 0.0)
    if cu_segments is None and not causal:
        return rows(moments(x, valid)) if n else x.new_zeros(b, 5, h)
    at = torch.arange(n, device=x.device)
    cu_segments = None if cu_segments is None else cu_segments.to(x.device)
    if cu_segments is None:
        return running(x, valid, at == 0)
    stats = running(x, valid, at == cu_segments.long()[document_of(cu_segments, n)])
    if causal:
        return stats
    lengths, last = cu_segments.diff(), (cu_segments[1:].long() - 1).clamp(min=0)
    if n == 0:
        return x.new_zeros(lengths.shape[0], 5, h)
    return torch.where((lengths > 0)[:, None, None], stats[0, last], 0.0)


def forward(local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> Tensor:
    with torch.no_grad():
        return global_stats(local, causal, valid, cu_segments).to(local.dtype)


def backward(
    grad_stats: Tensor, local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None
) -> Tensor:
    wide = grad_stats.to(working_dtype(local.dtype))
    (grad,) = vjp(lambda x: global_stats(x, causal, valid, cu_segments), (local,), (wide,))
    return grad
