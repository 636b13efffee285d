"""Tolerances shared by the tests and by users who write kernels."""

from .tolerance import assert_within_budget, budget, error
from .usual import assert_usual, assert_usually_within, excess

__all__ = ["assert_usual", "assert_usually_within", "assert_within_budget", "budget", "error", "excess"]
