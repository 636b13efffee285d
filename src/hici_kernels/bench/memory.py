"""Peak memory of a call, from the allocator's own record."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


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
