"""Rotary position embedding in the rotate-half convention of Llama and Qwen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _checks


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotation frequencies of a model.

    Args:
        inv_freq: [rotary_dim/2], radians per position of each pair (i, i + rotary_dim/2). Frequency scaling (linear,
            Llama-3, YaRN) is expressed here, by the caller.
        attention_scaling: factor on cos and sin (YaRN's attention factor).
        rotary_dim: number of leading dims that are rotated; the rest pass through. Default 2 * len(inv_freq).

    Formula, for x of one head at position p, half = rotary_dim/2, i < half:
        y[i]        = s * (x[i] cos(p w_i) - x[i+half] sin(p w_i))
        y[i + half] = s * (x[i+half] cos(p w_i) + x[i] sin(p w_i))
    Angles are formed in float32 (float64 for float64 inputs), as the models do.
    """

    inv_freq: Tensor
    attention_scaling: float = 1.0
    rotary_dim: int | None = None
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _checks.tensor("inv_freq", self.inv_freq, "rotary_dim/2")
        if not self.inv_freq.is_floating_point():
            raise TypeError(f"inv_freq must be floating point, got {self.inv_freq.dtype}")
        if self.inv_freq.shape[0] < 1:
            raise ValueError("inv_freq must have at least 1 entry, got 0")
        _checks.number("attention_scaling", self.attention_scaling)
        width = 2 * self.inv_freq.shape[0]
        if self.rotary_dim is None:
            object.__setattr__(self, "rotary_dim", width)
        _checks.integer("rotary_dim", self.rotary_dim)
        if self.rotary_dim != width:
            raise ValueError(f"rotary_dim must be 2 * len(inv_freq) = {width}, got {self.rotary_dim}")

    @classmethod
    def from_theta(cls, theta: float, rotary_dim: int, *, factor: float = 1.0) -> Rope:
        """w_i = theta^(-2i/rotary_dim) / factor, in float32 (``factor`` is linear position interpolation)."""
        _checks.number("theta", theta)
        _checks.number("factor", factor)
        _checks.integer("rotary_dim", rotary_dim, 2)
        if theta <= 0:
            raise ValueError(f"theta must be positive, got {theta}")
        if factor <= 0:
            raise ValueError(f"factor must be positive, got {factor}")
        if rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, got {rotary_dim}")
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
        return cls(1.0 / (theta**exponent) / factor)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rope, (self.inv_freq, self.attention_scaling, self.rotary_dim)  # copies on devices are no part of it

    def check_head_dim(self, head_dim: int) -> None:
        if self.rotary_dim is not None and self.rotary_dim > head_dim:
            raise ValueError(f"rope.rotary_dim must be at most head_dim {head_dim}, got {self.rotary_dim}")

    def frequencies(self, device: torch.device) -> Tensor:
        """inv_freq on ``device``. Copied there once: every copy from the host would be waited for."""
        if self.inv_freq.device == device:
            return self.inv_freq
        # what a compiler or a mode of the dispatcher sees is no tensor to keep
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.inv_freq.to(device)
        found = self._copies.get(device)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self._copies[device] = self.inv_freq.to(device)
        return found

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scaled cos and sin [..., rotary_dim/2] at ``positions`` [...], in ``dtype`` (float32 or float64)."""
        angle = positions.to(dtype).unsqueeze(-1) * self.frequencies(positions.device).to(dtype)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` [B, S, H, D] rotated at ``positions`` [S] or [B, S]; result in x.dtype, a new tensor."""
        self.check_head_dim(x.shape[-1])
        half = self.inv_freq.shape[0]
        cos, sin = self.cos_sin(positions, working_dtype(x.dtype))
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads
        low, high = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
        rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)
        return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), -1)
