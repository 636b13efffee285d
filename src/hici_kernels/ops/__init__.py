"""Operations: one folder each, holding api.py (checks), op.py (torch.library), reference.py (formula), kernels."""

from .attention import attention
from .local_slots import local_slots
from .merge_attention import merge_attention

__all__ = ["attention", "local_slots", "merge_attention"]
