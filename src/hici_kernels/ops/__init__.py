"""Operations: one folder each, holding api.py (checks), op.py (torch.library), reference.py (formula), kernels."""

from .attention import attention
from .global_stats import global_stats
from .hga_attention import hga_attention
from .hga_route import hga_route
from .hga_summaries import hga_summaries
from .local_slots import local_slots
from .merge_attention import merge_attention

__all__ = [
    "attention",
    "global_stats",
    "hga_attention",
    "hga_route",
    "hga_summaries",
    "local_slots",
    "merge_attention",
]
