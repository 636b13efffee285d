"""Peak memory of a call: from the allocator's own record, and of the whole process."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

__all__ = ["kept_memory", "peak_bytes", "resident_growth"]

T = TypeVar("T")


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    # Some builds of the profiler write a line to file descriptor 2 at start and stop, below sys.stderr.
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


# mallopt's parameters, and the values glibc starts with
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
MMAP_THRESHOLD_START, MMAP_MAX_START = 128 << 10, 1 << 16


@contextlib.contextmanager
def kept_memory() -> Iterator[bool]:
    """Memory that is freed inside stays with the process, as most allocators have it; whether glibc did so.

    By itself glibc returns a large result to the system when it is freed, and every call pays for its pages anew, on
    virtual machines up to a fifth of a call that computes for two seconds. That is no property of a kernel.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        yield False
        return
    kept = bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, -1))
    try:
        yield kept
    finally:
        mallopt(MMAP_MAX, MMAP_MAX_START)
        mallopt(MMAP_THRESHOLD, MMAP_THRESHOLD_START)
        mallopt(TRIM_THRESHOLD, MMAP_THRESHOLD_START)
        _trim()


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Most bytes that torch's CPU allocator had handed out at once during ``call``, above where it began.

    The result of the call counts, as do scratch buffers inside kernels; memory that a library takes past torch's
    allocator does not. None where this build of torch keeps no such record.
    """
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    try:
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        sizes = [e.nbytes() for e in events]
    except AttributeError:
        return None
    finally:
        del result
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return peak


def resident_growth(call: Callable[[], T]) -> tuple[T, int | None]:
    """The result of ``call``, and how far the resident memory of the process rose above where it began.

    Whoever allocates: torch, kernels' scratch, libraries. The result counts; so does what a first call keeps for later
    ones, and memory that was allocated earlier and never touched until now. Exact to a fraction of a megabyte
    where the kernel resets the high-water mark (Linux), None elsewhere.
    """
    try:
        # freed memory that the C library keeps would be used again without the process growing
        _trim()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
    except (OSError, KeyError):
        return call(), None
    result = call()
    return result, max(0, _status("VmHWM") - before)


def _trim() -> None:
    """Give what the C library keeps back to the system, where it can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return 1024 * int(lines[key].split()[0])
