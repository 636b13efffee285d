"""Tolerances, oracles and fixtures shared by the tests and by users who write kernels."""
