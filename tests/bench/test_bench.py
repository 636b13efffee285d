"""The benchmark frame: wrong results get no speed, counts are exact, files hold what was measured."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch

from hici_kernels import HGAConfig, _native, _outputs, attention
from hici_kernels._dispatch import OPS, ORDER
from hici_kernels.bench import attention as attention_cases
from hici_kernels.bench import (
    command,
    decode,
    global_stats,
    hga_attention,
    hga_route,
    machine,
    merge_attention,
    report,
    run,
)
from hici_kernels.bench.case import PLAIN, Baseline, Case, with_gradients
from hici_kernels.bench.run import alternate, measure
from hici_kernels.bench.shapes import SUITES, TINY, Layer

CEILINGS = {"matmul_flops": {str(torch.float32): 1e11, str(torch.bfloat16): 1e11}, "copy_bytes_per_s": 1e10}
EIGHT = Layer("eight heads", 64, 8, 4, 16)


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


def test_a_side_that_fails_is_wrong_and_the_others_are_timed() -> None:
    right = tiny()

    def call(x: dict, impl: str | None) -> tuple:
        if impl == "reference":
            raise RuntimeError("kernel launch failed")
        return right.call(x, impl)

    row = measure(dataclasses.replace(right, call=call), ["reference"], 7, CEILINGS, backward=False)
    assert row["sides"]["reference"] == {"error": "RuntimeError: kernel launch failed", "correct": False}
    assert report.failures([row]) and row["sides"][PLAIN]["median_s"] > 0


@pytest.mark.parametrize("op", ["merge_attention", "decode"])
def test_a_named_implementation_that_serves_nothing_ends_with_code_2(op: str, capsys: pytest.CaptureFixture) -> None:
    options = {"dtype": None, "suite": "quick", "threads": None, "rounds": 7, "json_path": None, "chart_path": None}
    assert command.run(ops=op, impls="cuda", **options) == 2
    assert "NOTHING MEASURED: --impl cuda" in capsys.readouterr().out


def test_files_are_whole_and_valid(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    _outputs.write_json(path, {"a": [float("nan"), 1.5], "b": (float("inf"), None), 3: "x"})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"a": [None, 1.5], "b": [None, None], "3": "x"}
    with pytest.raises(TypeError):
        _outputs.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["3"] == "x" and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_the_revision_is_of_this_package_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    installed = tmp_path / "venv" / "site-packages" / "hici_kernels" / "bench" / "machine.py"
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert machine._revision() is None


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
    hga = {op for op in OPS if op.startswith("hga")}
    assert {op for op in OPS if not command.load(op, suite)} == (hga if suite == "cpu" else set())


def test_suite_cpu_is_what_the_kernels_are_judged_by() -> None:
    cases = {op: command.load(op, "cpu") for op in (*OPS, "hici_layer")}
    both = {torch.float32, torch.bfloat16}
    assert {c.dtype for c in cases["attention"]} == both
    for case in cases["attention"]:
        assert case.shape.startswith("batch 1, 16384 tokens, segments of 4096, 32/8 heads, D 128, 4 global and 8 local")
        assert case.against == attention_cases.EXPANDED and case.baselines[case.against].backward
        assert case.exps == 32 * 4 * (4096 * 4097 // 2 + 4096 * 12) and case.flops == 4 * 128 * case.exps
    assert {(c.name, c.dtype) for c in cases["local_slots"]} == {(n, d) for n in ("H 4096", "H 512") for d in both}
    assert all(
        "4096 tokens, segments of 4096" in c.shape and "E 512, 8 heads, M 8" in c.shape for c in cases["local_slots"]
    )
    large = [c for c in cases["global_stats"] if c.name == "256 MiB"]
    assert {c.dtype for c in large} == both
    assert all(c.bytes - 5 * 4096 * c.dtype.itemsize == 1 << 28 for c in large)
    assert [c.name for c in cases["hici_layer"]] == ["Llama-2-7B layer, core", "Llama-2-7B layer, with projections"]
    sizes = {(p.queries, p.cached) for p in decode.points("cpu") if p.slots}
    assert {1, 64} <= {s for s, _ in sizes} and {0, 65536} <= {c for _, c in sizes}


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
    upstream = (torch.tensor([0.5, -2.0]),)
    outs = with_gradients({"x": torch.tensor([3.0, 4.0])}, ("x",), lambda i: (i["x"] ** 2,), upstream)
    assert torch.equal(outs[0], torch.tensor([9.0, 16.0])) and torch.equal(outs[1], torch.tensor([3.0, -16.0]))


def judged(dtype: torch.dtype = torch.float32) -> Case:
    return attention_cases.make(EIGHT, 1, 64, 16, dtype, judged=True)


def test_a_part_is_that_part_of_the_whole() -> None:
    case = judged()
    part, x = case.part, case.wide(case.rounded())
    assert part is not None and part.outputs is not None
    upstream = (torch.randn(1, 64, 8, 16, dtype=torch.float64),)
    whole = with_gradients(x, case.differentiable, case.plain, upstream)
    alone = with_gradients(part.inputs(x), case.differentiable, case.plain, part.outputs(upstream))
    gradients = part.inputs(dict(zip(case.differentiable, whole[1:], strict=True)))
    assert alone[0].shape[2] == 4 and alone[2].shape[2] == 2  # 2 of 4 kv heads
    for found, expected in zip(alone, (*part.outputs(whole[:1]), *gradients.values()), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("head", [0, 7])
def test_a_wrong_head_of_the_timed_call_gets_no_speed(backward: bool, head: int) -> None:
    right = judged()

    def call(x: dict, impl: str | None) -> tuple:
        (out,) = right.call(x, impl)
        factor = torch.ones(8, 1)
        factor[head] = 1.001
        return (out * factor,)

    row = measure(dataclasses.replace(right, call=call), ["reference"], 7, CEILINGS, backward=backward)
    assert row["sides"]["reference"]["correct"] is False and "median_s" not in row["sides"]["reference"]
    assert PLAIN not in row["sides"] and "kv heads 0, 3 of 4" in row["checked"]


@pytest.mark.parametrize("name", [attention_cases.EXPANDED, attention_cases.GROUPED])
def test_sdpa_at_its_best_attends_the_tokens(name: str) -> None:
    case = judged()
    x = case.wide(case.rounded())
    baseline = case.baselines[name]
    prepared = baseline.prepare(x)
    assert all(t.is_contiguous() and t.shape[0] == 4 for t in prepared.values())
    assert prepared["k"].shape[1] == (8 if name == attention_cases.EXPANDED else 4)
    expected = attention(x["q"], x["k"], x["v"], segment_len=16, impl="reference")
    found = baseline.call(prepared)[0].transpose(1, 2).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_speedups_are_over_the_named_side() -> None:
    right = dataclasses.replace(judged(), call=lambda x, impl: judged().plain(x))
    row = measure(right, ["reference"], 7, CEILINGS, backward=True)
    assert set(row["sides"]) == {"reference", attention_cases.EXPANDED}  # the other one is timed forward only
    ours, best = (row["sides"][n] for n in ("reference", attention_cases.EXPANDED))
    assert ours["speedup"] == pytest.approx(best["median_s"] / ours["median_s"]) and best["speedup"] == 1.0
    # 21 where the first call took less than 10 ms
    assert ours["rounds"] == best["rounds"] in (7, 21) and row["against"] == attention_cases.EXPANDED


def test_a_baseline_gets_its_gradients_too() -> None:
    seen: list[bool] = []

    def call(x: dict) -> tuple:
        seen.append(x["y"].requires_grad)
        return (x["y"] * 2,)

    extra = Baseline(call, lambda x: {"y": x["outs"]}, backward=True)
    row = measure(dataclasses.replace(tiny(), baselines={"double": extra}), ["reference"], 7, CEILINGS, backward=True)
    assert seen[-1] and row["sides"]["double"]["other_work"] and "speedup" in row["sides"]["double"]


def test_long_sides_beside_the_point_run_in_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LONG", 1e-9)
    times = alternate({"a": lambda: None, "b": lambda: None}, 7, {"b"})
    assert len(times["a"]) == 7 and len(times["b"]) == run.FEW == 3
    monkeypatch.setattr(run, "VERY_LONG", 1e-9)
    times = alternate({"a": lambda: None, "b": lambda: None}, 7, {"b"})
    assert len(times["a"]) == 7 and len(times["b"]) == 1


def test_a_side_that_was_called_before_is_not_warmed_again() -> None:
    called: list[str] = []
    sides = {name: (lambda name=name: called.append(name)) for name in "ab"}
    alternate(sides, 7, known={"a": 0.5})
    assert called[:2] == ["b", "b"] and called.count("a") == 7


def test_cold_calls_do_not_say_how_often_a_short_one_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def call() -> None:
        nonlocal now, calls
        calls += 1
        now += 2e-3 if calls <= 2 else 1e-5

    monkeypatch.setattr(run.time, "perf_counter", lambda: now)  # a busy machine would lengthen real calls
    (seconds,) = (sorted(t) for t in alternate({"a": call}, 3).values())
    assert calls > 3 * run.SHORTEST / 1e-5 and seconds == pytest.approx([1e-5] * 3)


def test_sides_alternate() -> None:
    order: list[str] = []
    slow = {
        name: (lambda name=name: (order.append(name), torch.randn(256, 256) @ torch.randn(256, 256))) for name in "ab"
    }
    times = alternate(slow, 7)
    assert all(len(t) == 7 and min(t) > 0 for t in times.values())
    tail = [n for i, n in enumerate(order) if i == 0 or order[i - 1] != n]
    assert tail[-6:] == ["a", "b"] * 3


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
    assert set(found) == {
        *("machine", "ceilings", "ceilings_after", "rounds", "suite", "path"),
        *("cases", "decode", "goals"),
    }
    assert {"cpu", "torch", "threads", "load_average", "revision"} <= set(found["machine"])
    row = found["cases"][0]
    assert {"op", "case", "shape", "dtype", "direction", "flops", "bytes", "sides"} <= set(row)
    for name in ("reference", PLAIN):
        side = row["sides"][name]
        assert side["fastest_s"] <= side["median_s"] <= side["slowest_s"]
        assert side["roofline_share"] > 0 and side["speedup"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": "attentoin"}, "--op must be among .*attention"),
        ({"impls": "cpu,fast"}, "--impl must be among .*reference"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"suite": "huge"}, "--suite must be one of 'quick', 'cpu', 'layers', 'hga', 'gpu'"),
        ({"rounds": 3}, "--rounds must be at least 7"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"suite": "gpu", "threads": 1}, "--path and --threads choose among processor kernels"),
        ({"path": "sse"}, "--path must be among those that this machine runs"),
        ({"ops": "hga_route", "dtype": "float16"}, "--suite quick has no case of --op hga_route with --dtype float16"),
        ({"ops": "hga_route", "suite": "cpu"}, "--suite cpu has no case of --op hga_route"),
    ],
)
def test_unknown_names(change: dict, message: str) -> None:
    given = {"ops": None, "impls": None, "dtype": None, "suite": "quick", "threads": None, "rounds": 7}
    with pytest.raises(ValueError, match=message):
        command.run(**{**given, **change}, json_path=None, chart_path=None)


@pytest.mark.skipif(not _native.paths(), reason="the native library is not usable here")
def test_a_path_is_forced_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    case = dataclasses.replace(tiny(), call=lambda x, impl: (seen.append(_native.execution()), tiny().call(x, impl))[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load", lambda op, suite: [case])
        code = command.run(
            ops="merge_attention",
            impls="reference",
            dtype=None,
            suite="quick",
            threads=1,
            rounds=7,
            json_path=tmp_path / "a.json",
            chart_path=None,
            path="base",
        )
    found = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and set(seen) == {(_native.paths()["base"], 1)}
    assert found["path"] == found["ceilings"]["path"] == "base" and found["machine"]["threads"] == 1
    assert "path base" in capsys.readouterr().out and _native.execution()[0] == _native.FASTEST


def test_names_of_implementations_are_those_of_the_dispatch() -> None:
    assert ORDER[-1] == "reference"
