"""Attention of segments to [global slots, local slots, recurrence, own tokens]."""

from .api import attention

__all__ = ["attention"]
