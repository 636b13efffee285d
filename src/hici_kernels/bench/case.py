"""One measurement: an operation at a shape, plain PyTorch doing the same work, and the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]

PLAIN = "plain PyTorch"
#: The side of a composite case that lets every operation choose its implementation.
FASTEST = "hici_kernels"


@dataclass(frozen=True)
class Part:
    """What is compared with float64 where the whole would take too long.

    Args:
        note: what a reader is told about it.
        inputs: takes any subset of the case's inputs (or their gradients) to the part.
        outputs: takes outputs of the whole call to those of the part; None = the part is a call of its own on
            ``inputs``, and the whole call is compared with plain PyTorch only.
    """

    note: str
    inputs: Callable[[Inputs], Inputs]
    outputs: Callable[[Outputs], Outputs] | None


@dataclass(frozen=True)
class Baseline:
    """A further PyTorch side, timed but not compared: it does a little less, more or other work, as its name says.

    Args:
        call: prepared inputs -> outputs.
        prepare: inputs -> what ``call`` takes; done once, before timing.
        backward: also timed forward and backward, to every floating tensor of the prepared inputs.
        note: what it leaves out or is given for free.
    """

    call: Callable[[Inputs], Outputs]
    prepare: Callable[[Inputs], Inputs] = dict
    backward: bool = False
    note: str = ""


@dataclass(frozen=True)
class Case:
    """An operation at one shape and dtype.

    Args:
        op: name of the operation, or of a composite of several (then ``needs`` lists them).
        name: name of the shape.
        dtype: of all floating inputs.
        shape: what a reader is told about it.
        inputs: () -> arguments, seeded; floating tensors in ``dtype``, or in float64 and rounded to it by the frame.
        call: (inputs, impl) -> floating outputs.
        plain: inputs -> the same outputs by plain PyTorch.
        oracle: float64 inputs -> the same outputs; default ``plain``, which is then also the truth's formula.
        flops: floating-point operations of the forward pass, as the docstring of the case's module counts them.
        bytes: bytes the forward pass must read and write at least once.
        exps: exponentials of the forward pass.
        differentiable: names of the inputs whose gradients the backward case compares; empty = forward only.
        baselines: further sides by name.
        against: the side that speedups are over; any other than plain PyTorch means that plain PyTorch is not timed.
        part: None = everything is compared with float64.
        needs: operations of a composite.
        memory: peak resident memory is measured in a call of its own.
        judged: a goal may rest on it; False lets every long side run in fewer rounds.
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
    exps: int = 0
    oracle: Callable[[Inputs], Outputs] | None = None
    differentiable: tuple[str, ...] = ()
    baselines: dict[str, Baseline] = field(default_factory=dict)
    against: str = PLAIN
    part: Part | None = None
    needs: tuple[str, ...] = ()
    memory: bool = False
    judged: bool = True

    def rounded(self) -> Inputs:
        """The inputs in the case's dtype."""
        return _to(self.inputs(), self.dtype)

    def wide(self, rounded: Inputs) -> Inputs:
        """Exactly the same numbers in float64."""
        return _to(rounded, torch.float64)


def _to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def weights(outputs: Sequence[Tensor]) -> Outputs:
    """Seeded upstream gradients in the dtypes of ``outputs``, with so few digits that no side has to round them; 0
    where an output is infinite."""
    noise = torch.Generator().manual_seed(1)
    drawn = (torch.randn(o.shape, generator=noise).bfloat16().to(o.dtype) for o in outputs)
    return tuple(w.masked_fill_(~o.isfinite(), 0.0) for o, w in zip(outputs, drawn, strict=True))


def with_gradients(
    inputs: Inputs, names: Sequence[str], call: Callable[[Inputs], Outputs], upstream: Sequence[Tensor]
) -> Outputs:
    """Outputs of ``call``, then the gradients of the inputs ``names`` of sum(out_i * upstream_i)."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in names}
    outputs = call({**inputs, **leaves})
    reached = [(o, w.to(o.dtype)) for o, w in zip(outputs, upstream, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad([o for o, _ in reached], list(leaves.values()), [w for _, w in reached])
    return (*(o.detach() for o in outputs), *gradients)
