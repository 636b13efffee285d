"""local_slots: the formula in eager torch, one segment at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import vjp
from ...rope import working_dtype
from ...segments import Span, spans


def segment_slots(
    x: Tensor, slot_queries: Tensor, k_weight: Tensor, v_weight: Tensor, num_heads: int, mask: Tensor | None, empty: str
) -> Tensor:
    """Slots of one segment: softmax_t(q_m . (W_k x_t) / sqrt(E/h)) weighted sum of W_v x_t, per head.

    x [B, L, H]; slot_queries [M, E]; k_weight, v_weight [E, H]; mask [B, L] bool or None. Returns [B, M, E] in the
    working dtype. A row without tokens gives 0 (empty="zero") or the mean of W_v x_t over its columns ("uniform").
    """
    b, length, _ = x.shape
    m, e = slot_queries.shape
    if mask is not None:
        some = mask.any(1)
        if empty == "uniform":
            mask = mask | ~some[:, None]
            slot_queries = torch.where(some[:, None, None], slot_queries, 0.0)  # equal scores: uniform weights
        # a masked column may hold NaN: it is replaced by 0, since 0 * NaN would reach the sums
        x = torch.where(mask[:, :, None], x, 0.0)
    q = slot_queries.expand(b, m, e).reshape(b, m, num_heads, e // num_heads)
    k = (x @ k_weight.T).reshape(b, length, num_heads, e // num_heads)
    v = (x @ v_weight.T).reshape(b, length, num_heads, e // num_heads)
    s = torch.einsum("bmhd,blhd->bhml", q, k) * (e // num_heads) ** -0.5
    if mask is not None:
        s = s.masked_fill(~mask[:, None, None], -torch.inf)
    # shifted by the maximum, not by the log-sum-exp: the rounding of a large one would reach every weight
    top = s.detach().amax(-1, keepdim=True)
    p = torch.exp(s - torch.where(top == -torch.inf, 0.0, top))
    total = p.sum(-1, keepdim=True)
    p = p / torch.where(total > 0, total, 1.0)
    return torch.einsum("bhml,blhd->bmhd", p, v).reshape(b, m, e)


class _Problem:
    """The arguments of one call, cut into segments."""

    def __init__(
        self,
        hidden: Tensor,
        slot_queries: Tensor,
        k_weight: Tensor,
        v_weight: Tensor,
        num_heads: int,
        segment_len: int,
        total_segments: int,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        empty: str,
    ) -> None:
        self.inputs = (hidden, slot_queries, k_weight, v_weight)
        self.num_heads, self.empty = num_heads, empty
        self.mask = None if attention_mask is None else attention_mask != 0
        self.spans = spans(hidden.shape[1], segment_len or None, cu_seqlens)
        if len(self.spans) != total_segments:
            raise ValueError(f"total_segments must be {len(self.spans)} for these cu_seqlens, got {total_segments}")

    def formula(self, span: Span, x: Tensor, slot_queries: Tensor, k_weight: Tensor, v_weight: Tensor) -> Tensor:
        dtype = working_dtype(x.dtype)
        parts = [y.to(dtype) for y in (x, slot_queries, k_weight, v_weight)]
        mask = None if self.mask is None else self.mask[:, span.start : span.stop]
        return segment_slots(parts[0], parts[1], parts[2], parts[3], self.num_heads, mask, self.empty)


def forward(*arguments: object) -> Tensor:
    """[B, N, M, E] in hidden.dtype; arguments as the operation's schema up to ``empty``."""
    problem = _Problem(*arguments)  # type: ignore[arg-type]
    hidden, slot_queries, *weights = problem.inputs
    out = hidden.new_empty((hidden.shape[0], len(problem.spans), *slot_queries.shape))
    with torch.no_grad():
        for i, span in enumerate(problem.spans):
            x = hidden[:, span.start : span.stop]
            out[:, i] = problem.formula(span, x, slot_queries, *weights).to(out.dtype)
    return out


def backward(grad_out: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    """Gradients of (hidden, slot_queries, k_weight, v_weight); sums kept in the working dtype, in segment order."""
    problem = _Problem(*arguments)  # type: ignore[arg-type]
    hidden = problem.inputs[0]
    dtype = working_dtype(hidden.dtype)
    parameters = [x.to(dtype) for x in problem.inputs[1:]]
    sums = [torch.zeros_like(x) for x in parameters]
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    for i, span in enumerate(problem.spans):
        columns = slice(span.start, span.stop)
        grads = vjp(
            lambda *x, at=span: problem.formula(at, *x),
            (hidden[:, columns].to(dtype), *parameters),
            (grad_out[:, i].to(dtype),),
        )
        grad_hidden[:, columns] = grads[0].to(hidden.dtype)
        for total, part in zip(sums, grads[1:], strict=True):
            total += part
    return (grad_hidden, *(s.to(hidden.dtype) for s in sums))
