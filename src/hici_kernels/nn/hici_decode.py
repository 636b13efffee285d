"""decode="segment": the training semantics, continued from a bounded cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._inference import keeps
from ..ops.attention.api import attention
from ..rope import working_dtype
from .hici_cache import SegmentCache
from .prefix import uses_global, uses_local, uses_slots

if TYPE_CHECKING:
    from .slot_attention import SlotAttention


class _Call(NamedTuple):
    """New tokens: hidden [B, T, H], q, k, v [B, T, heads, D], mask bool [B, T] or None, column int64 [B, T]."""

    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    column: Tensor


def extend(
    layer: SlotAttention,
    cache: SegmentCache,
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    output: Callable[[Tensor], Tensor],
    whole: Tensor | None = None,
) -> Tensor:
    """Append tokens to every row; ``output`` of their contexts [B, T, Hq D]. After an exception the cache is as before.

    whole: the contexts [B, T, Hq, D], where they are known already.
    """
    assert layer.config.segment_len is not None
    saved = cache.snapshot(bool((cache.filled + hidden.shape[1] >= layer.config.segment_len).any()))
    try:
        if whole is None:
            return output(_extend(layer, cache, hidden, q, k, v, mask))
        with torch.no_grad():
            _extend(layer, cache, hidden, q, k, v, mask, attend=False)
        return output(whole.flatten(-2))
    except BaseException:
        cache.restore(saved)
        raise


def _extend(
    layer: SlotAttention,
    cache: SegmentCache,
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    attend: bool = True,
) -> Tensor:
    """Append tokens to every row and return their contexts [B, T, Hq D]; zeros unless ``attend``.

    A call is worked off in rounds: each row fills its own open segment, at most to its end, so that rows of different
    phase need no more rounds than segments they touch. A segment that is full is closed: its slots are built, counted
    into the statistics, and become what the next segment sees. What a call has entered is constant for gradients.
    """
    b, t, _ = hidden.shape
    length = layer.config.segment_len
    assert length is not None
    slots = (layer.config.global_slots if uses_global(layer.config) else 0) + (
        layer.config.num_local_slots if uses_local(layer.config) else 0
    )
    cache.allocate(hidden, k, slots, working_dtype(hidden.dtype))
    column = cache.next_columns(hidden.device)[:, None] + torch.arange(t, device=hidden.device)
    call = _Call(hidden, q, k, v, mask, column)
    remaining = torch.full((b,), t, dtype=torch.int64, device="cpu")
    order = None
    if mask is not None:
        counts = mask.sum(1).cpu()
        if layer.config.cut == "token":  # a row's tokens come first, and only they take places
            order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
            call = _Call(
                _take(hidden, order), _take(q, order), _take(k, order), _take(v, order), None, column.gather(1, order)
            )
            remaining = counts
    else:
        counts = remaining.clone()

    cache.ragged = cache.ragged or mask is not None
    context = torch.zeros_like(q)
    done = torch.zeros(b, dtype=torch.int64, device="cpu")
    while bool((remaining > done).any()):
        take = torch.minimum(length - cache.filled, remaining - done)
        if bool((take == take[0]).all() and (done == done[0]).all()):
            at, used = None, None
            columns = slice(int(done[0]), int(done[0] + take[0]))
            piece = _Call(*(None if x is None else x[:, columns] for x in call))  # type: ignore[arg-type]
            if attend:
                context[:, columns] = _attend(layer, cache, piece, piece.mask)
        else:
            steps = torch.arange(int(take.max()), device="cpu")
            used = (steps < take[:, None]).to(hidden.device)
            at = torch.minimum(done[:, None] + steps, torch.tensor(t - 1, device="cpu")).to(hidden.device)
            piece = _Call(*(None if x is None else _take(x, at) for x in call))  # type: ignore[arg-type]
            if attend:
                part = _attend(layer, cache, piece, used if piece.mask is None else used & piece.mask)
                rows = torch.arange(b, device=at.device)[:, None].expand_as(at)
                context = context.index_put((rows[used], at[used]), part[used])
        _enter(cache, piece, used, take)
        done = done + take
        full = (cache.filled == length).nonzero()[:, 0]
        if len(full):
            _close(layer, cache, full)
    cache.advance(counts, t)
    if order is not None:
        index = order[:, :, None, None].expand_as(context)
        context = torch.zeros_like(context).scatter(1, index, context)
    return context.flatten(-2)


def _attend(layer: SlotAttention, cache: SegmentCache, piece: _Call, token: Tensor | None) -> Tensor:
    """Attention of new tokens to [slots, recurrence, open segment, themselves]; token bool [B, t], None = all."""
    held = int(cache.filled.max())
    history = bool(cache.has_history.any())
    recurrence = cache.recurrence_k.shape[1] if history else 0
    seen = None
    if token is not None or cache.ragged:
        if token is None:
            token = torch.ones(piece.q.shape[:2], dtype=torch.bool, device=piece.q.device)
        seen = torch.cat((cache.recurrence_seen[:, :recurrence], cache.seen[:, :held], token), 1)
    slots = history and cache.slot_k.shape[1] > 0
    slot_k, slot_v, has_history = cache.slot_k[:, None], cache.slot_v[:, None], cache.has_history[:, None]
    if torch.is_grad_enabled():
        # copies: closing a segment writes into the buffers, which would invalidate what autograd saved of them
        slot_k, slot_v, has_history = slot_k.clone(), slot_v.clone(), has_history.clone()
    return attention(
        piece.q,
        torch.cat((cache.recurrence_k[:, :recurrence], cache.k[:, :held], piece.k), 1),
        torch.cat((cache.recurrence_v[:, :recurrence], cache.v[:, :held], piece.v), 1),
        attention_mask=seen,
        local_k=slot_k if slots else None,
        local_v=slot_v if slots else None,
        prefix_mask=has_history.to(piece.q.device) if slots and cache.ragged else None,
        impl=layer.impl,
    )


@torch.no_grad()
@keeps
def _enter(cache: SegmentCache, piece: _Call, used: Tensor | None, take: Tensor) -> None:
    """Write new columns behind the filled part of every row's open segment."""
    b, width = piece.column.shape
    filled = cache.filled
    seen = torch.ones_like(piece.column, dtype=torch.bool) if piece.mask is None else piece.mask
    sources = (piece.hidden, piece.k, piece.v, seen, piece.column)
    targets = (cache.hidden, cache.k, cache.v, cache.seen, cache.column)
    if used is None and bool((filled == filled[0]).all()):
        start = int(filled[0])
        for target, source in zip(targets, sources, strict=True):
            target[:, start : start + width] = source
    else:
        device = piece.column.device
        real = used if used is not None else torch.ones(b, width, dtype=torch.bool, device=device)
        rows = torch.arange(b, device=device)[:, None].expand(b, width)[real]
        columns = (filled[:, None] + torch.arange(width, device="cpu")).to(device)[real]
        for target, source in zip(targets, sources, strict=True):
            target[rows, columns] = source[real].to(target.dtype)
    cache.filled = filled + take


