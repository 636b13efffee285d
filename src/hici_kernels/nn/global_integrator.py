"""GlobalIntegrator: statistics of all slots, compressed into K global slots."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks, segments
from .._dispatch import check_impl
from ..ops.global_stats.api import global_stats
from .layer_checks import check_like_weights


def _compressor(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.LayerNorm(outputs, eps=1e-5))


class GlobalIntegrator(nn.Module):
    """Multi-view statistics of all slots, compressed into K global slots (HiCI, arXiv 2603.20843).

    Formula, s_1..s_5 the statistics of :func:`hici_kernels.global_stats`:
        z_r = LN(W_e LN(W_c s_r)), one W_c, W_e for all r        (shared_compress_dim given)
        z_r = LN_r(W_r s_r)                                      (shared_compress_dim None)
        G   = softplus(expand_scale_param) * W_x W_o MHA(W_q global_queries, W_k z, W_v z)

    Args:
        hidden_size: H.
        global_slots: K.
        num_heads: attention heads, a divisor of the width.
        compress_dim: width D.
        shared_compress_dim: C of the shared compressor; C >= D needs no expansion W_e and makes C the width. None =
            five separate compressors.

    State dict, as published: global_queries [K, D]; expand_scale_param []; shared_compressor.{0.weight, 1.weight,
    1.bias} and, if C < D, stat_expand.{0.weight, 1.weight, 1.bias}; or stat_compressors.{0..4}.{0.weight, 1.weight,
    1.bias}; {q,k,v,o}_proj.weight [D, D]; expand.weight [H, D].

    Leaks: causal=False makes G depend on all tokens of the sequence. causal=True makes G_i depend on segments 1..i, so
    only a token of a later segment may see it.
    """

    def __init__(
        self,
        hidden_size: int,
        global_slots: int = 4,
        num_heads: int = 8,
        compress_dim: int = 512,
        shared_compress_dim: int | None = 128,
        *,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("hidden_size", hidden_size),
            ("global_slots", global_slots),
            ("num_heads", num_heads),
            ("compress_dim", compress_dim),
        ):
            _checks.integer(name, value, 1)
        if shared_compress_dim is not None:
            _checks.integer("shared_compress_dim", shared_compress_dim, 1)
        check_impl(impl)
        width = max(compress_dim, shared_compress_dim or 0)
        if width % num_heads:
            raise ValueError(f"num_heads must divide the width {width} of the integrator, got {num_heads}")
        self.hidden_size, self.num_heads, self.impl = hidden_size, num_heads, impl
        self.stat_compressors: nn.ModuleList | None = None
        self.shared_compressor: nn.Sequential | None = None
        self.stat_expand: nn.Sequential | None = None
        if shared_compress_dim is None:
            self.stat_compressors = nn.ModuleList(_compressor(hidden_size, width) for _ in range(5))
        else:
            self.shared_compressor = _compressor(hidden_size, shared_compress_dim)
            if shared_compress_dim < width:
                self.stat_expand = _compressor(shared_compress_dim, width)
        self.global_queries = nn.Parameter(torch.empty(global_slots, width))
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, hidden_size, bias=False)
        # softplus of this is 0.1: G starts small beside the tokens
        self.expand_scale_param = nn.Parameter(torch.tensor(math.log(math.expm1(0.1))))
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(self.expand.weight, std=0.02 / math.sqrt(width))
        nn.init.xavier_uniform_(self.global_queries)

    @torch.no_grad()
    def init_queries(self, embedding: Tensor) -> None:
        """Published start of global_queries: the K largest rows of ``embedding`` [vocab, H], compressed."""
        _checks.tensor("embedding", embedding, "vocab, H")
        k = self.global_queries.shape[0]
        if embedding.shape[0] < k or embedding.shape[1] != self.hidden_size:
            raise ValueError(
                f"embedding must be [at least {k}, {self.hidden_size}], got shape {tuple(embedding.shape)}"
            )
        rows = embedding[embedding.float().norm(dim=1).topk(k).indices].to(self.global_queries)
        if self.stat_compressors is not None:
            self.global_queries.copy_(self.stat_compressors[0](rows))
        else:
            self.global_queries.copy_(self._shared(rows))

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared_compressor is not None
        x = self.shared_compressor(x)
        return x if self.stat_expand is None else self.stat_expand(x)

    def forward(
        self,
        local: Tensor,
        causal: bool = False,
        valid: Tensor | None = None,
        cu_segments: Tensor | None = None,
        *,
        stats: Tensor | None = None,
    ) -> Tensor:
        """Global slots of local [B, N, M, H].

        Args:
            causal: G_i of segments 1..i.
            valid: bool [B, N]; False = the segment is left out.
            cu_segments: int32 [docs+1], B == 1: packed documents, segments before each.
            stats: [..., 5, H], compressed to [..., K, H] instead of those of ``local`` (decoding keeps running ones).

        Returns:
            [B, K, H]; [B, N, K, H] if causal or packed (every segment then carries its document's slots).

        Raises:
            TypeError, ValueError: before any work, naming the argument. local and stats must have the weights' dtype,
                except under torch.autocast.
        """
        if stats is not None:
            if not isinstance(stats, Tensor):
                raise TypeError(f"stats must be a tensor [..., 5, hidden_size], got {type(stats).__name__}")
            if stats.shape[-2:] != (5, self.hidden_size):
                raise ValueError(f"stats must be [..., 5, hidden_size {self.hidden_size}], got {list(stats.shape)}")
            check_like_weights("stats", stats, self.global_queries)
            return self.compress(stats)
        _checks.tensor("local", local, "B, N, M, H")
        _checks.shape("local", local, (*local.shape[:3], self.hidden_size), "B, N, M, hidden_size")
        check_like_weights("local", local, self.global_queries)
        stats = global_stats(local, causal=causal, valid=valid, cu_segments=cu_segments, impl=self.impl)
        slots = self.compress(stats)
        if cu_segments is not None and not causal:
            return slots[segments.document_of(cu_segments.to(slots.device), local.shape[1])].unsqueeze(0)
        return slots

    def compress(self, stats: Tensor) -> Tensor:
        """Global slots [..., K, H] of statistics [..., 5, H]."""
        if self.stat_compressors is not None:
            z = torch.stack([f(stats[..., r, :]) for r, f in enumerate(self.stat_compressors)], -2)
        else:
            z = self._shared(stats)
        q = self._heads(self.q_proj(self.global_queries))
        k, v = self._heads(self.k_proj(z)), self._heads(self.v_proj(z))
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)  # [..., heads, K, 5]
        o = (p @ v).transpose(-3, -2).flatten(-2)
        return F.softplus(self.expand_scale_param) * self.expand(self.o_proj(o))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
