"""Argument checks of the attention layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..rope import Rope


def check_layer(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, rope: Rope, qk_norm_eps: float | None
) -> None:
    """Sizes of an attention layer."""
    for name, value in (
        ("hidden_size", hidden_size),
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
    ):
        _checks.integer(name, value, 1)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads {num_kv_heads}, got {num_heads}")
    if not isinstance(rope, Rope):
        raise TypeError(f"rope must be a Rope, got {type(rope).__name__}")
    rope.check_head_dim(head_dim)
    if qk_norm_eps is not None:
        _checks.number("qk_norm_eps", qk_norm_eps)
        if qk_norm_eps < 0:
            raise ValueError(f"qk_norm_eps must not be negative, got {qk_norm_eps}")


def check_forward(layer: Any, hidden: Tensor, positions: Tensor | None, attention_mask: Tensor | None) -> None:
    """Arguments every attention layer's forward shares. ``layer`` has hidden_size and q_proj."""
    _checks.tensor("hidden", hidden, "B, S, H")
    b, s, _ = hidden.shape
    _checks.shape("hidden", hidden, (b, s, layer.hidden_size), "B, S, hidden_size")
    check_like_weights("hidden", hidden, parameter_of(layer.q_proj))
    if positions is not None:
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions must be a tensor [S] or [B, S], got {type(positions).__name__}")
        if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
            raise TypeError(f"positions must be integer, got {positions.dtype}")
        if tuple(positions.shape) not in ((s,), (b, s)):
            raise ValueError(f"positions must be [S] = [{s}] or [B, S] = [{b}, {s}], got {list(positions.shape)}")
        if positions.device != hidden.device:
            raise ValueError(f"positions is on {positions.device}, expected {hidden.device} like hidden")
    if attention_mask is not None:
        _checks.token_mask("attention_mask", attention_mask, b, s, hidden.device)


def check_like_weights(name: str, x: Tensor, weight: Tensor) -> None:
    """Whether a module with this weight can take ``x``: dtype (any under torch.autocast) and device."""
    if x.dtype not in _checks.FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    kind = x.device.type
    autocast = kind in ("cpu", "cuda", "xpu") and torch.is_autocast_enabled(kind)
    if x.dtype != weight.dtype and not autocast:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {weight.dtype} like the layer's weights")
    if x.device != weight.device:
        raise ValueError(f"{name} is on {x.device}, expected {weight.device} like the layer's weights")


def parameter_of(linear: nn.Module) -> Tensor:
    """The weight of a linear module, also of one with an adapter around it."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight
