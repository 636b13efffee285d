"""HGAAttention: an attention layer with routed long-context attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..config import HGAConfig
from ..kv.store import KVStore
from ..ops.hga_attention.api import hga_attention
from ..ops.hga_route.api import check_config
from ..rope import Rope
from .attention_layer import AttentionLayer
from .layer_checks import check_forward


class HGAAttention(AttentionLayer):
    """Hierarchical global attention (HGA, arXiv 2606.30709): exact attention to what a route shows.

    Formula: out = W_o hga_attention(rope(norm(W_q X)), rope(norm(W_k X)), W_v X), see :func:`hga_attention`. No weights
    beyond those of the host layer.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim: as in the host model; num_heads a multiple of num_kv_heads.
        config: :class:`HGAConfig`.
        rope: :class:`Rope` of the host model.
        qk_norm_eps: eps of per-head RMS norms on queries and keys, before RoPE (Qwen3); None = none (Llama).
        layer_idx: the layer of a :class:`KVStore` that this module uses.
        impl: implementation of the operations, or None for the fastest that serves each call.

    Which tokens see their future: routing="strict" and "prefix" leak nothing. "block" leaks: a route is chosen from
    the scores of a whole block, later queries included. Routes have no gradient, so only changing later values shows
    it; the tests do that.

    Decoding through a KVStore is the same semantics: with "strict" and "prefix" any split of the input into calls gives
    the same routes, and outputs equal to rounding.

    State dict: q_proj, k_proj, v_proj, o_proj (.weight, no bias), q_norm, k_norm (.weight, with qk_norm_eps).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        config: HGAConfig,
        *,
        rope: Rope,
        qk_norm_eps: float | None = None,
        layer_idx: int = 0,
        impl: str | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, rope, qk_norm_eps, impl)
        check_config(config)
        _checks.integer("layer_idx", layer_idx, 0)
        self.config, self.layer_idx = config, layer_idx

    def forward(
        self,
        hidden: Tensor,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVStore | None = None,
    ) -> Tensor:
        """Attention over hidden [B, S, H]; the result has its shape and dtype.

        Args:
            positions: int [S] or [B, S], RoPE positions. Default: column index, padding counted, continuing after the
                cache. Ignored at masked tokens.
            attention_mask: [B, S] over the tokens of this call, nonzero = token; masked tokens give 0.
            cu_seqlens: not supported.
            cache: a :class:`KVStore` of the same config, of hidden's device and of the dtype that queries and keys have
                (hidden's, or that of autocast); the tokens are appended to its layer ``layer_idx``. History is
                constant: gradients reach the tokens of this call only.

        Raises:
            TypeError, ValueError: before any work, naming the argument; the cache is then unchanged.
        """
        check_forward(self, hidden, positions, attention_mask)
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens is not supported by HGAAttention, expected None")
        at = torch.arange(hidden.shape[1], device=hidden.device)
        if cache is not None:
            self._check_cache(cache, hidden)
            at = cache.next_columns(self.layer_idx).to(hidden.device)[:, None] + at
        if positions is None:
            positions = at
        if attention_mask is not None:
            # what a masked column holds may be NaN, and 0 * NaN would reach the gradients of the projections
            hidden = torch.where(attention_mask.bool()[..., None], hidden, 0.0)
        q, k, v = self.project(hidden, positions)
        if cache is not None:
            context = cache.attend(self.layer_idx, q, k, v, attention_mask=attention_mask, impl=self.impl)
        else:
            found = hga_attention(q, k, v, self.config, rope=self.rope, attention_mask=attention_mask, impl=self.impl)
            assert isinstance(found, Tensor)
            context = found
        return self.o_proj(context.flatten(-2))

    def _check_cache(self, cache: KVStore, hidden: Tensor) -> None:
        if not isinstance(cache, KVStore):
            raise TypeError(f"cache must be a KVStore, got {type(cache).__name__}")
        if cache.config != self.config:
            raise ValueError("cache was made for another config than that of this layer")
        dtype = _checks.dtype_under_autocast(hidden)
        if cache.dtype != dtype:
            raise TypeError(f"cache has dtype {cache.dtype}, expected {dtype} like the queries and keys of this layer")
        if cache.device != hidden.device:
            raise ValueError(f"cache is on {cache.device}, expected {hidden.device} like hidden")
        for name, held, own in (
            ("batch", cache.batch, hidden.shape[0]),
            ("kv_heads", cache.kv_heads, self.num_kv_heads),
            ("head_dim", cache.head_dim, self.head_dim),
        ):
            if held != own:
                raise ValueError(f"cache has {name} {held}, expected {own}")
        if self.layer_idx >= cache.layers:
            raise ValueError(f"cache has {cache.layers} layers, expected more than layer_idx {self.layer_idx}")
