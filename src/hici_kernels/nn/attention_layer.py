"""What the attention layers share: projections, norms, rotation."""

from __future__ import annotations

from torch import Tensor, nn

from .._dispatch import check_impl
from ..rope import Rope
from .layer_checks import check_layer
from .norm import RMSNorm


class AttentionLayer(nn.Module):
    """q, k, v and output projections of a host attention layer, with its optional q/k norms and its RoPE.

    State dict: q_proj, k_proj, v_proj, o_proj (.weight, no bias), q_norm, k_norm (.weight, with qk_norm_eps).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: Rope,
        qk_norm_eps: float | None,
        impl: str | None,
    ) -> None:
        super().__init__()
        check_layer(hidden_size, num_heads, num_kv_heads, head_dim, rope, qk_norm_eps)
        check_impl(impl)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.rope, self.impl = rope, impl
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None

    def project(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [B, S, Hq, D], rotated k and plain v [B, S, Hkv, D] of hidden [B, S, H]."""
        q = self.q_proj(hidden).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.rope.rotate(q, positions), self.rope.rotate(k, positions), v
