"""One small problem that a kernel must solve before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .case import Inputs, Outputs

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)


@dataclass(frozen=True)
class Check:
    """``draw(i)`` makes inputs in float64, ``call`` by an implementation, ``truth`` in any dtype.

    ``gradients``: those of all inputs are compared too.
    """

    op: str
    name: str
    dtype: torch.dtype
    draw: Callable[[int], Inputs]
    call: Callable[[Inputs, str], Outputs]
    truth: Callable[[Inputs], Outputs]
    gradients: bool = True
