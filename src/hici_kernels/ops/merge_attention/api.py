"""merge_attention: the public function."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _checks
from ..._dispatch import check_impl
from ..._library import call
from ...rope import working_dtype
from .op import merge_forward


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys into attention over their union.

    Formula, over parts p:
        lse = log sum_p exp(lse_p)
        out = sum_p exp(lse_p - lse) * out_p

    Args:
        outs: one tensor [B, S, H, D] per part, all of one dtype.
        lses: one tensor [B, H, S] per part, natural logarithm, float32 (float64 for float64 parts). -inf marks a row
            that saw no key of the part; what its ``out`` holds is then never read. +inf and NaN are not supported.
        impl: implementation name, or None for the fastest that serves the call.

    Returns:
        (out [B, S, H, D] in the dtype of the parts, lse [B, H, S]). A row that no part has seen gives 0 and -inf.
        Differentiable once in all inputs. Deterministic. The result does not depend on the order of the parts up to
        rounding.

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if isinstance(parts, Tensor) or not isinstance(parts, Sequence):
            raise TypeError(f"{name} must be a sequence of tensors, got {type(parts).__name__}")
    if not outs:
        raise ValueError("outs must hold at least 1 tensor, got 0")
    if len(outs) != len(lses):
        raise ValueError(f"lses must hold as many tensors as outs ({len(outs)}), got {len(lses)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _checks.tensor(f"outs[{i}]", out, "B, S, H, D")
        _checks.tensor(f"lses[{i}]", lse, "B, H, S")
    _checks.floats(**{f"outs[{i}]": x for i, x in enumerate(outs)})
    b, s, h, d = outs[0].shape
    expected = working_dtype(outs[0].dtype)
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _checks.shape(f"outs[{i}]", out, (b, s, h, d), "B, S, H, D")
        _checks.shape(f"lses[{i}]", lse, (b, h, s), "B, H, S")
        if lse.dtype != expected:
            raise TypeError(f"lses[{i}] must be {expected} beside {outs[0].dtype} parts, got {lse.dtype}")
        if lse.device != outs[0].device:
            raise ValueError(f"lses[{i}] is on {lse.device}, expected {outs[0].device} like outs[0]")
    return call(merge_forward, list(outs), list(lses), check_impl(impl))
