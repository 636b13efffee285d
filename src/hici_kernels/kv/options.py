"""What a :class:`KVStore` may be told of its tier, limits and transfers, checked without making one."""

from __future__ import annotations

import os

import torch

from .. import _checks
from ..errors import ImplError
from . import on_device
from .meter import TIERS

DEFAULT_HOST_BYTES = 1 << 30  # of tier "disk"
BANK_LIST_BYTES = 16  # a slot
LIST_BYTES = 64 << 10  # kept free of the bank where the limit is small, else an eighth of it


def check_options(
    *,
    tier: str,
    device_bytes: int | None,
    host_bytes: int | None,
    path: object,
    cold_dtype: torch.dtype | None,
    bank_pages: int | None,
    fetch: str,
    queue_depth: int,
    io: str,
    direct: bool,
    prefetch: bool,
) -> None:
    """
    Raises:
        TypeError, ValueError: an argument that no store of this tier takes, whatever its sizes and its device.
    """
    _checks.choice("tier", tier, TIERS)
    if tier == "device":
        for name, given in (("host_bytes", host_bytes), ("bank_pages", bank_pages)):
            if given is not None:
                raise ValueError(f"{name} must be None with tier='device', got {given!r}")
    for name, given in (("device_bytes", device_bytes), ("host_bytes", host_bytes), ("bank_pages", bank_pages)):
        if given is not None:
            _checks.integer(name, given, 0)
    _check_path(tier, path)
    if cold_dtype not in (None, torch.int8):
        raise ValueError(f"cold_dtype must be None or torch.int8, got {cold_dtype!r}")
    _checks.integer("queue_depth", queue_depth, 1, 4096)
    _checks.choice("io", io, ("auto", "uring", "threads"))
    _checks.boolean("direct", direct)
    _checks.boolean("prefetch", prefetch)
    _checks.choice("fetch", fetch, ("copy", "gather"))
    if fetch == "gather" and tier == "device":
        raise ValueError(f"fetch must be 'copy' with tier='device', got {fetch!r}")


def check_fetch(fetch: str, device: torch.device) -> None:
    """
    Raises:
        ImplError: the device cannot fetch pages by itself.
    """
    reason = on_device.refusal(device) if fetch == "gather" else None
    if reason is not None:
        raise ImplError(f"fetch='gather' cannot be served: {reason}")


def bank_slots(host_bytes: int, stride: int) -> int:
    """Pages of ``stride`` bytes that the bank of tier "disk" has room for.

    Raises:
        ValueError: there is room for none.
    """
    # the rest for the lists of records and pages, which grow with the history
    lists = max(host_bytes // 8, min(host_bytes // 2, LIST_BYTES))
    slots = (host_bytes - lists) // (stride + BANK_LIST_BYTES)
    if slots < 1:
        raise ValueError(f"host_bytes must hold at least one page of {stride} bytes, got {host_bytes}")
    return slots


def _check_path(tier: str, path: object) -> None:
    if tier != "disk":
        if path is not None:
            raise ValueError(f"path must be None with tier={tier!r}, got {path!r}")
        return
    if path is None:
        raise ValueError("path must be given with tier='disk', got None")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__} {path!r}")
    if not os.path.isdir(path):
        raise ValueError(f"path must be a directory that exists, got {os.fspath(path)!r}")
