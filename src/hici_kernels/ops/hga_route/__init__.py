"""Choice of the groups a query opens."""

from .api import hga_route

__all__ = ["hga_route"]
