"""Slots attend to the tokens of every segment."""

from .api import local_slots

__all__ = ["local_slots"]
