"""Files of HiCI checkpoints: names, safe reading, conversion, extraction from training runs. Needs torch only."""

from .convert import convert
from .extract import extract

__all__ = ["convert", "extract"]
