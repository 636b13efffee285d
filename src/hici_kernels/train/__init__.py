"""Continued pre-training and instruction tuning with HiCI, on transformers' Trainer. Needs the extra ``[train]``."""

from .recipe import ENGINES, Recipe, engine_file
from .run import run

__all__ = ["ENGINES", "Recipe", "engine_file", "run"]
