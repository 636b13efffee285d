"""Argument checks shared by the public functions: one place, one wording, before any work.

Every message names the argument, what it was and what was expected.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> None:
    """A Python int (or symbolic int while tracing), not a bool, within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")
    # operations take 64-bit integers; a symbolic one needs no test (and would be guarded on)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} must be at most {2**63 - 1}, got {value}")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def number(name: str, value: Any) -> None:
    """A finite real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    # ints beyond every float are compared exactly, and a compiler traces comparisons
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {str(value)[:40]}")


def device(name: str, value: Any) -> torch.device:
    """The device that ``value`` names on this machine, with its index ("cuda" = the current one)."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{name} must be a torch.device or a str, got {type(value).__name__} {value!r}")
    try:
        return torch.empty(0, device=value).device
    # AssertionError: a build of torch without that kind of device; NotImplementedError is a RuntimeError
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} must be a device of this machine, got {str(value)!r}: {reason}") from error


def tensor(name: str, value: Any, layout: str) -> None:
    """A tensor whose number of dimensions is that of ``layout``, e.g. "B, S, H, D"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor [{layout}], got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor [{layout}], got a {kind} one")
    ndim = layout.count(",") + 1 if layout else 0
    if value.ndim != ndim:
        raise ValueError(f"{name} must be [{layout}] ({ndim} dimensions), got shape {tuple(value.shape)}")


def floats(**tensors: Tensor | None) -> None:
    """All given tensors share one supported floating dtype and one device; the first one sets both."""
    first, lead = next((n, t) for n, t in tensors.items() if t is not None)
    dtype, device = lead.dtype, lead.device
    if dtype not in FLOATS:
        raise TypeError(f"{first} must be float32, bfloat16, float16 or float64, got {dtype}")
    for name, t in tensors.items():
        if t is None or t is lead:
            continue
        if t.dtype != dtype:
            raise TypeError(f"{name} has dtype {t.dtype}, expected {dtype} like {first}")
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}, expected {device} like {first}")


def shape(name: str, value: Tensor, expected: tuple[int, ...], layout: str) -> None:
    """Exact shape; ``layout`` says what the numbers mean."""
    if value.shape != expected:
        raise ValueError(f"{name} must be [{layout}] = {list(expected)}, got {list(value.shape)}")


def last_contiguous(**tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.stride(-1) != 1 and t.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {t.stride()}")


def heads(q_name: str, hq: int, kv_name: str, hkv: int) -> None:
    """Grouped-query head counts: both positive, query heads a multiple of kv heads."""
    if hq < 1:
        raise ValueError(f"{q_name} must have at least 1 head, got {hq}")
    if hkv < 1:
        raise ValueError(f"{kv_name} must have at least 1 head, got {hkv}")
    if hq % hkv != 0:
        raise ValueError(f"{q_name} has {hq} heads, expected a multiple of the {hkv} heads of {kv_name}")


def qkv(q: Any, k: Any, v: Any) -> None:
    """q [B, T, Hq, D], k and v [B, S, Hkv, D] of one dtype and device."""
    if _usual(q, k, v):
        return
    tensor("q", q, "B, T, Hq, D")
    tensor("k", k, "B, S, Hkv, D")
    tensor("v", v, "B, S, Hkv, D")
    b, _, hq, d = q.shape
    kb, s, hkv, kd = k.shape
    if kb != b or kd != d:
        shape("k", k, (b, s, hkv, d), "B, S, Hkv, D")
    shape("v", v, k.shape, "B, S, Hkv, D like k")
    heads("q", hq, "k", hkv)
    if d < 1:
        raise ValueError(f"q must have head_dim at least 1, got shape {tuple(q.shape)}")
    floats(q=q, k=k, v=v)
    last_contiguous(q=q, k=k, v=v)


def _usual(q: Any, k: Any, v: Any) -> bool:
    """Nothing is wrong, found out in a quarter of the time that looking for what is wrong takes."""
    if not (type(q) is Tensor and type(k) is Tensor and type(v) is Tensor) or torch.compiler.is_compiling():
        return False
    if not (q.layout is k.layout is v.layout is torch.strided) or q.is_nested or k.is_nested or v.is_nested:
        return False
    qs, ks = q.shape, k.shape
    if not (len(qs) == len(ks) == 4 and ks == v.shape and q.dtype is k.dtype is v.dtype and q.dtype in FLOATS):
        return False
    hq, d, hkv = qs[2], qs[3], ks[2]
    if not (qs[0] == ks[0] and d == ks[3] >= 1 and hkv >= 1 and hq >= 1 and hq % hkv == 0):
        return False
    near = q.is_cpu and k.is_cpu and v.is_cpu
    return near and q.stride(3) == 1 and k.stride(3) == 1 and v.stride(3) == 1


def usual(x: Any, ndim: int) -> bool:
    """A tensor of so many dimensions, a supported dtype and a contiguous last dimension; the short way to find out."""
    return (
        type(x) is Tensor
        and x.layout is torch.strided
        and not x.is_nested
        and x.ndim == ndim
        and x.dtype in FLOATS
        and x.stride(-1) == 1
    )


def token_mask(name: str, value: Any, batch: int, length: int, device: torch.device) -> None:
    """[B, S] of bool, integer or float, 1/True = token. Contents are not read."""
    tensor(name, value, "B, S")
    shape(name, value, (batch, length), "B, S")
    if value.dtype.is_complex:
        raise TypeError(f"{name} must be bool, integer or float, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device}")


def offsets(name: str, value: Any, total: int) -> None:
    """int32 [docs+1] offsets from 0 to ``total``; contents are checked where reading them is free (on the CPU)."""
    tensor(name, value, "docs+1")
    if value.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {value.dtype}")
    if value.shape[0] < 1:
        raise ValueError(f"{name} must have at least 1 entry, got shape {tuple(value.shape)}")
    if not readable(value):
        return
    entries = value.tolist()
    if entries[0] != 0 or entries[-1] != total:
        raise ValueError(f"{name} must run from 0 to {total}, got {entries[0]} to {entries[-1]}")
    for before, after in itertools.pairwise(entries):
        if after < before:
            raise ValueError(f"{name} must not decrease, got {before} followed by {after}")


def row_indices(name: str, value: Any, batch: int) -> list[int]:
    """Row numbers 0..batch-1, from a 1-D integer tensor or a sequence of int."""
    if isinstance(value, Tensor):
        if value.ndim != 1 or value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a 1-D integer tensor, got {value.dtype} {tuple(value.shape)}")
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be a tensor or a sequence of int, got {type(value).__name__}")
    for b in value:
        integer(name, b, 0, batch - 1)
    return list(value)


def readable(value: Tensor) -> bool:
    """Whether the contents can be read without a device synchronisation (and outside tracing)."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_fake(value)


def _is_fake(value: Tensor) -> bool:
    return type(value) is not Tensor and not isinstance(value, torch.nn.Parameter)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, the tensors in the autocast dtype of their device; otherwise the tensors themselves.

    float64 tensors are left alone, as torch's own autocast rules do.
    """
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
    target = _autocast_target(next((t.device.type for t in tensors if isinstance(t, Tensor)), None))
    if target is None:
        return tensors
    return tuple(t.to(target) if isinstance(t, Tensor) and _is_cast(t) else t for t in tensors)


def dtype_under_autocast(x: Tensor) -> torch.dtype:
    """The dtype that :func:`autocast` would give ``x``."""
    target = _autocast_target(x.device.type)
    return x.dtype if target is None or not _is_cast(x) else target


def _autocast_target(kind: str | None) -> torch.dtype | None:
    if kind not in ("cpu", "cuda", "xpu") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _is_cast(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float64
