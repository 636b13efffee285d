"""The bench of KVStore on disk, at a size that takes a moment."""

from __future__ import annotations

import json

import pytest
import torch

from hici_kernels import HGAConfig, _native
from hici_kernels.bench import command, hga_layer, kv_store

pytestmark = pytest.mark.skipif(_native.status() is not None, reason="the tier disk needs the native library")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, steps = tmp_path_factory.mktemp("history"), []

    def progress(items, text, total=None):
        for item in items:
            steps.append(item[0])
            yield item
        assert total == len(steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_store, "progress", progress)
        made = kv_store.measure(kv_store.TEST, str(folder), rounds=2)
    assert not list(folder.iterdir()) and tuple(steps) == kv_store.STAGES == tuple(made)
    return made


@pytest.mark.parametrize("op, charts", [("kv_store", {"a.png"}), (None, {"a.png", "a-kv_store.png"})])
def test_the_command_draws_it(op, charts, found, monkeypatch, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    side = {"median_s": 1e-3, "fastest_s": 1e-3, "slowest_s": 2e-3, "correct": True}
    monkeypatch.setattr(hga_layer, "measure", lambda *_: [{"name": "decode", "sides": {hga_layer.OURS: side}}])
    monkeypatch.setattr(hga_layer, "goals", lambda rows: [])
    monkeypatch.setattr(kv_store, "sizes", lambda suite: [kv_store.TEST])
    monkeypatch.setattr(kv_store, "measure", lambda size: found)
    rest = {"impls": None, "dtype": None, "threads": 1, "rounds": 7, "json_path": tmp_path / "new" / "a.json"}
    assert command.run(ops=op, suite="hga", chart_path=tmp_path / "b" / "a.png", **rest) == 0
    assert {p.name for p in (tmp_path / "b").iterdir()} == charts
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "b").iterdir())
    written = json.loads((tmp_path / "new" / "a.json").read_text())
    assert len(written["kv_store"]) == 1 and len(written["goals"]) == len(kv_store.goals(found))
    other = found | {"steps": [step | {"equal": False} for step in found["steps"]]}
    monkeypatch.setattr(kv_store, "measure", lambda size: other)
    assert command.run(ops=op, suite="hga", chart_path=None, **rest) == 1


def test_rows_goals_and_text(found) -> None:
    assert [s["routes"] for s in found["steps"]] == ["replayed", "replayed, no prefetch", "disjoint"]
    for row in found["steps"]:
        assert row["equal"] and row["pages"] > 0 and 0 <= row["hit_rate"] <= 1
        assert all(0 < row[t]["fetching_s"] <= row[t]["median_s"] for t in ("host", "disk"))
    assert found["memory"]["peak_bytes"]["host"] <= found["memory"]["limits"]["host"]
    assert found["cold"]["bytes"] < found["cold"]["exact_bytes"]
    assert found["cold"]["exact_error_max"] < found["cold"]["error_max"] < 0.05
    assert len(found["reading"]["share"]) == 2 and found["reading"]["page_bytes"] == 4096
    lines: list[str] = []
    kv_store.show(lines.append, found)
    assert len([x for x in lines if x.startswith("goal ")]) == len(kv_store.goals(found)) == 6
    assert all(x["median_s"] > 0 for x in found["parts"].values()) and len(found["parts"]) == 6
    assert [g["tokens"] for g in found["growth"]] == [4096, 4096, 16384]
    assert all(g["over"] <= 1 and 0 < g["lists"] < g["rest"] for g in found["growth"])


def test_routes_keep_the_budgets() -> None:
    config, size = HGAConfig(), kv_store.TEST
    trace = kv_store._trace(size)
    for kind in ("replayed", "disjoint"):
        source = kv_store._Routes(size, config, trace if kind == "replayed" else None)
        steps = [source.next(0, number) for number in range(2)]
        for routes in steps:
            assert routes.shape == (1, 1, 4, config.topk_groups) and routes.dtype == torch.int32
            for head in routes[0, 0]:
                ids = head[head >= 0]
                assert len(ids) == len(ids.unique()) and (ids // 4 >= 2).all() and (ids // 4 < 64 - 8).all()
        same = torch.isin(steps[1], steps[0]).float().mean()
        assert same > 0.5 if kind == "replayed" else same < 1


def test_a_page_that_cannot_be_read_has_no_speed(monkeypatch, tmp_path) -> None:
    class Broken:
        def read_blocks(self, *_: object) -> float:
            return -5.0

    with kv_store._filled(kv_store.TEST, "disk", str(tmp_path)) as store:
        monkeypatch.setattr(_native, "library", Broken)
        with pytest.raises(OSError, match="Input/output"):
            kv_store._reading(store, kv_store.TEST, 1)
