"""``hici tune`` with a stand-in for kernels and clock: what it tries, what it refuses, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hici_kernels import _dispatch, tuning
from hici_kernels.bench.gpu_cases import attention_case, slots_case, stats_case
from hici_kernels.bench.gpu_hga_cases import routed_case
from hici_kernels.bench.shapes import Layer
from hici_kernels.cli.main import app
from hici_kernels.tuning import lookup, search
from hici_kernels.tuning.table import NOT_MEASURED, Entry

CPU = torch.device("cpu")
TINY = Layer("tiny", 64, 4, 2, 16)
BEST = {"BLOCK_H": 64, "num_warps": 8, "num_stages": 2}


class FakeClock:
    """Seconds that grow with the distance from BEST; what is timed decides, through its configuration."""

    def __init__(self) -> None:
        self.seen: list[dict[str, int]] = []

    def seconds(self, call: Any) -> float:
        call()
        configuration = self.seen[-1]
        distance = abs(configuration["BLOCK_H"].bit_length() - BEST["BLOCK_H"].bit_length())
        distance += abs(configuration["num_warps"].bit_length() - BEST["num_warps"].bit_length())
        return 1e-6 * (1 + distance + abs(configuration["num_stages"] - BEST["num_stages"]))

    host_seconds = seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A kernel that looks its configuration up, fails at BLOCK_H 128 and is wrong with 16 warps."""
    clock = FakeClock()

    def forward(local: Tensor, *rest: Any) -> Tensor:
        found = tuning.configuration("global_stats", "interpret", head_dim=32, segment_len=4, dtype=local.dtype)
        clock.seen.append(found)
        if found["BLOCK_H"] == 128:
            raise RuntimeError("out of resource: shared memory")
        return local.sum((1, 2)) + (1.0 if found["num_warps"] == 16 else 0.0)

    monkeypatch.setattr(_dispatch, "load", lambda op, name: (SimpleNamespace(forward=forward), None))
    table = (Entry("global_stats", "interpret", 0, 0, ("float32",), {"BLOCK_H": 32, "num_warps": 2, "num_stages": 2}),)
    monkeypatch.setattr(lookup, "read", lambda op: table)
    monkeypatch.setattr(search, "read", lambda op: table)
    lookup.entry_for.cache_clear()
    yield clock
    lookup.entry_for.cache_clear()


def shape() -> search.Shape:
    return search.Shape("global_stats", (32, 4), stats_case("tiny", 4, torch.float32, False, h=32))


def test_it_climbs_to_the_fastest_and_passes_over_what_fails(clock: FakeClock) -> None:
    found = search.best(shape(), CPU, clock)
    assert found["configuration"] == BEST
    assert found["median_s"] == pytest.approx(1e-6) and found["started_s"] == pytest.approx(4e-6)
    failed = {json.dumps(t["configuration"]): t["error"] for t in found["tried"] if "error" in t}
    assert any("out of resource" in e for e in failed.values())
    assert any("another result" in e for e in failed.values())
    assert len(found["tried"]) < 25


def test_a_trial_ends_with_its_block(clock: FakeClock) -> None:
    def now() -> dict[str, int]:
        return tuning.configuration("global_stats", "interpret", head_dim=32, segment_len=4, dtype="float32")

    before = now()
    with lookup.trial("global_stats", {"BLOCK_H": 1}):
        assert now() == {"BLOCK_H": 1}
        with lookup.trial("attention", {"BLOCK_M": 2}):
            assert now() == {"BLOCK_H": 1}
    assert now() == before


def test_the_table_is_rewritten_with_where_and_when(clock: FakeClock, tmp_path: Path) -> None:
    code = search.tune([shape()], CPU, clock, json_path=tmp_path / "x" / "tried.json", folder=tmp_path)
    assert code == 0
    rows = json.loads((tmp_path / "global_stats.json").read_text())["entries"]
    assert [r["measured"] == NOT_MEASURED for r in rows] == [True, False]
    new = rows[1]
    assert new["configuration"] == BEST and (new["head_dim"], new["segment_len"]) == (32, 4)
    assert {"gpu", "when", "median_us", "torch", "triton", "shape"} <= set(new["measured"])
    assert "candidates" in new["why"]
    assert json.loads((tmp_path / "x" / "tried.json").read_text())[0]["tried"]


