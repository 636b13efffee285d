"""The measuring scripts run; what they measure is judged by whoever runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "transformers"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_overhead():
    rows = script("overhead").measure(rounds=2)
    assert [row["method"] for row in rows] == ["hga, first layer", "hga", "hici"]
    assert all(row["wrapped"]["median_s"] > 0 and row["bare"]["median_s"] > 0 for row in rows)


def test_long_prefill(monkeypatch):
    """A layer of a few dims in place of the real one: dense and routed, prefill in pieces, decode, memory."""
    from tiny_models import tiny

    measured = script("long_prefill")
    monkeypatch.setattr(measured, "model", lambda dtype: tiny("qwen3", num_hidden_layers=1, vocab_size=512).to(dtype))
    for name in ("dense", "device"):
        row = measured.side(name, 300, 3, 128, "float32", None)
        assert row["prefill_s"] > 0 and row["decode"]["median_s"] > 0 and row["history_bytes"]["device"] > 0
        measured.show(row)
    assert row["error_with_covering_budgets"] < 1e-4
