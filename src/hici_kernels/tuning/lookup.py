"""The rule that finds a call's configuration."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from .chips import generation, shared_memory, vendor
from .table import Entry, read

# What :func:`trial` puts in the place of tables, in its own context only.
_TRIAL: ContextVar[dict[str, dict[str, int]] | None] = ContextVar("trial", default=None)

WIDTH = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def configuration(op: str, arch: str, *, head_dim: int, segment_len: int, dtype: torch.dtype | str) -> dict[str, int]:
    """Kernel constexprs, num_warps and num_stages for a call; the rule is in the package's docstring.

    Args:
        op: name of a table.
        arch: "sm_90", "gfx942", ..., "interpret"; :func:`~hici_kernels.tuning.architecture` of a device.
        head_dim, segment_len: see the package's docstring; segment_len 0 = the whole sequence, taken as long.
        dtype: of the call's floating tensors.

    Raises:
        ValueError: no such table, or an architecture of no known vendor.
    """
    tried = _TRIAL.get()
    if tried is not None and op in tried:
        return dict(tried[op])
    return dict(entry_for(op, arch, head_dim, segment_len, str(dtype).removeprefix("torch.")).configuration)


@contextlib.contextmanager
def trial(op: str, candidate: dict[str, int]) -> Iterator[None]:
    """Within it, and on this thread only, every lookup of table ``op`` finds ``candidate``: for measuring it."""
    token = _TRIAL.set({**(_TRIAL.get() or {}), op: candidate})
    try:
        yield
    finally:
        _TRIAL.reset(token)


@functools.cache
def entry_for(op: str, arch: str, head_dim: int, segment_len: int, dtype: str) -> Entry:
    """The entry itself, with its history."""
    rows = [e for e in read(op) if e.arch == nearest_arch(arch, frozenset(x.arch for x in read(op)))]

    listed = [e for e in rows if dtype in e.dtypes]
    if not listed:
        width = WIDTH.get(dtype, 8)
        listed = [e for e in rows if any(WIDTH[d] == width for d in e.dtypes)]
    if not listed:
        widest = max(WIDTH[e.dtype] for e in rows)
        listed = [e for e in rows if WIDTH[e.dtype] == widest]

    dims = {e.head_dim for e in listed}
    dim = min((d for d in dims if d >= head_dim), default=max(dims))
    fitting = [e for e in listed if e.head_dim == dim]

    # a sequence that is one segment is long: at short ones the choice costs little
    wanted = segment_len if segment_len > 0 else max(e.segment_len for e in fitting) or 1
    return min(fitting, key=lambda e: (abs(math.log2((e.segment_len or wanted) / wanted)), e.segment_len))


@functools.cache
def nearest_arch(arch: str, known: frozenset[str]) -> str:
    """Rule 1 of the package's docstring."""
    kind = vendor(arch)
    if arch in known:
        return arch
    same = [x for x in known if vendor(x) == kind]
    if not same:
        raise ValueError(f"arch {arch!r}: the table has entries for {', '.join(sorted(known))} only")
    fit = [x for x in same if shared_memory(x) <= shared_memory(arch)]
    if not fit:
        return min(same, key=lambda x: (shared_memory(x), generation(x)))
    older = [x for x in fit if generation(x) <= generation(arch)] or fit
    return max(older, key=lambda x: (shared_memory(x), generation(x)))
