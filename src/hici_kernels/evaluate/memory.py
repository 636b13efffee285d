"""Lengths that do not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

#: what torch's allocators for the CPU say, which have no exception of their own
_CPU = ("can't allocate memory", "not enough memory")


@contextlib.contextmanager
def memory_for(length: int) -> Iterator[None]:
    """
    Raises:
        ValueError: naming ``length``, where what is done inside runs out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in _CPU):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"length must be one that fits into memory with this model, got {length}: {reason}") from error
