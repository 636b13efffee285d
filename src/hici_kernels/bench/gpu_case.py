"""One operation at one shape, as it is measured on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .case import Inputs, Outputs

#: a baseline: inputs, options -> (call, the tensors to differentiate), everything it may prepare already done
Prepare = Callable[[Inputs, dict[str, Any]], tuple[Callable[[], Outputs], list[Tensor]]]


@dataclass(frozen=True)
class Work:
    """What a pass must do at least."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Baseline:
    """Something measured beside the kernels. ``same``: its first output must agree with theirs."""

    prepare: Prepare
    forward_flops: int
    same: bool = True


@dataclass(frozen=True)
class GpuCase:
    """One operation at one shape; ``inputs`` makes random tensors of ``dtype`` on a device.

    ``truth``: the baseline whose first output decides whether that of an implementation is right; "reference" = the
    implementation of this name, which is then not timed. ``agreement``: share of its rows that must agree. Scores that
    rounding makes equal, or parts, pick other groups, and a row of another pick is another row.
    """

    op: str
    name: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[torch.device], Inputs]
    options: dict[str, Any]
    call: Callable[[Inputs, str], Outputs]
    forward: Work
    backward: Work
    baselines: dict[str, Baseline] = field(default_factory=dict)
    arguments: Callable[[Inputs], tuple[Any, ...]] | None = None
    truth: str = "reference's sequence"
    agreement: float = 1.0

    def work(self, direction: str) -> Work:
        return self.forward if direction == "forward" else self.backward
