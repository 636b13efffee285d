"""Layers of real models, and how much of them a suite runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """hidden size, query heads, kv heads, head_dim."""

    name: str
    hidden: int
    hq: int
    hkv: int
    d: int


TINY = Layer("tiny", 256, 4, 2, 64)
LLAMA3_8B = Layer("Llama-3-8B layer", 4096, 32, 8, 128)
LLAMA2_7B = Layer("Llama-2-7B layer", 4096, 32, 32, 128)

#: Named lists of cases. "quick": small shapes; "cpu": what the CPU kernels are judged by; "layers": every operation at
#: a real layer, at lengths that references can take; "hga": routed attention, and its history on disk.
SUITES = ("quick", "cpu", "layers", "hga")


def normal(seed: int, *shape: int) -> Tensor:
    """Seeded float64 normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    """Seeded normal numbers in ``dtype``, for inputs whose float64 form would not fit beside them."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
