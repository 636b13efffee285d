"""Peak memory of a call."""

from __future__ import annotations

import resource

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


def test_freed_memory_is_kept_inside_and_only_there() -> None:
    """Large results soon cost no new pages inside; outside each one does."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        del_me = torch.empty(64 * MIB, dtype=torch.uint8).fill_(1)
        del del_me
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages = 64 * MIB // resource.getpagesize()
    with memory.kept_memory() as kept:
        if not kept:
            pytest.skip("this C library has no mallopt")
        # an aligned block does not fit where one of its size was: the heap grows a few times first
        inside = [faults() for _ in range(8)]
    assert min(inside) < pages // 8
    assert min(faults() for _ in range(4)) > pages // 8
