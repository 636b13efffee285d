"""attention: the formula in eager torch, one block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import vjp
from ...rope import working_dtype
from ...segments import spans

# Queries per block: bounds the score matrix at Hq * ROWS * keys numbers. Rows are independent, so it only sets memory.
ROWS = 512


class Block(NamedTuple):
    """Queries [t0, t1) of segment i, which see token keys [k0, k1) and the segment's slots."""

    i: int
    t0: int
    t1: int
    k0: int
    k1: int


def blocks(
    queries: int, keys: int, segment_len: int, recurrence_len: int, cu_seqlens: Tensor | None, causal: bool
) -> Iterator[Block]:
    """Cut all queries into blocks; the queries are the last ``queries`` of the ``keys`` positions."""
    for i, (start, stop, first) in enumerate(spans(keys, segment_len or None, cu_seqlens)):
        k0 = start if first else start - recurrence_len
        for t0 in range(max(start, keys - queries), stop, ROWS):
            t1 = min(t0 + ROWS, stop)
            yield Block(i, t0, t1, k0, t1 if causal else stop)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    slot_seen: Tensor | None,
    token_seen: Tensor | None,
    query_seen: Tensor | None,
    offset: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out_t = sum_j softmax_j(scale q_t . k_j) v_j over the visible j;  lse_t = log sum_j exp(scale q_t . k_j).

    q [B, T, Hq, D]; k, v [B, n, Hkv, D]; slots (global_k, global_v, local_k, local_v) [B, K or M, Hkv, D] or None.
    slot_seen [B] bool; token_seen [B, n] bool; query_seen [B, T] bool; None = all. offset: query t sees tokens up to
    t + offset; None = all of them. Returns out [B, T, Hq, D], lse [B, Hq, T] in the working dtype.
    """
    dtype = working_dtype(q.dtype)
    global_k, global_v, local_k, local_v = slots
    prefix_k = [x for x in (global_k, local_k) if x is not None]
    prefix_v = [x for x in (global_v, local_v) if x is not None]
    slot_count = sum(x.shape[1] for x in prefix_k)
    b, t, hq, d = q.shape
    n, hkv = k.shape[1], k.shape[2]

    seen = torch.ones(b, t, slot_count + n, dtype=torch.bool, device=q.device)
    if offset is not None:
        seen[:, :, slot_count:] = torch.ones(t, n, dtype=torch.bool, device=q.device).tril(offset)
    if slot_seen is not None:
        seen[:, :, :slot_count] &= slot_seen[:, None, None]
    if token_seen is not None:
        seen[:, :, slot_count:] &= token_seen[:, None, :]
    if query_seen is not None:
        seen &= query_seen[:, :, None]

    # what nobody sees may hold NaN: it is replaced by 0, since 0 * NaN would reach the sums
    used = seen.any(1)[:, :, None, None]
    alive = seen.any(2)[:, :, None, None]
    keys = torch.where(used, torch.cat([*prefix_k, k], 1).to(dtype), 0.0)
    values = torch.where(used, torch.cat([*prefix_v, v], 1).to(dtype), 0.0)
    queries = torch.where(alive, q.to(dtype), 0.0).reshape(b, t, hkv, hq // hkv, d)

    s = torch.einsum("btgrd,bngd->bgrtn", queries, keys) * scale
    s = s.masked_fill(~seen[:, None, None], -torch.inf)
    # shifted by the maximum, not by lse: the rounding of a large lse would reach every weight
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(s - top)
    total = weights.sum(-1, keepdim=True)
    some = total != 0  # NaN included: it is no query without keys
    total = torch.where(some, total, 1.0)
    lse = torch.where(some, top + total.log(), -torch.inf).squeeze(-1)
    p = weights / total
    out = torch.einsum("bgrtn,bngd->btgrd", p, values).reshape(b, t, hq, d)
    # the same for the gradient that a query without keys is given
    return torch.where(alive, out, 0.0), lse.reshape(b, hq, t)


class _Problem:
    """The arguments of one call and the views a block needs of them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segment_len: int,
        recurrence_len: int,
        global_k: Tensor | None,
        global_v: Tensor | None,
        local_k: Tensor | None,
        local_v: Tensor | None,
        prefix_mask: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        causal: bool,
        scale: float,
    ) -> None:
        self.inputs = (q, k, v, global_k, global_v, local_k, local_v)
        self.prefix_mask = prefix_mask
        self.mask = None if attention_mask is None else attention_mask != 0
        self.causal, self.scale = causal, scale
        self.first_query = k.shape[1] - q.shape[1]
        self.blocks = list(blocks(q.shape[1], k.shape[1], segment_len, recurrence_len, cu_seqlens, causal))

    def views(self, tensors: tuple[Tensor | None, ...], block: Block) -> list[Tensor | None]:
        """The parts of (q, k, v, global_k, global_v, local_k, local_v), or of their gradients, that a block touches."""
        q, k, v, *slots = tensors
        assert q is not None and k is not None and v is not None
        f = self.first_query
        parts = [q[:, block.t0 - f : block.t1 - f], k[:, block.k0 : block.k1], v[:, block.k0 : block.k1]]
        return parts + [None if x is None else x[:, block.i] if x.ndim == 5 else x for x in slots]

    def formula(self, block: Block, *parts: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, *slots = parts
        assert q is not None and k is not None and v is not None
        slot_seen = None
        if self.prefix_mask is not None:
            slot_seen = self.prefix_mask[..., block.i].expand(q.shape[0])
        token_seen = None if self.mask is None else self.mask[:, block.k0 : block.k1]
        query_seen = None if self.mask is None else self.mask[:, block.t0 : block.t1]
        offset = block.t0 - block.k0 if self.causal else None
        four = (slots[0], slots[1], slots[2], slots[3])
        return block_attention(q, k, v, four, slot_seen, token_seen, query_seen, offset, self.scale)


def forward(*arguments: object) -> tuple[Tensor, Tensor]:
    """(out [B, T, Hq, D] in q.dtype, lse [B, Hq, T]); arguments as the operation's schema up to ``scale``."""
    problem = _Problem(*arguments)  # type: ignore[arg-type]
    q = problem.inputs[0]
    assert q is not None
    b, t, hq, _ = q.shape
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((b, hq, t), -torch.inf, dtype=working_dtype(q.dtype), device=q.device)
    f = problem.first_query
    with torch.no_grad():
        for block in problem.blocks:
            part, part_lse = problem.formula(block, *problem.views(problem.inputs, block))
            out[:, block.t0 - f : block.t1 - f] = part.to(q.dtype)
            lse[:, :, block.t0 - f : block.t1 - f] = part_lse
    return out, lse


def backward(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    """Gradients of (q, k, v, global_k, global_v, local_k, local_v); an absent input gives an empty tensor.

    Sums over queries and segments are kept in the working dtype, in block order.
    """
    problem = _Problem(*arguments)  # type: ignore[arg-type]
    dtype = working_dtype(grad_out.dtype)
    sums = tuple(None if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device) for x in problem.inputs)
    f = problem.first_query
    for block in problem.blocks:
        rows = slice(block.t0 - f, block.t1 - f)
        parts = [None if x is None else x.to(dtype) for x in problem.views(problem.inputs, block)]
        grads = vjp(
            lambda *x, at=block: problem.formula(at, *x), parts, (grad_out[:, rows].to(dtype), grad_lse[:, :, rows])
        )
        for total, part in zip(problem.views(sums, block), grads, strict=True):
            if total is not None:
                total += part
    return tuple(grad_out.new_empty(0) if total is None else total.to(grad_out.dtype) for total in sums)
