"""Peak memory of a call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hici_kernels.bench import memory

MIB = 1 << 20


def test_peak_memory_counts_what_a_call_allocates() -> None:
    peak = memory.peak_bytes(lambda: torch.empty(MIB, dtype=torch.uint8).float().sum())
    assert peak is None or 5 * MIB <= peak <= 6 * MIB


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: torch.ones(64 * MIB, dtype=torch.uint8), 64),
        (lambda: torch.ones(64 * MIB, dtype=torch.uint8).short().max(), 192),  # temporaries count
        (lambda: None, 0),
    ],
)
def test_resident_growth_is_the_peak_above_the_start(call: object, expected: int) -> None:
    memory.resident_growth(call)  # type: ignore[arg-type]
    result, grown = memory.resident_growth(call)  # type: ignore[arg-type]
    if grown is None:
        pytest.skip("this system does not reset the high-water mark of resident memory")
    assert (expected - 2) * MIB <= grown <= (expected + 24) * MIB
    assert (result is None) == (expected == 0)


def test_resident_growth_survives_a_system_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(memory.Path, "write_text", refuse)
    assert memory.resident_growth(lambda: 7) == (7, None)


# a process of its own: only the heap of a main thread grows to any size
FREED = """
import resource
from pathlib import Path
import torch
from hici_kernels.bench import memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
start = resident()
with memory.kept_memory() as kept:
    # an aligned block does not fit where one of its size was: the heap grows a few times first
    repeated = min(faults() for _ in range(8))
    inside = resident()
print(kept, repeated, inside - start, resident() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_freed_memory_is_kept_inside_and_only_there() -> None:
    """Large results soon cost no new pages inside, and what was kept goes back to the system."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    kept, repeated, inside, after = done.stdout.split()
    if kept != "True":
        pytest.skip("this C library has no mallopt")
    assert int(repeated) < 100
    assert int(inside) >= 60 and int(after) <= 8
