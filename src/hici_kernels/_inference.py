"""State that outlives torch's inference mode and default device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def keeps(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """For what makes tensors that a cache keeps: outside torch's inference mode, and on the CPU unless said otherwise.

    One that is made in inference mode can never be written in place outside, so a cache that was filled there could not
    be continued under torch.no_grad(). Lengths and lists are the host's, whatever torch.set_default_device says.
    """

    @functools.wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # what sets a default device is a mode for functions
        if torch._C._len_torch_function_stack() and torch.get_default_device().type != "cpu":
            with torch.device("cpu"):
                return run(*args, **kwargs)
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        # leaving inference mode turns gradients on
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run
