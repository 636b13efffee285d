"""Attention of tokens to slots and segments, given queries, keys and values, whoever projected them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _checks, segments
from ..config import LEAK_FREE_MODES, HiCIConfig
from ..ops.attention.api import attention
from ..ops.local_slots.api import resolve_total
from .global_integrator import GlobalIntegrator
from .hici_cache import HiCICache, SegmentCache, TokenCache
from .hici_decode import extend
from .local_constructor import LocalConstructor
from .prefix import build_prefix, uses_global, uses_local, uses_slots


class _Tokens(NamedTuple):
    """One arrangement of the tokens: hidden [B, S, H], q [B, S, Hq, D], k and v [B, S, Hkv, D], mask [B, S] or None."""

    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None

    def map(self, arrange: Callable[[Tensor], Tensor], mask: Tensor | None) -> _Tokens:
        """The same tokens in another arrangement."""
        return _Tokens(arrange(self.hidden), arrange(self.q), arrange(self.k), arrange(self.v), mask)

    def row(self, b: int, at: Tensor) -> _Tokens:
        """Columns ``at`` of row ``b``, all of them tokens."""
        return self.map(lambda x: x[b : b + 1, at], None)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def slot_modules(
    hidden_size: int, config: HiCIConfig, impl: str | None = None
) -> tuple[LocalConstructor, GlobalIntegrator]:
    """The two modules a HiCI layer adds to its host, new."""
    local_constructor = LocalConstructor(
        hidden_size,
        config.num_local_slots,
        config.num_heads,
        config.bottleneck_dim,
        "uniform" if config.empty == "uniform" else "zero",
        impl=impl,
    )
    global_integrator = GlobalIntegrator(
        hidden_size,
        config.global_slots,
        config.integrator_num_heads,
        config.integrator_dim,
        config.shared_compress_dim,
        impl=impl,
    )
    return local_constructor, global_integrator


class SlotExchange(Protocol):
    """Segments of one sequence over several processes (:class:`hici_kernels.distributed.ContextParallel`)."""

    def check(
        self,
        layer: SlotAttention,
        hidden: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: HiCICache | None,
    ) -> Any:
        """An error, before any work, where a call cannot be served."""

    def positions(self, device: torch.device) -> Tensor:
        """int64 [S]: RoPE positions of this process's tokens."""

    def attend(
        self,
        layer: SlotAttention,
        hidden: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: HiCICache | None,
    ) -> Tensor:
        """Context [B, S, Hq, D] of this process's tokens."""


