"""Runs of the whole command measure their ceilings on small streams: what they find is tested, not how precisely."""

from __future__ import annotations

import functools

import pytest

from hici_kernels.bench import ceilings


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ceilings, "measure", functools.partial(ceilings.measure, stream_bytes=1 << 22, shortest=1e-3), raising=True
    )
