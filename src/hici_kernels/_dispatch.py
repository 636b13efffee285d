"""Choice of the implementation that serves a call.

An operation lives in ``hici_kernels/ops/<op>/``. An implementation is a file there named after it (``reference.py``,
``cpu.py``, ``triton.py``, ...) with

    forward(*arguments)                  the result, positional arguments of the operation's schema
    backward(...)                        the gradients, if the operation is differentiable
    unavailable() -> str | None          optional: why it cannot run on this machine at all
    rejects(*arguments) -> str | None    optional: why it cannot serve this call

Adding a file is all it takes: nothing else in the folder changes. ``impl=None`` takes the first of ``ORDER`` that
serves the call; a named implementation that cannot serve it raises :class:`ImplError` with the reason. Pairs in
``NAMED_ONLY`` are never taken without their name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

from torch import Tensor

from . import _triton
from .errors import ImplError

ORDER = ("cuda", "triton", "cpu", "flash_attn", "reference")
OPS = (
    "attention",
    "local_slots",
    "global_stats",
    "merge_attention",
    "hga_summaries",
    "hga_route",
    "hga_attention",
)


# (implementation, device type of the tensors): Triton's interpreter is right and slow, made for tests.
NAMED_ONLY = frozenset({("triton", "cpu")})

# What an implementation needs whatever the operation; asked before its module is imported.
NEEDS = {"triton": _triton.unavailable}


def check_impl(impl: str | None) -> str:
    """Validate the argument ``impl`` and return its spelling in the operation schemas ("" for None)."""
    if impl is None:
        return ""
    if not isinstance(impl, str) or impl not in ORDER:
        raise ValueError(f"impl must be None or one of {', '.join(map(repr, ORDER))}, got {impl!r}")
    return impl


@functools.cache
def load(op: str, name: str) -> tuple[ModuleType | None, str | None]:
    """(module, None) or (None, reason) for implementation ``name`` of operation ``op``."""
    qualified = f"hici_kernels.ops.{op}.{name}"
    if importlib.util.find_spec(qualified) is None:
        return None, "there is no such implementation of this operation yet"
    reason = NEEDS[name]() if name in NEEDS else None
    if reason:
        return None, reason
    try:
        module = importlib.import_module(qualified)
    except ImportError as error:
        return None, f"its import failed: {error}"
    probe = getattr(module, "unavailable", None)
    reason = probe() if probe is not None else None
    return (None, reason) if reason else (module, None)


@functools.cache
def _candidates(op: str, device: str) -> tuple[tuple[ModuleType, Any], ...]:
    """(module, its ``rejects`` or None) of every implementation that may take tensors of ``device``, in ``ORDER``."""
    modules = (load(op, name)[0] for name in ORDER if (name, device) not in NAMED_ONLY)
    return tuple((m, getattr(m, "rejects", None)) for m in modules if m is not None)


def _device(first: Any) -> str:
    """Device type of the first argument: a tensor, or a list of them."""
    while not isinstance(first, Tensor):
        first = first[0]
    return "cpu" if first.is_cpu else str(first.device.type)


def select(op: str, impl: str, *arguments: Any) -> ModuleType:
    """The implementation module for one call. ``impl`` is "" (choose) or a name (that one or an error)."""
    if not impl:
        for candidate, rejects in _candidates(op, _device(arguments[0])):
            if rejects is None or rejects(*arguments) is None:
                return candidate
        raise ImplError(f"no implementation of {op} serves this call")
    module, reason = load(op, impl)
    if module is not None:
        rejects = getattr(module, "rejects", None)
        reason = rejects(*arguments) if rejects is not None else None
        if reason is None:
            return module
    raise ImplError(f"impl={impl!r} cannot serve {op}: {reason}")


def explain(op: str) -> dict[str, str | None]:
    """For every implementation name: None if it can run on this machine, else the reason it cannot."""
    return {name: load(op, name)[1] for name in ORDER}
