"""Two learning rates, and a gradient clip of HiCI's own parameters that acts wherever the optimizer does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoints.names import SLOT_MODULES

MARK = "hici"


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], learning_rate: float, hici_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The host's trained parameters first, then those of the slot modules and of their LoRA, marked as such.

    Raises:
        ValueError: no slot parameter is trained.
    """
    host: list[nn.Parameter] = []
    slots: list[nn.Parameter] = []
    for name, p in named:
        if p.requires_grad:
            (slots if any(part in name for part in SLOT_MODULES) else host).append(p)
    if not slots:
        raise ValueError("the model has no trainable parameter of local_constructor or global_integrator")
    groups = [{"params": slots, "lr": hici_lr, "weight_decay": weight_decay, MARK: True}]
    if host:
        groups.insert(0, {"params": host, "lr": learning_rate, "weight_decay": weight_decay, MARK: False})
    return groups


class HiCIClip:
    """Scales the gradient of marked groups to at most ``limit`` just before an optimizer's step, and notes what it did.

    A hook of the optimizer, because that is the one place which every engine passes with whole, unscaled gradients: a
    trainer's own clip comes before the step in some engines and after it in others, where it changes nothing.

    Args:
        limit: largest Euclidean norm over all marked parameters and ranks, None = only measure.
        partitioned: each rank's optimizer holds a part of every gradient as plain tensors (ZeRO), so that squares are
            summed over ranks. Gradients that are DTensors (FSDP2) know their parts by themselves.
    """

    def __init__(self, limit: float | None, partitioned: bool = False) -> None:
        self.limit, self.partitioned = limit, partitioned
        self.calls = 0  # steps over marked parameters since take()
        self._seen: tuple[Tensor, Tensor, float] | None = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = [g for g in optimizer.param_groups if g.get(MARK)]
        gradients = [p.grad for g in groups for p in g["params"] if p.grad is not None]
        if not gradients:
            return
        before = self._norm(gradients)
        after = before
        if self.limit is not None:
            # the rule of torch.nn.utils.clip_grad_norm_
            scale = (self.limit / (before + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale.to(gradient.device))
            after = self._norm(gradients)
        self.calls += 1
        self._seen = (before, after, float(groups[0]["lr"]))

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        total = nn.utils.get_total_norm(gradients)
        if hasattr(total, "full_tensor"):
            total = total.full_tensor()
        if self.partitioned and dist.is_initialized():
            square = total.float() ** 2
            dist.all_reduce(square)
            total = square.sqrt()
        return total

    def take(self) -> None:
        """Called after every step of the trainer: exactly one step over the marked parameters must have passed.

        Raises:
            RuntimeError: the engine stepped past the hook, or over HiCI's parameters in several parts, whose separate
                norms are not theirs together.
        """
        if self.calls != 1:
            raise RuntimeError(
                f"the optimizer passed HiCI's parameters {self.calls} times in this step instead of once, so the clip "
                "of their gradient did not act as meant: the engine replaced the optimizer (DeepSpeed does with its "
                "own 'optimizer' entry or CPU offload), or splits them (raise sub_group_size under ZeRO-3)"
            )
        self.calls = 0

    def measured(self) -> dict[str, float]:
        """Of the last step: learning rate of HiCI's parameters, norm of their gradient before and after the clip."""
        if self._seen is None:
            return {}
        before, after, rate = self._seen
        return {"hici_lr": rate, "hici_grad_norm": float(before), "hici_grad_norm_clipped": float(after)}
