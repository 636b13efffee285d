"""Collectives with gradients, and the bytes they move."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .traffic import Traffic, gradient_dtype

# the names of later releases of torch, and those of 2.10
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GatherSegments(torch.autograd.Function):
    """[B, n_r, ...] of every rank to [B, N, ...] on all; backward sums the gradients of all ranks, each gets its own.

    Ranks with fewer segments than the largest send padding, so that both directions are one collective.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, counts: list[int], traffic: Traffic) -> Tensor:
        ctx.group, ctx.counts, ctx.traffic = group, counts, traffic
        rank, largest = dist.get_rank(group), max(counts)
        block = x.new_zeros(x.shape[0], largest, *x.shape[2:])
        block[:, : counts[rank]] = x
        gathered = x.new_empty(len(counts), *block.shape)
        _all_gather(gathered.flatten(0, 1), block, group=group)
        traffic.add("slots forward", (len(counts) - 1) * block.numel() * block.element_size())
        return torch.cat([part[:, :n] for part, n in zip(gathered, counts, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counts, rank = ctx.counts, dist.get_rank(ctx.group)
        shape = (grad.shape[0], max(counts), *grad.shape[2:])
        blocks = grad.new_zeros(len(counts), *shape, dtype=gradient_dtype(grad.dtype))
        for block, part in zip(blocks, grad.split(counts, 1), strict=True):
            block[:, : part.shape[1]] = part
        mine = blocks.new_empty(shape)
        _reduce_scatter(mine, blocks.flatten(0, 1), group=ctx.group)
        ctx.traffic.add("slots backward", (len(counts) - 1) * mine.numel() * mine.element_size())
        return mine[:, : counts[rank]].to(grad.dtype), None, None, None


class FromPrevious(torch.autograd.Function):
    """What the rank before holds in ``x`` (zeros on the first rank); backward sends the gradient back to it.

    ``through`` is handed on unchanged: whoever uses it makes this backward run, also on a rank that has no use for what
    it received but must still take the gradient of what it sent.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, through: Tensor, group: ProcessGroup, traffic: Traffic) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.traffic = group, traffic
        return shift(x, group, traffic, 1, "recurrence forward"), through.view_as(through)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, through: Tensor) -> tuple[Tensor | None, ...]:
        return shift(grad, ctx.group, ctx.traffic, -1, "recurrence backward"), through, None, None


def shift(x: Tensor, group: ProcessGroup, traffic: Traffic, step: int, what: str) -> Tensor:
    """``x`` of the rank ``step`` before, zeros where there is none."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    source, target = rank - step, rank + step
    x, received = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
    calls = []
    if 0 <= target < ranks:
        calls.append(dist.P2POp(dist.isend, x, dist.get_global_rank(group, target), group))
    if 0 <= source < ranks:
        calls.append(dist.P2POp(dist.irecv, received, dist.get_global_rank(group, source), group))
        traffic.add(what, received.numel() * received.element_size())
    for work in dist.batch_isend_irecv(calls) if calls else []:
        work.wait()
    return received


class SumForward(torch.autograd.Function):
    """The sum over ranks; the gradient passes as it is (every rank holds the gradient of the whole sum)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, traffic: Traffic) -> Tensor:
        return _sum(x, group, traffic, "outputs")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class SumBackward(torch.autograd.Function):
    """The input as it is; gradients are summed over ranks (every rank computes a part from a copy)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, traffic: Traffic) -> Tensor:
        ctx.group, ctx.traffic = group, traffic
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grad, ctx.group, ctx.traffic, "gradients of inputs"), None, None


def gather_flags(flags: Tensor, group: ProcessGroup, counts: list[int], traffic: Traffic) -> Tensor:
    """bool [B, n_r] of every rank as [B, N] on all."""
    block = torch.zeros(flags.shape[0], max(counts), dtype=torch.uint8, device=flags.device)
    block[:, : flags.shape[1]] = flags
    gathered = block.new_empty(len(counts), *block.shape)
    _all_gather(gathered.flatten(0, 1), block, group=group)
    traffic.add("which segments have tokens", (len(counts) - 1) * block.numel())
    return torch.cat([part[:, :n] for part, n in zip(gathered, counts, strict=True)], 1) != 0


def _sum(x: Tensor, group: ProcessGroup, traffic: Traffic, what: str) -> Tensor:
    ranks = dist.get_world_size(group)
    traffic.add(what, 2 * (ranks - 1) * x.numel() * x.element_size() // ranks)
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x
