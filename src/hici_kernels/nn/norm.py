"""RMS normalisation over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..rope import working_dtype


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dim [dim]; the quotient in float32, cast back, then scaled.

    The order of cast and scale is that of the Llama and Qwen3 models, so that their weights give the same numbers.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(working_dtype(x.dtype))
        return self.weight.to(x.dtype) * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )
