"""Tolerances shared by the tests and by users who write kernels."""

from .tolerance import assert_within_budget, budget, error

__all__ = ["assert_within_budget", "budget", "error"]
