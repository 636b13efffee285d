"""The table of decode-sized calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hici_kernels import attention
from hici_kernels.bench import command, decode, report
from hici_kernels.bench.attention import K, M
from hici_kernels.bench.shapes import Layer

SMALL = Layer("small", 64, 4, 2, 16)
CEILINGS = {"read_bytes_per_s": 1e10}


def point(queries: int, cached: int, slots: bool, dtype: torch.dtype = torch.float32) -> decode.Point:
    return decode.Point(SMALL, queries, cached, slots, dtype)


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize(("queries", "cached"), [(1, 0), (1, 33), (5, 0), (8, 40)])
def test_both_sides_compute_the_same(queries: int, cached: int, slots: bool) -> None:
    p = point(queries, cached, slots)
    x = {n: t.double() for n, t in decode.inputs(p).items()}
    assert x["k"].shape[1] == queries + cached and ("global_k" in x) == slots
    found = decode.composed(x, decode.visible(p))
    torch.testing.assert_close(found, attention(**x, impl="reference"), rtol=0, atol=1e-12)
    torch.testing.assert_close(decode.folded(x, decode.visible(p)), found, rtol=0, atol=1e-12)


def test_the_mask_shows_slots_and_the_past() -> None:
    seen = decode.visible(point(3, 4, True))
    assert seen is not None
    for i in range(3):
        assert [j for j in range(seen.shape[1]) if seen[i, j]] == list(range(K + M + 4 + i + 1))
    assert decode.visible(point(1, 4, True)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [True, False])
def test_measured(dtype: torch.dtype, slots: bool) -> None:
    row = decode.measure(point(2, 16, slots, dtype), None, 7, CEILINGS)
    assert row["sides"][decode.OURS]["correct"] and row["speedup"] > 0
    forms = [row["sides"][f"{decode.PLAIN}, {form}"] for form in decode.FORMS]
    assert all(x["correct"] for x in forms)
    assert row["sides"][decode.PLAIN]["median_s"] == min(x["median_s"] for x in forms)
    ours, theirs = row["sides"][decode.OURS], row["sides"][decode.PLAIN]
    assert row["speedup"] == pytest.approx(theirs["median_s"] / ours["median_s"])
    assert ours["fastest_s"] <= ours["median_s"] <= ours["slowest_s"]
    moved = 2 * 2 * 4 * 16 + 2 * 2 * 16 * (18 + (K + M if slots else 0))
    assert row["bytes"] == moved * dtype.itemsize
    assert ours["read_share"] == pytest.approx(row["bytes"] / ours["median_s"] / 1e10)


def test_a_wrong_result_has_no_time_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "attention", lambda *a, **k: 1.01 * attention(*a, **k))
    row = decode.measure(point(1, 16, True), None, 7, CEILINGS)
    assert row["sides"][decode.OURS]["correct"] is False and "median_s" not in row["sides"][decode.OURS]
    assert "speedup" not in row and report.failures([], [row]) == ["decode: float32, slots, S 1, 16 cached"]


def test_an_implementation_that_cannot_serve_is_reported() -> None:
    row = decode.measure(point(1, 16, True), "flash_attn", 7, CEILINGS)
    assert "cannot serve" in row["sides"][decode.OURS]["error"] and report.failures([], [row]) == []


def row(queries: int, cached: int, ours: float, theirs: float, slots: bool = True) -> dict[str, Any]:
    spread = {"fastest_s": 0.0, "slowest_s": 1.0, "bytes_per_s": 2e9, "read_share": 0.2}
    sides = {
        decode.OURS: {"correct": True, "median_s": ours, **spread},
        decode.PLAIN: {"correct": True, "median_s": theirs, **spread},
    }
    given = {"queries": queries, "cached": cached, "slots": slots, "dtype": "float32", "sides": sides}
    return given | {"speedup": theirs / ours}


def test_every_size_that_loses_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(1, 0, 30e-6, 20e-6), row(1, 64, 30e-6, 60e-6), row(8, 64, 90e-6, 45e-6), row(1, decode.LONGEST, 1, 2)]
    assert [decode.size_of(r) for r in decode.losses(rows)] == [
        "float32, slots, S 1, 0 cached",
        "float32, slots, S 8, 64 cached",
    ]
    report.show_decode(Console(width=130, highlight=False), rows)
    shown = capsys.readouterr().out
    assert "sizes where PyTorch is faster: 2 of 4" in shown and "30.0 / 60.0" in shown
    assert "float32, slots, S 8, 64 cached: 90.0 / 45.0 (slower) us, 0.50 x" in shown
    assert "2.0 GB/s, 20 % of read bandwidth" in shown


def test_the_command_measures_writes_and_draws_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(decode, "points", lambda suite: [point(s, c, True) for s in (1, 2) for c in (0, 16)])
    code = command.run(
        ops="decode",
        impls="reference",
        dtype="float32",
        suite="quick",
        threads=1,
        rounds=7,
        json_path=tmp_path / "a.json",
        chart_path=tmp_path / "a.png",
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and found["cases"] == [] and len(found["decode"]) == 4
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not (tmp_path / "a-decode.png").exists()


def test_beside_other_operations_it_has_a_chart_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(decode, "points", lambda suite: [point(1, 16, True)])
    code = command.run(
        ops="decode,merge_attention",
        impls="reference",
        dtype="float32",
        suite="quick",
        threads=1,
        rounds=7,
        json_path=None,
        chart_path=tmp_path / "a.png",
    )
    assert code == 0 and {p.name for p in tmp_path.iterdir()} == {"a.png", "a-decode.png"}
