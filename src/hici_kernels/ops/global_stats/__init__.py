"""Mean, maximum, minimum, standard deviation and normalised mean of all slots."""

from .api import global_stats

__all__ = ["global_stats"]
