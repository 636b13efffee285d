"""Goal lines: numbers of this run beside what is needed."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from hici_kernels.bench import decode, report
from hici_kernels.bench.attention import EXPANDED
from hici_kernels.bench.case import FASTEST, PLAIN
from hici_kernels.bench.global_stats import COPY
from hici_kernels.bench.goals import goals

AMX = {"fma_flops": 1e11, "bfloat16_flops": 1e12, "bfloat16_products": "amx", "copy_bytes_per_s": 1e10}
VECTOR = AMX | {"bfloat16_products": "dpbf16"}


def row(op: str, case: str, dtype: str, direction: str, sides: dict[str, Any], shape: str = "") -> dict[str, Any]:
    against = EXPANDED if op == "attention" else PLAIN
    return {"op": op, "case": case, "dtype": dtype, "direction": direction, "sides": sides, "shape": shape} | {
        "against": against
    }


def side(**values: float) -> dict[str, Any]:
    return {"correct": True, "median_s": 1.0, **values}


def verdicts(found: list[dict[str, Any]]) -> dict[str, str]:
    return {g["goal"]: g["verdict"] for g in found}


def test_nothing_is_claimed_where_nothing_was_measured() -> None:
    found = goals([], [], AMX)
    assert found and set(verdicts(found).values()) == {"not measured"}


@pytest.mark.parametrize(("speedup", "share"), [(2.5, 0.3), (1.9, 0.2)])
def test_attention_in_bfloat16(speedup: float, share: float) -> None:
    rows = [
        row("attention", "x", "bfloat16", "forward", {"cpu": side(speedup=speedup, product_share=share)}),
        row("attention", "x", "bfloat16", "forward+backward", {"cpu": side(speedup=speedup)}),
    ]
    found = {g["goal"]: g for g in goals(rows, [], AMX)}
    expected = "reached" if speedup > 2 else "missed"
    assert found["attention bfloat16 forward, times SDPA, expanded"]["verdict"] == expected
    assert found["attention bfloat16 forward, times SDPA, expanded"]["aim"] == 3.0
    assert found["attention bfloat16 forward+backward, times SDPA, expanded"]["verdict"] == expected
    assert found["attention bfloat16 forward, share of resident AMX tile products"]["verdict"] == expected
    vector = {g["goal"]: g for g in goals(rows, [], VECTOR)}[
        "attention bfloat16 forward, share of resident AMX tile products"
    ]
    assert vector["verdict"] == "not measured" and vector["value"] is None
    assert vector["note"] == f"no AMX; {100 * share:.0f} % of the rate of dpbf16 chains"


def test_attention_in_float32() -> None:
    rows = [row("attention", "x", "float32", "forward", {"cpu": side(speedup=1.2, product_share=0.6)})]
    found = verdicts(goals(rows, [], AMX))
    assert found["attention float32 forward, times SDPA, expanded"] == "reached"
    assert found["attention float32 forward, share of the multiply-add rate"] == "missed"
    without = verdicts(goals(rows, [], AMX | {"fma_flops": None}))
    assert without["attention float32 forward, share of the multiply-add rate"] == "not measured"


def test_the_reference_is_not_judged() -> None:
    rows = [row("attention", "x", "float32", "forward", {"reference": side(speedup=9.0, product_share=0.9)})]
    assert set(verdicts(goals(rows, [], AMX)).values()) == {"not measured"}


def test_a_wrong_result_reaches_nothing() -> None:
    wrong = {"cpu": {"correct": False, "error_max": 1.0, "error_allowed": 0.1}}
    rows = [row("local_slots", "H 4096", "float32", "forward", wrong)]
    assert set(verdicts(goals(rows, [], AMX)).values()) == {"not measured"}


@pytest.mark.parametrize(("ours", "verdict"), [(100, "reached"), (101, "missed")])
def test_memory_of_the_layer(ours: int, verdict: str) -> None:
    sides = {FASTEST: side(speedup=2.5, resident_bytes=ours), PLAIN: side(speedup=1.0, resident_bytes=400)}
    found = verdicts(goals([row("hici_layer", "x, core", "bfloat16", "forward", sides)], [], AMX))
    assert found["layer, extra peak memory over the published sequence's"] == verdict
    assert found["layer, projections excluded, times the published sequence"] == "reached"
    whole = goals([row("hici_layer", "x, with projections", "bfloat16", "forward", sides)], [], AMX)
    assert verdicts(whole)["layer with projections, times the published sequence"] == "reported"


def test_slots() -> None:
    rows = [
        row("local_slots", "H 4096", "float32", "forward", {"cpu": side(speedup=5.5)}),
        row("local_slots", "H 512", "bfloat16", "forward", {"cpu": side(speedup=2.9)}),
        row("local_slots", "H 512", "bfloat16", "forward+backward", {"cpu": side(speedup=2.0)}),
    ]
    found = verdicts(goals(rows, [], AMX))
    assert found["slots H 4096 float32 forward, times two projections and SDPA"] == "reached"
    assert found["slots H 512 bfloat16 forward, times two projections and SDPA"] == "missed"
    assert found["slots H 512 bfloat16 forward+backward, times two projections and SDPA"] == "reported"


def test_statistics() -> None:
    # beside a copy of the same rounds: 0.8 and 0.6 of its rate
    fast, slow = ({"cpu": {"median_s": s}, COPY: {"median_s": 0.03}} for s in (0.0375, 0.05))
    rows = [
        row("global_stats", "256 MiB", "float32", "forward", fast),
        row("global_stats", "256 MiB", "bfloat16", "forward", slow),
        row(
            "global_stats",
            "4 segments of a 7B layer",
            "float32",
            "forward",
            {"cpu": {"median_s": 15e-6}},
            "H 4, causal",
        ),
        row(
            "global_stats",
            "4 segments of a 7B layer",
            "float32",
            "forward",
            {"cpu": {"median_s": 25e-6}},
            "H 4, shared",
        ),
    ]
    found = verdicts(goals(rows, [], AMX))
    assert found["statistics float32 of 256 MiB, share of copy bandwidth"] == "reached"
    assert found["statistics bfloat16 of 256 MiB, share of copy bandwidth"] == "missed"
    assert found["statistics float32 causal, 4 segments of a 7B layer"] == "reached"
    assert found["statistics float32 shared, 4 segments of a 7B layer"] == "missed"


@pytest.mark.parametrize(("speedup", "verdict"), [(1.0, "reached"), (0.9, "missed")])
def test_decode(speedup: float, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    sides = {name: side(bytes_per_s=3e9, read_share=0.25) for name in (decode.OURS, decode.PLAIN)}
    point = {"queries": 1, "cached": decode.LONGEST, "slots": True, "dtype": "float32", "sides": sides}
    found = goals([], [point | {"speedup": speedup}], AMX)
    assert verdicts(found)["decode-sized calls with slots, sizes slower than PyTorch"] == verdict
    line = next(g for g in found if g["goal"].startswith("one query"))
    assert line["value"] == 0.25 and line["note"] == "3.0 GB/s, PyTorch 3.0 GB/s" and line["verdict"] == "reported"
    report.show_goals(Console(width=200, highlight=False), found)
    shown = capsys.readouterr().out
    assert "25.0 %" in shown and verdict in shown and "not measured" in shown
