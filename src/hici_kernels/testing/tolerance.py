"""The error budget of low-precision results."""

from __future__ import annotations

import torch
from torch import Tensor


def budget(oracle: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """Largest absolute error allowed to a result in ``dtype``: max(2 x error of ``plain``, 2 eps max|oracle|).

    ``oracle`` is the float64 truth, ``plain`` the plain PyTorch computation in ``dtype``. Infinite entries (the
    log-sum-exp of rows that see nothing) must agree exactly and do not count.
    """
    return max(2 * error(oracle, plain), 2 * torch.finfo(dtype).eps * _largest(oracle))


def error(oracle: Tensor, result: Tensor) -> float:
    """Largest absolute difference over finite entries of ``oracle``; infinite if the other entries differ."""
    result = result.double()
    difference = float((oracle - result).abs().max()) if oracle.numel() else 0.0
    if difference < float("inf"):  # then every entry of both is finite
        return difference
    finite = oracle.isfinite()
    if not torch.equal(oracle[~finite], result[~finite]) or not result[finite].isfinite().all():
        return float("inf")
    return _largest((oracle - result)[finite])


def _largest(x: Tensor) -> float:
    """Largest magnitude of the finite entries."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    if largest < float("inf"):
        return largest
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def assert_within_budget(oracle: Tensor, result: Tensor, plain: Tensor, what: str = "result") -> None:
    """AssertionError naming ``what``, its error and its budget, unless the error is within the budget."""
    found, allowed = error(oracle, result), budget(oracle, plain, result.dtype)
    assert found <= allowed, f"{what}: error {found:.3e} exceeds the budget {allowed:.3e} ({result.dtype})"
