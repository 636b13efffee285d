"""Keys that stand for closed chunks and their groups."""

from .api import hga_summaries

__all__ = ["hga_summaries"]
