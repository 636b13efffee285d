"""Time of device work: events around one call, the L2 cache emptied before it, launch gaps hidden.

A call is enqueued behind a kernel that only waits, so that the device begins it when the host has already launched all
of it: what is measured is the device's time, not Python's. The host's own time per call is measured beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .machine import spread

MATMUL = 8192
COPY_BYTES = 4 << 30
# Seconds of waiting before every timed call at least, and times what the host needs to launch it; cycles of a second.
HEAD_START, HEAD_STARTS, CYCLES = 0.5e-3, 2, 2e9
# Written before every timed call: several times the L2 of any chip so far.
FLUSH_BYTES = 512 << 20


class Clock(Protocol):
    """Seconds of one call; ``ahead``: how long the device waits first, while the host launches it."""

    def seconds(self, call: Callable[[], object], ahead: float = HEAD_START) -> float: ...

    def host_seconds(self, call: Callable[[], object]) -> float: ...


class DeviceClock:
    """Events on the current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object], ahead: float = HEAD_START) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        torch.cuda._sleep(int(ahead * CYCLES))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3

    def host_seconds(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        taken = time.perf_counter() - began
        torch.cuda.synchronize()
        return taken


class HostClock:
    """The same interface where there is no device: tests of everything around the numbers."""

    def seconds(self, call: Callable[[], object], ahead: float = HEAD_START) -> float:
        return self.host_seconds(call)

    def host_seconds(self, call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began


def alternate(sides: dict[str, Callable[[], object]], clock: Clock, rounds: int) -> dict[str, dict[str, float]]:
    """Median, fastest and slowest of every side; every round runs each once, so that drift of clocks hits all alike."""
    ahead: dict[str, float] = {}
    for name, call in sides.items():
        for _ in range(2):  # compilation, caches
            call()
        ahead[name] = max(HEAD_START, HEAD_STARTS * clock.host_seconds(call))
    times: dict[str, list[float]] = {name: [] for name in sides}
    host: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            times[name].append(clock.seconds(call, ahead[name]))
            host[name].append(clock.host_seconds(call))
    return {
        name: spread(t) | {"host_s": statistics.median(host[name]), "head_start_s": ahead[name]}
        for name, t in times.items()
    }


def ceilings(
    device: torch.device, clock: Clock, dtypes: list[torch.dtype], matmul: int = MATMUL, copy_bytes: int = COPY_BYTES
) -> dict[str, Any]:
    """Best of 7 on random data: FLOP/s of a square matmul per dtype, bytes/s (read + written) of a large copy."""
    found: dict[str, Any] = {"matmul_flops": {}, "matmul_size": matmul, "copy_size": copy_bytes}
    for dtype in dtypes:
        a, b = (torch.randn(matmul, matmul, device=device, dtype=dtype) for _ in range(2))
        found["matmul_flops"][str(dtype)] = 2 * matmul**3 / _best(lambda a=a, b=b: a @ b, clock)  # type: ignore[misc]
    source = torch.randint(256, (copy_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    found["copy_bytes_per_s"] = 2 * copy_bytes / _best(lambda: target.copy_(source), clock)
    return found


def _best(call: Callable[[], object], clock: Clock) -> float:
    call()
    return min(clock.seconds(call) for _ in range(7))
