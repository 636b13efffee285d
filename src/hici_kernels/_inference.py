"""State that outlives torch's inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def keeps(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """For what makes tensors that a cache keeps: they are made outside torch's inference mode.

    One that is made inside can never be written in place outside, so a cache that was filled in inference mode could
    not be continued under torch.no_grad().
    """

    @functools.wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        # leaving inference mode turns gradients on
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run
