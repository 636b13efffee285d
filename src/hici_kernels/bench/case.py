"""One measurement: an operation at a shape, plain PyTorch doing the same work, and the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An operation at one shape and dtype.

    Args:
        op: name of the operation.
        name: name of the shape.
        dtype: of all floating inputs.
        shape: what a reader is told about it.
        inputs: () -> arguments, seeded; floating tensors in float64, rounded to ``dtype`` by the frame.
        call: (inputs, impl) -> floating outputs.
        plain: inputs -> the same outputs by plain PyTorch.
        oracle: float64 inputs -> the same outputs; default ``plain``, which is then also the truth's formula.
        flops: floating-point operations of the forward pass, as the docstring of the case's module counts them.
        bytes: bytes the forward pass must read and write at least once.
        differentiable: names of the inputs whose gradients the backward case compares; empty = forward only.
        baselines: further plain callables that are timed but do other (more or less) work, by a name that says so.
    """

    op: str
    name: str
    dtype: torch.dtype
    shape: str
    inputs: Callable[[], Inputs]
    call: Callable[[Inputs, str | None], Outputs]
    plain: Callable[[Inputs], Outputs]
    flops: int
    bytes: int
    oracle: Callable[[Inputs], Outputs] | None = None
    differentiable: tuple[str, ...] = ()
    baselines: dict[str, Callable[[Inputs], object]] = field(default_factory=dict)

    def rounded(self) -> Inputs:
        """The inputs in the case's dtype."""
        return _to(self.inputs(), self.dtype)

    def wide(self, rounded: Inputs) -> Inputs:
        """Exactly the same numbers in float64."""
        return _to(rounded, torch.float64)


def _to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def with_gradients(inputs: Inputs, names: tuple[str, ...], call: Callable[[Inputs], Outputs]) -> Outputs:
    """Outputs of ``call``, then the gradients of the inputs ``names`` of sum(out_i * fixed noise_i)."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in names}
    outputs = call({**inputs, **leaves})
    noise = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        weight = torch.randn(out.shape, generator=noise, dtype=torch.float64)
        loss = loss + (out.double() * torch.where(out.isfinite(), weight, 0.0)).nan_to_num(posinf=0, neginf=0).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return (*(o.detach() for o in outputs), *gradients)
