"""hga_route: the public function."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ... import _checks
from ..._dispatch import check_impl
from ...config import HGAConfig
from ..hga_summaries.api import check_integers
from .op import route_forward


def hga_route(
    q: Tensor,
    chunk_keys: Tensor,
    group_keys: Tensor,
    config: HGAConfig,
    *,
    positions: Tensor | None = None,
    super_keys: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """The groups that every query opens.

    Formula (HGA, arXiv 2606.30709), for query t at index p, head h, kv head h // (Hq // Hkv), C = chunk_size:
        n = p // C;  f = min(F, n);  l = min(max(F, n - W), n);  pool = chunks [f, l)
        sigma[c] = q_t . chunk_keys[c], c in pool              picks: the min(Kc, l - f) highest
        W = 0 and n > f: chunk n - 1 replaces the lowest pick unless it is among them
        gamma[g] = q_t . group_keys[g], g in a picked chunk    opened: the min(Kg, Kc M) highest
    Equal scores: the lowest id first. A positive factor on q never changes a route, so there is no scale here.

    config.routing:
        "strict"   the formula; route[t] depends on q[t] and on closed chunks before it only.
        "prefix"   every score is its maximum over the queries of this call that lie in the same chunk, up to t.
                   Depends on no later query.
        "block"    the authors' rule. The queries of a row are cut into blocks: from its first query of this call, of at
                   most route_block queries, ending at chunk ends. Per block, picks and materialised groups come from
                   the maximum score over the whole block, later queries included (this is the leak); query t opens a
                   materialised group if it or an earlier query of the block has the group among its own
                   topk_groups // 2 best candidates and its chunk among its own topk_chunks best. With W = 0, chunk
                   n - 1 is visible to every query of the block.
        For "prefix" and "block" the indices of a row must increase along t.
    config.super_chunk X > 0 ("strict"): of the super-chunks s with chunks [s X, (s + 1) X) inside the pool, only the
        chunks of the min(topk_supers, all) highest q_t . super_keys[s] stay in the pool, and those in no such s.

    config.share "kv": each score is the maximum over the query heads of a kv group, which then share their route.

    Args:
        q: [B, T, Hq, D], roped.
        chunk_keys, group_keys: [B, n, Hkv, D] and [B, n, M, Hkv, D] of :func:`hga_summaries`, M as in config.
        config: :class:`HGAConfig`.
        positions: int [B, T], index of each query in its row; negative = a query that opens nothing. Default: the last
            T of the first max(T, n C) indices; a query in the middle of an open chunk needs its index given. Contents
            are not checked: chunks that are not among the n are not picked.
        super_keys: [B, n // X, Hkv, D] of :func:`super_chunk_keys`, as a cache keeps them; default: formed anew.
        impl: implementation name, or None for the fastest that serves the call.

    Returns:
        int32 [B, T, Hq, topk_groups], global group ids chunk * M + group, ascending, unused entries -1 at the end.
        Scores are float32 (float64 for float64) from the stored values and depend on their query and key row alone,
        in one order: ids do not depend on how queries are split over calls ("strict"). Not differentiable.
        Deterministic, the same on every device up to the inputs.

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    q, chunk_keys, group_keys = _checks.autocast(q, chunk_keys, group_keys)  # type: ignore[assignment]
    check_config(config)
    _checks.tensor("q", q, "B, T, Hq, D")
    _checks.tensor("chunk_keys", chunk_keys, "B, n, Hkv, D")
    _checks.tensor("group_keys", group_keys, "B, n, M, Hkv, D")
    b, _, hq, d = q.shape
    n, hkv = chunk_keys.shape[1], chunk_keys.shape[2]
    _checks.shape("chunk_keys", chunk_keys, (b, n, hkv, d), "B, n, Hkv, D")
    _checks.shape("group_keys", group_keys, (b, n, config.groups_per_chunk, hkv, d), "B, n, M, Hkv, D")
    _checks.floats(q=q, chunk_keys=chunk_keys, group_keys=group_keys)
    _checks.last_contiguous(q=q, chunk_keys=chunk_keys, group_keys=group_keys)
    _checks.heads("q", hq, "chunk_keys", hkv)
    if d < 1:
        raise ValueError(f"q must have head_dim at least 1, got shape {tuple(q.shape)}")
    check_positions(positions, q)
    if super_keys is not None:
        if not config.super_chunk:
            raise ValueError("super_keys must be None with config.super_chunk 0")
        _checks.tensor("super_keys", super_keys, "B, n // X, Hkv, D")
        _checks.shape("super_keys", super_keys, (b, n // config.super_chunk, hkv, d), "B, n // X, Hkv, D")
        _checks.floats(q=q, super_keys=super_keys)
        _checks.last_contiguous(super_keys=super_keys)
        super_keys = super_keys.detach()
    routes = route_forward(
        q.detach(),
        chunk_keys.detach(),
        group_keys.detach(),
        positions,
        0,
        *budgets(config),
        check_impl(impl),
        super_keys,
    )
    return pad_routes(routes, config)


def pad_routes(routes: Tensor, config: HGAConfig) -> Tensor:
    """The operation returns as many entries as the text can fill; -1 up to the budget."""
    return F.pad(routes, (0, config.topk_groups - routes.shape[-1]), value=-1)


def check_config(config: object) -> None:
    if not isinstance(config, HGAConfig):
        raise TypeError(f"config must be an HGAConfig, got {type(config).__name__}")


def check_positions(positions: object, q: Tensor) -> None:
    """None, or int [B, T] beside q [B, T, Hq, D]."""
    if positions is not None:
        check_integers("positions", positions, q.device)
        assert isinstance(positions, Tensor)
        _checks.shape("positions", positions, tuple(q.shape[:2]), "B, T")


def budgets(config: HGAConfig) -> tuple[int, int, int, int, int, str, int, str, int, int]:
    """The fields that the operations' schemas list from ``chunk_size`` to ``topk_supers``."""
    return (
        config.chunk_size,
        config.keep_first,
        config.keep_last,
        config.topk_chunks,
        config.topk_groups,
        config.routing,
        config.route_block,
        config.share,
        config.super_chunk,
        config.topk_supers,
    )
