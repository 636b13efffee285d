"""benchmarks/quality/hga_routing.py at a small size: equal density, paired gaps, going on after a stop."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hici_kernels.demo.lm import ByteLM


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "quality" / "hga_routing.py"
    pytest.importorskip("tqdm")
    spec = importlib.util.spec_from_file_location("hga_routing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hga_routing", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WINDOWS", {1024: 2})
    monkeypatch.setattr(module, "SHORTEST", {"default": 4096, "quarter": 1024})
    return module


def test_table_of_two_short_windows(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, part = ByteLM.load(), tmp_path / "table.part"
    rows = script.against_strict(script.measure(model, [1024], None, script.Readings(part, "key")))
    by_kind = {r["kind"]: r for r in rows}
    assert list(by_kind) == list(script.KINDS)
    strict = by_kind["strict"]
    assert strict["over_strict"] == 0 and strict["windows"] == 2 and 0 < strict["density"] < 1
    for kind in ("prefix", "strict, shared by kv head"):
        assert by_kind[kind]["density"] == pytest.approx(strict["density"], rel=1e-3)
    assert by_kind["block"]["density"] < strict["density"]
    assert by_kind[script.EQUAL]["density"] == pytest.approx(strict["density"], rel=0.05)
    assert all(r["gap_lowest"] <= r["gap"] <= r["gap_highest"] for r in rows)

    # a run that was stopped in mid-write makes what is missing, and only that
    lines = part.read_text().splitlines()
    part.write_text("\n".join([*lines[:-2], lines[-2], lines[-1][:20]]))
    made = []
    right = script.read
    monkeypatch.setattr(script, "read", lambda *a: made.append(a) or right(*a))
    again = script.against_strict(script.measure(model, [1024], None, script.Readings(part, "key")))
    assert len(made) == 1 and json.dumps(again) == json.dumps(rows)
    made.clear()
    script.measure(model, [1024], 1, script.Readings(part, "another program"))
    assert len(made) == 9  # dense, seven kinds, and closed budgets for the calibration

    pytest.importorskip("matplotlib")
    script.draw(rows, 16384, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 5000
