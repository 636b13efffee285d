"""merge_attention: the formula in eager torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._library import vjp
from ...rope import working_dtype


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """lse = log sum_p e^{lse_p};  out = sum_p e^{lse_p - lse} out_p;  a part with lse_p = -inf has weight 0."""
    dtype = working_dtype(outs[0].dtype)
    part = torch.stack([x.to(dtype) for x in lses])  # [P, B, H, S]
    top = part.amax(0)
    # exp(-inf - -inf) is NaN: a row that no part has seen is shifted by 0 instead of its maximum
    shift = torch.where(top == -torch.inf, 0.0, top).detach()
    weight = (part - shift).exp()
    total = weight.sum(0)
    seen = total != 0  # NaN included
    lse = torch.where(seen, torch.where(seen, total, 1.0).log() + shift, -torch.inf)
    share = weight / torch.where(seen, total, 1.0)
    # an unseen part may hold anything, NaN included: it is replaced, not multiplied by 0
    out = sum(
        torch.where(s.transpose(1, 2).unsqueeze(-1) != 0, o.to(dtype), 0.0) * s.transpose(1, 2).unsqueeze(-1)
        for s, o in zip(share, outs, strict=True)
    )
    # and so may the gradient of a row that no part has seen
    out = torch.where((top != -torch.inf).transpose(1, 2).unsqueeze(-1), out, 0.0)
    return out.to(outs[0].dtype), lse


def forward(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return merge_attention(outs, lses)


def backward(grad_out: Tensor, grad_lse: Tensor, outs: list[Tensor], lses: list[Tensor]) -> list[Tensor]:
    n = len(outs)
    return list(vjp(lambda *x: merge_attention(x[:n], x[n:]), (*outs, *lses), (grad_out, grad_lse)))
