"""Multi-view statistics of all slots."""

from .api import global_stats

__all__ = ["global_stats"]
