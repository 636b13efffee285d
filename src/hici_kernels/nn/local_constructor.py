"""LocalConstructor: slots that summarise each segment."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _checks
from .._dispatch import check_impl
from ..ops.local_slots.api import check_segments, local_slots
from .layer_checks import check_like_weights


def weight_of(linear: nn.Module, like: Tensor) -> Tensor:
    """The matrix [out, in] a bias-free linear module applies, adapters included, on the device of ``like``.

    A plain nn.Linear hands out its parameter; anything else (an adapter wrapped around it, weights that are fetched
    only while the module runs) is asked for the images of the unit vectors, which is exact for every linear map.
    """
    base = linear.weight
    assert isinstance(base, Tensor)
    if type(linear) is nn.Linear and base.device.type != "meta":
        return base
    return linear(torch.eye(base.shape[1], dtype=base.dtype, device=like.device)).T


class LocalConstructor(nn.Module):
    """M learnable slots attend to the tokens of every segment (HiCI, arXiv 2603.20843).

    Formula, h heads over width E (bottleneck_dim, or hidden_size without bottleneck):
        q = W_q memory_slots;  K_i = X_i W_k^T;  V_i = X_i W_v^T
        L_i = W_o concat_heads( softmax(q K_i^T / sqrt(E/h)) V_i )
    W_o exists only with a bottleneck. Without positions: L_i does not depend on the order of the segment's tokens.

    Args:
        hidden_size: H.
        num_local_slots: M.
        num_heads: h, divides hidden_size and the width, else ValueError.
        bottleneck_dim: E; None = full width, no output projection (as in the first published version, num_heads=1).
        empty: a segment without tokens gives "zero" (published Flash constructor) or "uniform" (published Multi
            constructor: the mean over its columns).

    State dict, as published: memory_slots [M, H]; q_proj.weight, k_proj.weight, v_proj.weight [E, H]; o_proj.weight
    [H, E] with a bottleneck.

    Leaks: L_i depends on every token of segment i, so a token that sees L_i sees its own segment's future.
    """

    def __init__(
        self,
        hidden_size: int,
        num_local_slots: int = 8,
        num_heads: int = 8,
        bottleneck_dim: int | None = 512,
        empty: str = "zero",
        *,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_local_slots", num_local_slots),
            ("num_heads", num_heads),
        ):
            _checks.integer(name, value, 1)
        if bottleneck_dim is not None:
            _checks.integer("bottleneck_dim", bottleneck_dim, 1)
        width = hidden_size if bottleneck_dim is None else bottleneck_dim
        if hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size {hidden_size}, got {num_heads}")
        if width % num_heads:
            raise ValueError(f"num_heads must divide bottleneck_dim {width}, got {num_heads}")
        _checks.choice("empty", empty, ("zero", "uniform"))
        check_impl(impl)
        self.hidden_size, self.num_heads, self.empty, self.impl = hidden_size, num_heads, empty, impl
        self.memory_slots = nn.Parameter(torch.empty(num_local_slots, hidden_size))
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False) if bottleneck_dim is not None else None
        nn.init.normal_(self.memory_slots, std=1 / math.sqrt(hidden_size))

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        segment_len: int | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        total_segments: int | None = None,
    ) -> Tensor:
        """Slots [B, N, M, H] of hidden [B, S, H]; arguments as :func:`hici_kernels.local_slots`.

        Raises:
            TypeError, ValueError: before any work, naming the argument. hidden must have the weights' dtype, except
                under torch.autocast.
        """
        _checks.tensor("hidden", hidden, "B, S, H")
        _checks.shape("hidden", hidden, (*hidden.shape[:2], self.hidden_size), "B, S, hidden_size")
        # not a projection's weight: offloaded ones are elsewhere until they are called
        check_like_weights("hidden", hidden, self.memory_slots)
        total_segments = check_segments(hidden, segment_len, attention_mask, cu_seqlens, total_segments)
        slots = local_slots(
            hidden,
            self.q_proj(self.memory_slots),
            weight_of(self.k_proj, hidden),
            weight_of(self.v_proj, hidden),
            num_heads=self.num_heads,
            segment_len=segment_len,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            empty=self.empty,
            total_segments=total_segments,
            impl=self.impl,
        )
        return slots if self.o_proj is None else self.o_proj(slots)