def test_a_dry_run_writes_no_table(clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any) -> None:
        raise AssertionError("a dry run wrote a table")

    monkeypatch.setattr(search, "write", forbidden)
    search.tune([shape()], CPU, clock, json_path=None, folder=None)


def test_half_precisions_measured_apart_keep_entries_of_their_own() -> None:
    case = stats_case("tiny", 4, torch.bfloat16, False, h=32)
    found = {"median_s": 1e-6, "started_s": 2e-6, "configuration": BEST, "started_from": BEST, "tried": []}
    for both, dtypes in ((True, ("bfloat16", "float16")), (False, ("bfloat16",))):
        entry = search.entry_of(search.Shape("global_stats", (32, 4), case), found, CPU, both=both)
        assert entry.dtypes == dtypes


def test_an_entry_is_replaced_for_its_dtypes_only() -> None:
    old = [
        Entry("t", "sm_90", 128, 1024, ("bfloat16", "float16", "float32"), {"A": 1}),
        Entry("t", "gfx942", 128, 1024, ("bfloat16",), {"A": 2}),
    ]
    new = Entry("t", "sm_90", 128, 1024, ("bfloat16", "float16"), {"A": 3})
    found = search.merged(old, new)
    assert [(e.arch, e.dtypes, e.configuration["A"]) for e in found] == [
        ("sm_90", ("float32",), 1),
        ("sm_90", ("bfloat16", "float16"), 3),
        ("gfx942", ("bfloat16",), 2),
    ]


def test_a_block_and_its_warps_move_together() -> None:
    start = {"BLOCK_M": 128, "BLOCK_N": 16, "num_warps": 8}
    found = list(search.neighbours(start))
    assert {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4} in found
    assert {"BLOCK_M": 256, "BLOCK_N": 16, "num_warps": 16} in found
    assert {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 16} in found
    assert start not in found and len({tuple(c.items()) for c in found}) == len(found)


def test_steps() -> None:
    assert search.steps("BLOCK_M", 16) == [32] and search.steps("DQ_BLOCK_N", 256) == [128]
    assert search.steps("num_warps", 4) == [2, 8] and search.steps("num_stages", 1) == [2]
    assert search.steps("TMA", 0) == [1] and search.steps("TMA", 1) == [0]
    assert search.steps("TILES", 1) == [2] and search.steps("TILES", 64) == [32]


def test_every_table_has_shapes() -> None:
    for op in tuning.tables():
        found = list(search.shapes([op], [128], [1024, 16384], ["bfloat16"]))
        assert found and all(s.op == op and op.startswith(s.case.op) for s in found)
        assert len({s.key for s in found}) == len(found)


@pytest.mark.parametrize("op", ["attention", "local_slots", "global_stats", "hga_attention"])
def test_backward_gets_what_the_operation_gives_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = _dispatch.load
    monkeypatch.setattr(_dispatch, "load", lambda op, name: load(op, "reference"))
    case = {
        "attention": attention_case(TINY, 64, 16, torch.float32, "tiny"),
        "local_slots": slots_case(TINY, 64, 16, torch.float32, width=32, heads=4),
        "global_stats": stats_case("tiny", 4, torch.float32, False, h=32),
        "hga_attention": routed_case(128, 8, torch.float32, 16),
    }[op]
    gradients = search.problem(search.Shape(f"{op}_backward", (1, 1), case), CPU)()
    assert [g.shape for g in gradients] == [x.shape for x in case.inputs(CPU).values()]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["tune", "--op", "attention"])
    assert result.exit_code == 2
    assert "hici tune needs an NVIDIA or AMD GPU" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], "--op must be among attention"),
        (["--head-dim", "100"], "--head-dim must be among 64"),
        (["--segment-len", "1k"], "--segment-len must be whole numbers"),
        (["--segment-len", "0"], "--segment-len must be at least 1"),
        (["--dtype", "float64"], "--dtype must be among bfloat16"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exit_code == 2 and message in result.stderr
