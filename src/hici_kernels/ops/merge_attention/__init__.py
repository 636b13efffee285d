"""Combine attention over disjoint key sets by their log-sum-exp."""

from .api import merge_attention

__all__ = ["merge_attention"]
