"""Operations: one folder each, holding api.py (checks), op.py (torch.library), reference.py (formula), kernels."""

from .attention import attention
from .global_stats import global_stats
from .local_slots import local_slots
from .merge_attention import merge_attention

__all__ = ["attention", "global_stats", "local_slots", "merge_attention"]
