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

#: Named lists of cases. "quick": seconds, small shapes; "cpu": layers of real models at lengths a CPU can take.
SUITES = ("quick", "cpu")


def normal(seed: int, *shape: int) -> Tensor:
    """Seeded float64 normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