class SlotAttention:
    """What :class:`HiCIAttention` does between its projections; a host model with projections of its own uses it too.

    A class that derives from this one has the attributes below and, where slots are not projected by plain k_proj and
    v_proj, its own :meth:`project_slots`.

    exchange: None, or who brings together the slots of a sequence that several processes share.
    """

    config: HiCIConfig
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    impl: str | None
    k_proj: Any  # a linear module, adapters included
    v_proj: Any
    local_constructor: LocalConstructor
    global_integrator: GlobalIntegrator
    exchange: SlotExchange | None = None

    def new_cache(self, batch: int) -> HiCICache:
        """An empty cache for prefill and decode of ``batch`` rows by this layer."""
        _checks.integer("batch", batch, 0)
        if self.config.decode == "segment":
            return SegmentCache(self.config, batch)
        return TokenCache(self.config, batch)

    def check_packed(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        attention_mask: Tensor | None,
        cache: HiCICache | None,
        total_segments: int | None,
    ) -> int:
        """The number of segments of packed documents, or an error that says why this layer cannot take them."""
        if self.config.segment_len is None:
            raise ValueError("cu_seqlens needs config.segment_len, got segment_len=None")
        if cache is not None:
            raise ValueError("cu_seqlens cannot be combined with a cache: packed documents are for training")
        total = resolve_total(hidden.shape[1], self.config.segment_len, cu_seqlens, total_segments, hidden.shape[0])
        if attention_mask is not None and self.config.cut == "token" and not _checks.readable(cu_seqlens):
            raise ValueError(
                f"attention_mask with cu_seqlens on {cu_seqlens.device} and cut='token' would need a synchronisation: "
                "leave masked tokens out of the packed batch"
            )
        return total

    def attend(
        self,
        hidden: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        total_segments: int | None = None,
        cache: HiCICache | None = None,
        output: Callable[[Tensor], Tensor] = _as_it_is,
    ) -> Tensor:
        """``output`` of the heads' contexts [B, S, Hq D], for hidden [B, S, H], roped q [B, S, Hq, D], k and v.

        Args:
            mask: bool [B, S] over the tokens of this call.
            cu_seqlens, total_segments, cache: as of :meth:`HiCIAttention.forward`.
            output: what follows; the cache counts a call only once this has not failed either.

        Raises:
            TypeError, ValueError: the cache holds keys of another dtype or device; it is as before then.
        """
        if cache is not None:
            cache.check_keys(k)
        if self.exchange is not None:
            return output(self.exchange.attend(self, hidden, q, k, v, mask, cu_seqlens, cache).flatten(-2))
        if isinstance(cache, SegmentCache):
            whole = None
            if torch.is_grad_enabled() and cache.fresh and _recorded(hidden, q, k, v, *self._slot_parameters()):
                # gradients flow from segment to segment, which they do not through what a cache holds
                whole = self._prefill(_Tokens(hidden, q, k, v, mask), None, None)[0]
            return extend(self, cache, hidden, q, k, v, mask, output, whole)
        if isinstance(cache, TokenCache) and not cache.empty:
            keys, values, seen = cache.stage(k, v, mask, _recorded(q, k, v))
            out = output(attention(q, keys, values, attention_mask=seen, impl=self.impl).flatten(-2))
            cache.commit(hidden.shape[1], mask)
            return out
        context, local, valid = self._prefill(_Tokens(hidden, q, k, v, mask), cu_seqlens, total_segments)
        out = output(context.flatten(-2))
        if isinstance(cache, TokenCache):
            cache.start(*self._prompt_slots(local, valid))
            cache.stage(k, v, mask)
            cache.commit(hidden.shape[1], mask)
        return out

    def _slot_parameters(self) -> list[Tensor]:
        return [*self.local_constructor.parameters(), *self.global_integrator.parameters()]

    def project_slots(self, slots: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values [..., Hkv, D] of slots [..., H]: no RoPE, no k_norm."""
        if slots is None:
            return None, None
        shape = (self.num_kv_heads, self.head_dim)
        return self.k_proj(slots).unflatten(-1, shape), self.v_proj(slots).unflatten(-1, shape)

    def _prefill(
        self, tokens: _Tokens, cu_seqlens: Tensor | None, total_segments: int | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """By the rule of config.cut: context [B, S, Hq, D], local slots [B, N, M, H] or None, valid [B, N] or None."""
        config, mask = self.config, tokens.mask
        if mask is None:
            return self._segments(tokens, cu_seqlens, total_segments, config.resolve_segment_len(tokens.q.shape[1]))
        if config.cut == "index":
            length = config.resolve_segment_len(tokens.q.shape[1])
            return self._segments(tokens, cu_seqlens, total_segments, length)
        if cu_seqlens is None and config.segment_len is None:
            return self._rows(tokens)
        return self._compacted(tokens, cu_seqlens)

    def _compacted(self, tokens: _Tokens, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """cut="token": the same as cut="index" once every row's tokens stand first."""
        mask = tokens.mask
        assert mask is not None and self.config.segment_len is not None
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        total = None
        if cu_seqlens is not None:
            kept = torch.cat((mask.new_zeros(1, dtype=torch.int32), mask[0].cumsum(0, dtype=torch.int32)))
            # the masked columns end up behind all documents: a last document that has no tokens
            cu_seqlens = torch.cat((kept[cu_seqlens.long()], cu_seqlens[-1:]))
            total = segments.count_packed(cu_seqlens, self.config.segment_len)
        arranged = tokens.map(lambda x: _take(x, order), mask.gather(1, order))
        context, local, valid = self._segments(arranged, cu_seqlens, total, self.config.segment_len)
        return _put(context, order, context.shape), local, valid

    def _rows(self, tokens: _Tokens) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """cut="token" with num_segments: every row has its own segment length, so rows go one by one."""
        assert tokens.mask is not None
        context = torch.zeros_like(tokens.q)
        locals_: list[Tensor | None] = []
        for b in range(tokens.q.shape[0]):
            at = tokens.mask[b].nonzero()[:, 0]
            row = tokens.row(b, at)
            part, local, _ = self._segments(row, None, None, self.config.resolve_segment_len(at.shape[0]))
            context = context.index_put((at.new_full((1,), b), at), part[0])
            locals_.append(local)
        found = [x for x in locals_ if x is not None]
        if not found:
            return context, None, None
        n = max(x.shape[1] for x in found)
        counts = torch.tensor([0 if x is None else x.shape[1] for x in locals_], device=context.device)
        blank = found[0].new_zeros(1, n, *found[0].shape[2:])
        local = torch.cat([blank if x is None else torch.cat((x, blank[:, x.shape[1] :]), 1) for x in locals_])
        return context, local, torch.arange(n, device=context.device) < counts[:, None]

    def _segments(
        self, tokens: _Tokens, cu_seqlens: Tensor | None, total_segments: int | None, segment_len: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Segments of ``segment_len`` columns."""
        config = self.config
        b, s = tokens.q.shape[:2]
        n = resolve_total(s, segment_len, cu_seqlens, total_segments, b)
        cu_segments = None if cu_seqlens is None else segments.cu_segments(cu_seqlens, segment_len)
        has_tokens = None
        if tokens.mask is not None:
            has_tokens = _has_tokens(tokens.mask, cu_seqlens, segment_len, n)
        # with cut="token" a segment without tokens does not exist for that row
        valid = has_tokens if config.empty == "skip" or config.cut == "token" else None
        local, slots_on = None, self._slots_on(tokens.mask, cu_segments, segment_len, n)
        if uses_slots(config) and n > 0 and slots_on is not False:
            local = self.local_constructor(tokens.hidden, tokens.mask, segment_len, cu_seqlens, total_segments=n)
        on = slots_on if isinstance(slots_on, Tensor) else None
        if valid is not None and config.recurrence_len and config.cut == "index":
            context = self._over_gaps(tokens, cu_seqlens, segment_len, local, valid, on)
        else:
            context = self._attend(tokens, cu_seqlens, segment_len, local, valid, cu_segments, on)
        if on is not None:
            valid = on if valid is None else valid & on
        return context, local, valid

    def _slots_on(self, mask: Tensor | None, cu_segments: Tensor | None, segment_len: int, n: int) -> Tensor | bool:
        """Where slots act under single_segment="off": everywhere, nowhere, or bool [B, N]."""
        if self.config.single_segment == "on":
            return True
        if cu_segments is not None:
            return (cu_segments.diff() > 1)[segments.document_of(cu_segments, n)][None]
        if mask is not None and self.config.cut == "token":
            return (mask.sum(1) > segment_len)[:, None].expand(-1, n)
        return n > 1

    def _attend(
        self,
        tokens: _Tokens,
        cu_seqlens: Tensor | None,
        segment_len: int,
        local: Tensor | None,
        valid: Tensor | None,
        cu_segments: Tensor | None,
        slots_on: Tensor | None,
    ) -> Tensor:
        """Segment attention, given the local slots."""
        global_kv: tuple[Tensor | None, Tensor | None] = (None, None)
        local_kv: tuple[Tensor | None, Tensor | None] = (None, None)
        prefix_mask = None
        alone = local is not None and cu_segments is None and local.shape[1] == 1
        if local is not None and not (alone and self.config.context_mode in LEAK_FREE_MODES):
            prefix = build_prefix(
                self.config, local, self.global_integrator, valid=valid, cu_segments=cu_segments, slots_on=slots_on
            )
            global_kv, local_kv = self.project_slots(prefix.global_slots), self.project_slots(prefix.local_slots)
            prefix_mask = prefix.mask
        return attention(
            tokens.q,
            tokens.k,
            tokens.v,
            segment_len=segment_len,
            # with num_segments a short text has segments shorter than recurrence_len: all of the previous one is seen
            recurrence_len=min(self.config.recurrence_len, segment_len),
            global_k=global_kv[0],
            global_v=global_kv[1],
            local_k=local_kv[0],
            local_v=local_kv[1],
            prefix_mask=prefix_mask,
            attention_mask=tokens.mask,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )

    def _over_gaps(
        self,
        tokens: _Tokens,
        cu_seqlens: Tensor | None,
        segment_len: int,
        local: Tensor | None,
        valid: Tensor,
        slots_on: Tensor | None,
    ) -> Tensor:
        """empty="skip" with recurrence: the segment before i is the last one with tokens, however far back.

        The columns of empty segments are taken out and the rest is run as packed documents, one per row (or document).
        Rare, and the only path that reads a mask on the host.
        """
        s = tokens.q.shape[1]
        if bool(valid.all()):
            cu_segments = None if cu_seqlens is None else segments.cu_segments(cu_seqlens, segment_len)
            return self._attend(tokens, cu_seqlens, segment_len, local, None, cu_segments, slots_on)
        at = torch.arange(s, device=valid.device)
        if cu_seqlens is None:
            keep = valid[:, torch.div(at, segment_len, rounding_mode="floor")]
            lengths = keep.sum(1)
        else:
            keep = valid[:, segments.segment_of(cu_seqlens, segment_len, s)]
            before = torch.cat((keep.new_zeros(1, dtype=torch.int64), keep[0].cumsum(0)))
            lengths = before[cu_seqlens.long()].diff()
        packed_cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        packed = tokens.map(lambda x: x[keep][None], None if tokens.mask is None else tokens.mask[keep][None])
        context = self._attend(
            packed,
            packed_cu,
            segment_len,
            None if local is None else local[valid][None],
            None,
            segments.cu_segments(packed_cu, segment_len),
            None if slots_on is None else slots_on.expand_as(valid)[valid][None],
        )
        return torch.zeros_like(tokens.q).masked_scatter(keep[:, :, None, None], context.flatten(0, 1))

    def _prompt_slots(
        self, local: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Keys, values [B, K + N*M, Hkv, D] and mask of what decode="slots" keeps of a prompt."""
        if self.config.decode != "slots" or local is None:
            return None, None, None
        b, n, m, _ = local.shape
        kept, masks = [], []
        on = local.new_ones(b, n, dtype=torch.bool) if valid is None else valid.expand(b, n)
        if uses_global(self.config):
            kept.append(self.global_integrator(local, valid=valid))
            masks.append(on.any(1, keepdim=True).expand(b, kept[-1].shape[1]))
        if uses_local(self.config):
            kept.append(local.flatten(1, 2))
            masks.append(on.repeat_interleave(m, 1))
        k, v = self.project_slots(torch.cat(kept, 1))
        return k, v, torch.cat(masks, 1)


def _recorded(*given: Tensor) -> bool:
    """Whether autograd records what is done with ``given`` tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


def _has_tokens(mask: Tensor, cu_seqlens: Tensor | None, segment_len: int, n: int) -> Tensor:
    """bool [B, N]: segments with at least one token."""
    b, s = mask.shape
    if cu_seqlens is None and n == 1:  # segment_len may be far above the number of columns
        return mask.any(1, keepdim=True)
    if cu_seqlens is None:
        return torch.nn.functional.pad(mask, (0, n * segment_len - s)).view(b, n, segment_len).any(-1)
    segment = segments.segment_of(cu_seqlens, segment_len, s)
    return mask.new_zeros(n, dtype=torch.int64).index_add(0, segment, mask[0].long())[None] > 0


def _take(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.view(*order.shape, *(1 for _ in x.shape[2:])).expand_as(x))


def _put(x: Tensor, order: Tensor, shape: torch.Size) -> Tensor:
    return x.new_zeros(shape).scatter(1, order.view(*order.shape, *(1 for _ in x.shape[2:])).expand_as(x), x)
