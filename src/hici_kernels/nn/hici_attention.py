"""HiCIAttention: an attention layer with local and global slots."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import segments
from ..config import HiCIConfig
from ..rope import Rope
from .attention_layer import AttentionLayer
from .hici_cache import HiCICache, SegmentCache, TokenCache
from .layer_checks import check_forward
from .slot_attention import SlotAttention, slot_modules


class HiCIAttention(SlotAttention, AttentionLayer):
    """Segment attention with local and global slots (HiCI, arXiv 2603.20843).

    Formula, per segment i with hidden states X_i:
        L_i = LocalConstructor(X_i);  G = GlobalIntegrator(L_1..L_N)
        out_i = W_o attention(q = X_i W_q;  keys and values of [G, L_i, recurrence, X_i], causal within X_i)
    Slots pass through the layer's own k_proj and v_proj, without RoPE and without k_norm.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim: as in the host model; num_heads a multiple of num_kv_heads.
        config: :class:`HiCIConfig`.
        rope: :class:`Rope` of the host model.
        qk_norm_eps: eps of per-head RMS norms on queries and keys (Qwen3); None = none (Llama).
        impl: implementation of the operations, or None for the fastest that serves each call.

    Which tokens see their future (also with labels shifted, so a perplexity through such a mode is not valid):
        "none"                            every token sees the whole sequence, through G
        "causal_gi", "causal_gi_gonly"    a token sees later tokens of its own segment, through G_i (and L_i)
        "causal_shift", "causal_shift_g"  no token, provided that segment_len is set; with num_segments the cuts, and so
                                          all results, move with the total length
    use_global=False leaves the leak of L_i in "none" and "causal_gi"; with neither slot there is none.

    Decoding: config.decode, see :class:`HiCIConfig`. With "segment", training, prefill and decode are one semantics:
    any split of the input gives the same result to rounding. "full" and "slots" are the published rules: a prompt
    token and a decoded token are computed differently.

    State dict: q_proj, k_proj, v_proj, o_proj (.weight, no bias), q_norm, k_norm (.weight, with qk_norm_eps),
    local_constructor.* and global_integrator.* as published.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        config: HiCIConfig,
        *,
        rope: Rope,
        qk_norm_eps: float | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, rope, qk_norm_eps, impl)
        if not isinstance(config, HiCIConfig):
            raise TypeError(f"config must be a HiCIConfig, got {type(config).__name__}")
        self.config = config
        self.local_constructor, self.global_integrator = slot_modules(hidden_size, config, impl)

    def forward(
        self,
        hidden: Tensor,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: HiCICache | None = None,
        total_segments: int | None = None,
    ) -> Tensor:
        """Attention over hidden [B, S, H]; the result has its shape and dtype.

        Args:
            positions: int [S] or [B, S], RoPE positions. Default: column index, padding counted, continuing after the
                cache, restarting in every packed document. Ignored at masked tokens.
            attention_mask: [B, S] over the tokens of this call, nonzero = token; masked tokens give 0.
            cu_seqlens: int32 [docs+1], B == 1, packed documents; needs config.segment_len; not with a cache.
            cache: of :meth:`new_cache`; on an empty one the call is a prefill, on any other it is decode. History is
                constant: gradients reach the tokens of this call only, and with decode="segment" on a cache that is not
                empty, those of the same segment. TypeError where it holds another dtype than this call's keys.
            total_segments: number of segments over all documents; needed where cu_seqlens cannot be read for free.

        Raises:
            TypeError, ValueError: before any work, naming the argument; the cache is then unchanged.
        """
        check_forward(self, hidden, positions, attention_mask)
        if self.exchange is not None:
            self.exchange.check(self, hidden, attention_mask, cu_seqlens, cache)
        if cu_seqlens is not None:
            total_segments = self.check_packed(hidden, cu_seqlens, attention_mask, cache, total_segments)
            cu_seqlens = cu_seqlens.to(hidden.device)
        if cache is not None:
            expected = SegmentCache if self.config.decode == "segment" else TokenCache
            if not isinstance(cache, expected):
                raise TypeError(f"cache must come from new_cache() of this layer, got {type(cache).__name__}")
            cache.check(hidden.shape[0], self)
        mask = None if attention_mask is None else attention_mask != 0
        tokens = hidden
        if mask is not None and torch.is_grad_enabled():
            # the projections' weight gradients are sums over all columns, and 0 * NaN of a masked one would reach them
            tokens = torch.where(mask.unsqueeze(-1), hidden, 0.0)
            # only here are slots made of masked columns, where a segment has no others; elsewhere they skip them
            if self.config.empty != "uniform" or self.config.cut != "index":
                hidden = tokens
        if positions is None:
            positions = self._default_positions(hidden, cu_seqlens, cache)
        q, k, v = self.project(tokens, positions)
        return self.attend(
            hidden,
            q,
            k,
            v,
            mask=mask,
            cu_seqlens=cu_seqlens,
            total_segments=total_segments,
            cache=cache,
            output=self.o_proj,
        )

    def _default_positions(self, hidden: Tensor, cu_seqlens: Tensor | None, cache: HiCICache | None) -> Tensor:
        s = hidden.shape[1]
        if self.exchange is not None:
            return self.exchange.positions(hidden.device)
        at = torch.arange(s, device=hidden.device)
        if cu_seqlens is not None:
            return at - cu_seqlens[segments.document_of(cu_seqlens, s)]
        return at if cache is None else cache.next_columns(hidden.device)[:, None] + at
