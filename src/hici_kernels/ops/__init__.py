"""Operations: one folder each, holding api.py (checks), op.py (torch.library), reference.py (formula), kernels."""

from .merge_attention import merge_attention

__all__ = ["merge_attention"]
