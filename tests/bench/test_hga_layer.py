"""The suite "hga" at tiny sizes: bytes are counted exactly, wrong results have no time, every goal has its row."""

from __future__ import annotations

import pytest
import torch

from hici_kernels import HGAConfig, _native
from hici_kernels.bench import command, hga_layer
from hici_kernels.bench.hga_layer import OURS, SMALL, History, Sizes, Step, disjoint
from hici_kernels.rope import Rope

TINY = Sizes(layer=SMALL, cached=16384, far=32768, prefill=2048, batch=2, trace=2048)
CEILINGS = {"read_bytes_per_s": 1e10}


def test_every_row_and_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(hga_layer, "progress", lambda parts, text: shown.extend(parts) or parts)
    rows = hga_layer.measure(7, CEILINGS, TINY)
    assert len(shown) == 5
    assert [r["name"].split(",")[0] for r in rows] == ["decode"] * 5 + ["prefill"] * 2
    for row in rows:
        assert row["sides"][OURS]["correct"] and row["sides"][OURS]["median_s"] > 0, row["name"]
    found = hga_layer.goals(rows)
    assert len(found) == 9 and all(g["value"] > 0 and g["verdict"] != "not measured" for g in found)


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Step.attend
    monkeypatch.setattr(
        Step,
        "attend",
        lambda self, history, routes, impl=None: right(self, history, routes, impl) * (1 if impl else 1.1),
    )
    row = hga_layer.far_row(TINY, 7, CEILINGS, HGAConfig())
    assert row["sides"][OURS]["correct"] is False and "median_s" not in row["sides"][OURS]


def test_disjoint_routes_and_their_bytes() -> None:
    config, s = HGAConfig(), 16384
    routes = disjoint(SMALL, 1, s, config, 3)
    for g in range(2):
        ids = routes[0, 0, 2 * g : 2 * g + 2]
        assert len(set(ids.flatten().tolist())) == 2 * 32 and (ids.diff() > 0).all()
        assert ids.min() >= 2 * 4 and ids.max() < (s // 64 - 9) * 4
    history = History(SMALL, 1, s, config, Rope.from_theta(1e6, 64), 0)
    q = torch.randn(1, 1, 4, 64).bfloat16()
    step = Step([history], [routes], torch.tensor([[s - 1]]), config, q)
    fixed = 2 * ((256 - 1 - 10) * 128 + (10 * 64 + 64) * 256 + 64 * 16 * 256)
    groups = step.bytes() - fixed
    if _native.status() is None:
        call, read = step.reading()
        # chunk keys in runs of 16, and no group keys
        assert 0 <= fixed + 2 * 128 * 128 - read - groups <= 2 * 128 * 128
        assert call() == call()  # one history, one set of routes
    assert 2 * 64 * 128 <= groups <= 2 * 128 * 128 and groups % (4 * 128) == 0


def test_options_that_mean_nothing_are_refused() -> None:
    rest = {"threads": None, "rounds": 7, "json_path": None, "chart_path": None}
    with pytest.raises(ValueError, match="--op must be among hga_layer, kv_store"):
        command.run(ops="attention", impls=None, dtype=None, suite="hga", **rest)
