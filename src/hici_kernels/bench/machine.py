"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..cli.info import cpu, gpus


def describe() -> dict[str, Any]:
    """Processor, memory, load, GPUs, versions, threads, and the git revision where there is one."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu(),
        "memory_bytes": _memory(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "gpus": gpus(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hici_kernels": __version__,
        "threads": torch.get_num_threads(),
        "revision": _revision(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def spread(times: list[float]) -> dict[str, float]:
    """Median, fastest and slowest, in seconds."""
    return {"median_s": statistics.median(times), "fastest_s": min(times), "slowest_s": max(times)}


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _revision() -> str | None:
    """Of the checkout that this file belongs to, marked where it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if Path(_git(root, "rev-parse", "--show-toplevel") or "/").resolve() != root:
        return None
    return _git(root, "describe", "--always", "--dirty")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
