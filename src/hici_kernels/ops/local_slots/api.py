"""local_slots: the public function."""

from __future__ import annotations

from torch import Tensor

from ... import _checks, segments
from ..._dispatch import check_impl
from ..._library import call
from .op import local_slots_forward


def local_slots(
    hidden: Tensor,
    slot_queries: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    *,
    num_heads: int,
    segment_len: int | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    empty: str = "zero",
    total_segments: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """M slots attend to the tokens of every segment.

    Formula (HiCI, arXiv 2603.20843), slot m, head h, segment i with tokens x_t:
        a_t = softmax_t( slot_queries[m, h] . (k_weight x_t)[h] / sqrt(E / num_heads) )
        out[i, m, h] = sum_t a_t (v_weight x_t)[h]
    Without positions, so the order of tokens inside a segment does not matter.

    Args:
        hidden: [B, S, H].
        slot_queries: [M, E], already projected.
        k_weight, v_weight: [E, H].
        num_heads: heads, a divisor of E.
        segment_len: tokens per segment, N = ceil(S/segment_len), the last may be short. None = one (per document).
        attention_mask: [B, S], nonzero = token, any pattern; masked columns are never read into a result.
        cu_seqlens: int32 [docs+1], B == 1: packed documents; N counts the segments of all documents in order.
        empty: a segment without tokens gives "zero", or "uniform" (the mean over its existing columns).
        total_segments: N; needed where cu_seqlens cannot be read for free (on a device, while tracing).
        impl: implementation name, or None for the fastest that serves the call.

    Returns:
        [B, N, M, E] in hidden.dtype. Differentiable once in hidden, slot_queries, k_weight and v_weight; sums are kept
        in float32 at least. Deterministic. float32, bfloat16, float16, float64. Under torch.autocast, tensors are cast
        to the autocast dtype.

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    hidden, slot_queries, k_weight, v_weight = _checks.autocast(  # type: ignore[assignment]
        hidden, slot_queries, k_weight, v_weight
    )
    _checks.tensor("hidden", hidden, "B, S, H")
    _checks.tensor("slot_queries", slot_queries, "M, E")
    _checks.tensor("k_weight", k_weight, "E, H")
    _checks.tensor("v_weight", v_weight, "E, H")
    _checks.floats(hidden=hidden, slot_queries=slot_queries, k_weight=k_weight, v_weight=v_weight)
    h = hidden.shape[2]
    e = slot_queries.shape[1]
    if h < 1:
        raise ValueError(f"hidden must have at least 1 channel, got shape {tuple(hidden.shape)}")
    if e < 1:
        raise ValueError(f"slot_queries must have width at least 1, got shape {tuple(slot_queries.shape)}")
    _checks.shape("k_weight", k_weight, (e, h), "E, H")
    _checks.shape("v_weight", v_weight, (e, h), "E, H")
    _checks.integer("num_heads", num_heads, 1)
    if e % num_heads:
        raise ValueError(f"num_heads must divide the width {e} of slot_queries, got {num_heads}")
    total = check_segments(hidden, segment_len, attention_mask, cu_seqlens, total_segments)
    _checks.choice("empty", empty, ("zero", "uniform"))
    return call(
        local_slots_forward,
        hidden,
        slot_queries,
        k_weight,
        v_weight,
        num_heads,
        0 if segment_len is None else segment_len,
        total,
        attention_mask,
        cu_seqlens,
        empty,
        check_impl(impl),
    )


def check_segments(
    hidden: Tensor,
    segment_len: int | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    total_segments: int | None,
) -> int:
    """N of hidden [B, S, H], once everything that says how it is cut has been checked."""
    b, s, _ = hidden.shape
    if segment_len is not None:
        _checks.integer("segment_len", segment_len, 1)
    if attention_mask is not None:
        _checks.token_mask("attention_mask", attention_mask, b, s, hidden.device)
    if total_segments is not None:
        _checks.integer("total_segments", total_segments, 0)
    return resolve_total(s, segment_len, cu_seqlens, total_segments, b)


def resolve_total(
    length: int, segment_len: int | None, cu_seqlens: Tensor | None, total_segments: int | None, batch: int
) -> int:
    """N, from shapes, from readable offsets or from ``total_segments``; the latter must agree where both are known."""
    if cu_seqlens is None:
        total = segments.count(length, segment_len)
    else:
        if batch != 1:
            raise ValueError(f"cu_seqlens needs batch 1 (packed documents), got hidden with batch {batch}")
        _checks.offsets("cu_seqlens", cu_seqlens, length)
        if not _checks.readable(cu_seqlens):
            if total_segments is None:
                raise ValueError(
                    "total_segments must be given where cu_seqlens cannot be read without a synchronisation "
                    f"(device {cu_seqlens.device}), got None"
                )
            return total_segments
        total = segments.count_packed(cu_seqlens, segment_len)
    if total_segments is not None and total_segments != total:
        raise ValueError(f"total_segments must be {total} here, got {total_segments}")
    return total
