"""Routed attention over sinks, opened groups, a local window and the active chunk."""

from .api import HGAResult, hga_attention

__all__ = ["HGAResult", "hga_attention"]