@torch.no_grad()
def _close(layer: SlotAttention, cache: SegmentCache, rows: Tensor) -> None:
    """Turn the full open segments of ``rows`` into slots and recurrence, and open the next ones."""
    config = layer.config
    at = rows.to(cache.seen.device)
    mask = cache.seen[at]
    cache.closed[at] = torch.maximum(cache.closed[at], torch.where(mask, cache.column[at] + 1, 0).amax(1))
    filled_at, filled_rows = at, rows
    if config.empty == "skip" and cache.ragged:
        some = mask.any(1)
        filled_at, filled_rows, mask = at[some], rows[some.cpu()], mask[some]
    if len(filled_rows):
        if uses_slots(config):
            local = layer.local_constructor(cache.hidden[filled_at], mask if cache.ragged else None)[:, 0]
            kept = []
            if uses_global(config):
                kept.append(layer.global_integrator(local, stats=_statistics(cache, filled_at, local)))
            if uses_local(config):
                kept.append(local)
            slot_k, slot_v = layer.project_slots(torch.cat(kept, 1))
            assert slot_k is not None and slot_v is not None
            # under autocast keys may come back from their rotation in another dtype than projections have
            cache.slot_k[filled_at] = slot_k.to(cache.slot_k.dtype)
            cache.slot_v[filled_at] = slot_v.to(cache.slot_v.dtype)
        r = config.recurrence_len
        if r:
            cache.recurrence_k[filled_at] = cache.k[filled_at, -r:]
            cache.recurrence_v[filled_at] = cache.v[filled_at, -r:]
            cache.recurrence_seen[filled_at] = mask[:, -r:]
        cache.has_history[filled_rows] = True
    cache.seen[at] = False
    cache.filled[rows] = 0


def _statistics(cache: SegmentCache, rows: Tensor, local: Tensor) -> Tensor:
    """Count slots [b, M, H] into the running statistics of ``rows`` and return them, [b, 5, H] in local.dtype.

    The pairwise update of mean and squared deviations, which does not cancel where the mean is large.
    """
    x = local.to(cache.mean.dtype)
    m = x.shape[1]
    old = cache.count[rows][:, None]
    total = old + m
    mean = x.mean(1)
    delta = mean - cache.mean[rows]
    squares = (x - mean[:, None]).square().sum(1)
    first = old == 0
    cache.squares[rows] += squares + delta.square() * old * m / total
    cache.mean[rows] += delta * m / total
    cache.largest[rows] = torch.where(first, x.amax(1), torch.maximum(cache.largest[rows], x.amax(1)))
    cache.smallest[rows] = torch.where(first, x.amin(1), torch.minimum(cache.smallest[rows], x.amin(1)))
    cache.count[rows] = total[:, 0]
    mean = cache.mean[rows]
    std = (cache.squares[rows] / total).sqrt().clamp(min=1e-6)
    unit = mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return torch.stack((mean, cache.largest[rows], cache.smallest[rows], std, unit), 1).to(local.dtype)


def _take(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(1, at.view(*at.shape, *(1 for _ in x.shape[2:])).expand(-1, -1, *x.shape[2:]))
