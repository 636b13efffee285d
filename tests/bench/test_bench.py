"""The benchmark frame: wrong results get no speed, counts are exact, files hold what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hici_kernels import HGAConfig
from hici_kernels._dispatch import OPS, ORDER
from hici_kernels.bench import attention as attention_cases
from hici_kernels.bench import command, global_stats, hga_attention, hga_route, machine, memory, merge_attention, report
from hici_kernels.bench.case import Case, with_gradients
from hici_kernels.bench.run import PLAIN, alternate, measure
from hici_kernels.bench.shapes import SUITES, TINY

CEILINGS = {"matmul_flops": {str(torch.float32): 1e11, str(torch.bfloat16): 1e11}, "copy_bytes_per_s": 1e10}


def tiny() -> Case:
    return merge_attention.make(TINY, 2, 1, 8, torch.float32)


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_result_gets_no_speed(backward: bool) -> None:
    right = tiny()
    wrong = dataclasses.replace(right, call=lambda x, impl: tuple(1.01 * y for y in right.call(x, impl)))
    row = measure(wrong, ["reference"], 7, CEILINGS, backward=backward)
    side = row["sides"]["reference"]
    assert side["correct"] is False and "median_s" not in side
    assert "median_s" in row["sides"][PLAIN]
    assert report.failures([row]) and not report.failures(
        [measure(right, ["reference"], 7, CEILINGS, backward=backward)]
    )


def test_a_wrong_gradient_is_found() -> None:
    right = tiny()

    def call(x: dict, impl: str | None) -> tuple:
        out, lse = right.call(x, impl)
        return out, lse.detach()

    row = measure(dataclasses.replace(right, call=call), ["reference"], 7, CEILINGS, backward=True)
    assert row["sides"]["reference"]["correct"] is False


def test_a_wrong_result_ends_with_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = tiny()
    wrong = dataclasses.replace(right, call=lambda x, impl: tuple(y + 1 for y in right.call(x, impl)))
    monkeypatch.setattr(command, "load", lambda op, suite: [wrong])
    code = command.run(
        ops="merge_attention",
        impls=None,
        dtype=None,
        suite="quick",
        threads=None,
        rounds=7,
        json_path=None,
        chart_path=None,
    )
    assert code == 1 and "WRONG RESULT" in capsys.readouterr().out


def test_a_named_implementation_that_is_missing_is_reported_not_replaced() -> None:
    row = measure(tiny(), ["triton"], 7, CEILINGS, backward=False)
    assert "cannot serve merge_attention" in row["sides"]["triton"]["error"]
    assert "median_s" not in row["sides"]["triton"] and "reference" not in row["sides"]


@pytest.mark.parametrize("op", OPS)
def test_every_case_is_right_at_once_in_the_quick_suite(op: str) -> None:
    for case in command.load(op, "quick"):
        assert case.op == op and case.flops > 0 and case.bytes > 0
        inputs = case.rounded()
        oracle = (case.oracle or case.plain)(case.wide(inputs))
        for o, f in zip(oracle, case.call(inputs, None), strict=True):
            torch.testing.assert_close(f.double(), o, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("suite", SUITES)
def test_suites_name_every_operation(suite: str) -> None:
    assert all(command.load(op, suite) for op in OPS)


@pytest.mark.parametrize(("s", "segment_len", "slots"), [(10, 4, 3), (16, 16, 0), (7, 100, 2), (9, 1, 5)])
def test_pairs_of_attention(s: int, segment_len: int, slots: int) -> None:
    counted = sum(slots + sum(j // segment_len == t // segment_len for j in range(t + 1)) for t in range(s))
    assert attention_cases.pairs(s, segment_len, slots) == counted


@pytest.mark.parametrize("s", [5, 64, 200])
def test_pairs_and_scores_of_hga(s: int) -> None:
    config = HGAConfig(chunk_size=16, group_size=4, keep_first=1, keep_last=2, topk_chunks=2, topk_groups=5)
    case = hga_attention.make(TINY, 1, s, config, torch.float32)
    seen = case.inputs()["seen"]
    assert int(seen[0, 0].sum()) == hga_attention.pairs(s, config)
    n = [p // 16 for p in range(s)]
    pools = [max(0, x - 1 - 2) for x in n]
    assert hga_route.scored(s, config) == sum(x + min(2, x) * 4 for x in pools)


def test_bytes_of_statistics() -> None:
    case = global_stats.make("x", 2, 3, 4, 8, torch.bfloat16, False)
    x = case.rounded()
    assert case.bytes == x["local"].nbytes + case.call(x, "reference")[0].nbytes


def test_gradients_are_those_of_the_weighted_sum() -> None:
    outs = with_gradients({"x": torch.tensor([3.0, 4.0])}, ("x",), lambda i: (i["x"] ** 2,))
    noise = torch.randn(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(outs[1].double(), 2 * torch.tensor([3.0, 4.0]).double() * noise, rtol=1e-6, atol=0)


def test_sides_alternate() -> None:
    order: list[str] = []
    slow = {
        name: (lambda name=name: (order.append(name), torch.randn(256, 256) @ torch.randn(256, 256))) for name in "ab"
    }
    times = alternate(slow, 7)
    assert all(len(t) == 7 and min(t) > 0 for t in times.values())
    tail = [n for i, n in enumerate(order) if i == 0 or order[i - 1] != n]
    assert tail[-6:] == ["a", "b"] * 3


def test_peak_memory_counts_what_a_call_allocates() -> None:
    peak = memory.peak_bytes(lambda: torch.empty(1 << 20, dtype=torch.uint8).float().sum())
    assert peak is None or 5 << 20 <= peak <= 6 << 20


def test_ceilings_are_measured() -> None:
    found = machine.ceilings([torch.float32])
    assert found["matmul_flops"]["torch.float32"] > 1e8 and found["copy_bytes_per_s"] > 1e7


def test_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code = command.run(
        ops="merge_attention",
        impls="reference",
        dtype="float32",
        suite="quick",
        threads=1,
        rounds=7,
        json_path=tmp_path / "a" / "b.json",
        chart_path=tmp_path / "a" / "b.png",
    )
    assert code == 0
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    found = json.loads((tmp_path / "a" / "b.json").read_text())
    assert set(found) == {"machine", "ceilings", "rounds", "suite", "cases"}
    assert {"cpu", "torch", "threads", "load_average", "revision"} <= set(found["machine"])
    row = found["cases"][0]
    assert {"op", "case", "shape", "dtype", "direction", "flops", "bytes", "sides"} <= set(row)
    for name in ("reference", PLAIN):
        side = row["sides"][name]
        assert side["fastest_s"] <= side["median_s"] <= side["slowest_s"]
        assert side["roofline_share"] > 0 and side["speedup_over_plain"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": "attentoin"}, "--op must be among .*attention"),
        ({"impls": "cpu,fast"}, "--impl must be among .*reference"),
        ({"dtype": "int8"}, "--dtype must be among"),
        ({"suite": "huge"}, "--suite must be among quick, cpu, gpu"),
        ({"rounds": 3}, "--rounds must be at least 7"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"ops": "hga_route", "dtype": "float16"}, "--dtype float16 has no case"),
    ],
)
def test_unknown_names(change: dict, message: str) -> None:
    given = {"ops": None, "impls": None, "dtype": None, "suite": "quick", "threads": None, "rounds": 7}
    with pytest.raises(ValueError, match=message):
        command.run(**{**given, **change}, json_path=None, chart_path=None)


def test_names_of_implementations_are_those_of_the_dispatch() -> None:
    assert ORDER[-1] == "reference"
