"""What the numbers were measured on, and the ceilings of that machine in the same run."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..cli.info import cpu, gpus

MATMUL = 1024
COPY_BYTES = 1 << 28


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
        "threads": torch.get_num_threads(),
        "revision": _revision(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def ceilings(dtypes: list[torch.dtype]) -> dict[str, Any]:
    """Best of 5: FLOP/s of a square matmul per dtype, bytes/s (read + written) of a large copy."""
    found: dict[str, Any] = {"matmul_flops": {}, "matmul_size": MATMUL, "copy_bytes_per_s": _copy_rate()}
    for dtype in dtypes:
        a, b = torch.randn(2, MATMUL, MATMUL).to(dtype)
        seconds = _best(functools.partial(torch.matmul, a, b))
        found["matmul_flops"][str(dtype)] = 2 * MATMUL**3 / seconds
    return found


def _copy_rate() -> float:
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _best(lambda: target.copy_(source))


def _best(call: Callable[[], object], runs: int = 5) -> float:
    call()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def spread(times: list[float]) -> dict[str, float]:
    """Median, fastest and slowest, in seconds."""
    return {"median_s": statistics.median(times), "fastest_s": min(times), "slowest_s": max(times)}


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _revision() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
