"""The GPU suite, run on the CPU with a clock of the host: everything of it but the numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hici_kernels.bench import (
    gpu_attention,
    gpu_cases,
    gpu_check,
    gpu_checks,
    gpu_hga_cases,
    gpu_run,
    gpu_store_case,
    gpu_timing,
)
from hici_kernels.bench.case import Inputs, Outputs
from hici_kernels.bench.gpu_case import Baseline, GpuCase
from hici_kernels.bench.gpu_dense import dense_attention
from hici_kernels.bench.shapes import Layer
from hici_kernels.cli.main import app
from hici_kernels.testing import budget, error

CPU = torch.device("cpu")
TINY = Layer("tiny", 64, 4, 2, 16)
REFERENCE = "reference's sequence"


def tiny_cases(dtype: torch.dtype = torch.float32) -> list[GpuCase]:
    """The kinds of cases of the suite, small; of the baselines those a CPU has."""
    attention = gpu_cases.attention_case(TINY, 64, 16, dtype, "tiny")
    attention = dataclasses.replace(attention, baselines={REFERENCE: attention.baselines[REFERENCE]})
    return [
        attention,
        gpu_cases.slots_case(TINY, 64, 16, dtype, width=32, heads=4),
        gpu_cases.stats_case("tiny", 4, dtype, False, h=32),
        gpu_cases.stats_case("tiny", 4, dtype, True, h=32),
        gpu_hga_cases.summaries_case(200, dtype, 16),
        gpu_hga_cases.route_case(20, 3, dtype, 16),
        gpu_hga_cases.routed_case(128, 128, dtype, 16),
        gpu_hga_cases.decode_case(1280, dtype, 16),
        gpu_hga_cases.gather_case(64, 20, dtype),
        gpu_store_case.store_case(1283, 20, dtype, 16, 2),
    ]


def measure_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: list[GpuCase]) -> tuple[int, dict]:
    few = {c.op: c for c in reversed(list(gpu_checks.checks(CPU, ("global_stats",))))}
    monkeypatch.setattr(gpu_run, "checks", lambda device, ops: [few["global_stats"]])
    code = gpu_run.measure_all(
        device=CPU,
        clock=gpu_timing.HostClock(),
        plan=plan,
        impls=["reference"],
        rounds=3,
        json_path=tmp_path / "a" / "gpu.json",
        chart_path=tmp_path / "b" / "gpu.png",
        limits=lambda device, clock, dtypes: gpu_timing.ceilings(device, clock, dtypes, 64, 1 << 20),
    )
    return code, json.loads((tmp_path / "a" / "gpu.json").read_text())


def test_without_a_gpu_the_suite_says_so_and_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "--suite", "gpu"])
    assert result.exit_code == 2
    assert "needs an NVIDIA or AMD GPU" in result.stderr and "nothing was measured" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = measure_tiny(tmp_path, monkeypatch, tiny_cases())
    assert code == 0
    assert (tmp_path / "b" / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert [r["correct"] for r in report["checks"]] == [True]
    published = {op for op in gpu_checks.OPS if not op.startswith(("hga", "gather"))}
    both = published | {"hga_attention"}
    expected = {(op, "forward") for op in gpu_checks.OPS} | {(op, "backward") for op in both}
    assert {(r["op"], r["direction"]) for r in report["cases"]} == expected
    for row in report["cases"]:
        for name in ("reference", REFERENCE) if row["op"] in published else ("reference",):
            side = row["sides"][name]
            assert side["median_s"] > 0 and side["same_work"]
            assert side["flops_per_s"] == pytest.approx(row["flops"] / side["median_s"])
            matmul = report["ceilings"]["matmul_flops"]["torch.float32"]
            assert side["matmul_share"] == pytest.approx(side["flops_per_s"] / matmul)
            copy = report["ceilings"]["copy_bytes_per_s"]
            assert side["copy_share"] == pytest.approx(row["bytes"] / side["median_s"] / copy)
        assert row["op"] not in published or row["sides"]["reference"]["correct"] is True
        assert row["op"] != "hga_attention" or "median_s" in row["sides"]["sdpa, every token"]
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed and "WRONG" not in printed


def test_a_wrong_result_gets_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tiny_cases()[2]

    def call(x: Inputs, impl: str) -> Outputs:
        return tuple(1.01 * y for y in right.call(x, impl))

    code, report = measure_tiny(tmp_path, monkeypatch, [dataclasses.replace(right, call=call)])
    assert code == 1
    for row in report["cases"]:
        assert row["sides"]["reference"]["correct"] is False and "median_s" not in row["sides"]["reference"]
        assert "median_s" in row["sides"][REFERENCE]


def test_an_implementation_that_failed_a_check_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [
        {"op": "global_stats", "impl": "reference", "case": "x", "dtype": "float32", "correct": False, "error": "x"}
    ]
    monkeypatch.setattr(gpu_run, "run_check", lambda problem, impls: wrong)
    code, report = measure_tiny(tmp_path, monkeypatch, tiny_cases()[2:3])
    assert code == 1
    assert all("reference" not in row["sides"] for row in report["cases"])


def test_a_baseline_that_cannot_run_is_a_line_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Inputs, options: dict[str, Any]) -> Any:
        raise RuntimeError("No available kernel")

    case = tiny_cases()[2]
    case = dataclasses.replace(case, baselines={"x": Baseline(broken, 1), **case.baselines})
    code, report = measure_tiny(tmp_path, monkeypatch, [case])
    assert code == 0
    assert all("No available kernel" in row["sides"]["x"]["error"] for row in report["cases"])


def test_a_backward_that_cannot_run_is_a_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 1 * x

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no backward here")

    def prepare(x: Inputs, options: dict[str, Any]) -> Any:
        leaf = x["local"].detach().requires_grad_()
        return lambda: (Once.apply(leaf).sum(),), [leaf]

    case = tiny_cases()[2]
    case = dataclasses.replace(case, baselines={"x": Baseline(prepare, 1, False), **case.baselines})
    code, report = measure_tiny(tmp_path, monkeypatch, [case])
    assert code == 0
    for row in report["cases"]:
        other = row["sides"]["x"]
        assert ("median_s" in other) if row["direction"] == "forward" else ("no backward here" in other["error"])
        assert "median_s" in row["sides"][REFERENCE]


def test_compiled_baselines_keep_their_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that is timed many times runs on the thread whose compiler settings allow that."""
    import torch._functorch.config as compiled

    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 1 * x

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            seen.append((compiled.donated_buffer, torch.autograd.is_multithreading_enabled()))
            return grads[0]

    def prepare(x: Inputs, options: dict[str, Any]) -> Any:
        leaf = x["local"].detach().requires_grad_()
        return lambda: (Spy.apply(leaf),), [leaf]

    case = tiny_cases()[2]
    case = dataclasses.replace(case, baselines={"x": Baseline(prepare, 1, False)})
    measure_tiny(tmp_path, monkeypatch, [case])
    assert len(seen) > 3 and set(seen) == {(False, False)}


def test_without_an_implementation_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = dict.fromkeys(gpu_run._dispatch.ORDER, "it is not here") | {"reference": None, "cpu": None}
    monkeypatch.setattr(gpu_run._dispatch, "explain", lambda op: reasons)
    monkeypatch.setattr(gpu_run._dispatch, "load", lambda op, name: (None, reasons[name]))
    for impls in (None, ["triton"]):
        with pytest.raises(ValueError, match="no implementation of global_stats to measure: triton: it is not here"):
            gpu_run.require_implementations(["global_stats"], impls)
    gpu_run.require_implementations(["global_stats"], ["reference"])


def test_a_kernel_that_does_not_compile_is_wrong_and_the_others_are_checked() -> None:
    problem = next(iter(gpu_checks.checks(CPU, ("global_stats",))))

    def call(x: Inputs, impl: str) -> Outputs:
        if impl == "triton":
            raise KeyError("out of resources")
        return problem.call(x, impl)

    broken, right = gpu_checks.run_check(dataclasses.replace(problem, call=call), ["triton", "reference"])
    assert broken["correct"] is False and "out of resources" in broken["error"]
    assert right["correct"] is True


def test_every_problem_of_the_checks_catches_a_wrong_result() -> None:
    problem = next(iter(gpu_checks.checks(CPU, ("global_stats",))))
    assert gpu_checks.run_check(problem, ["reference"])[0]["correct"] is True
    wrong = dataclasses.replace(problem, call=lambda x, impl: tuple(1.05 * y for y in problem.call(x, impl)))
    assert gpu_checks.run_check(wrong, ["reference"])[0]["correct"] is False

    def detached(x: Inputs, impl: str) -> Outputs:
        return tuple(y.detach() + 0 * x["local"].sum() for y in problem.call(x, impl))

    assert gpu_checks.run_check(dataclasses.replace(problem, call=detached), ["reference"])[0]["correct"] is False


@pytest.mark.parametrize(
    ("factors", "correct", "draws"),
    [
        ([0.5], True, 1),
        ([3, 0.5, 0.5, 0.5, 0.5], True, 5),  # an unlucky first draw
        ([3, 3, 3, 0.5, 0.5], False, 5),
        ([3, 0.5, 0.5, 0.5, 11], False, 5),
        ([11], False, 1),
        ([float("nan")], False, 1),
    ],
)
def test_an_error_above_the_budget_is_wrong_unless_it_is_unusual(factors, correct, draws) -> None:
    """Each draw's first output is off by a multiple of its budget."""
    problem = next(iter(gpu_checks.checks(CPU, ("global_stats",))))
    calls = iter(factors)

    def call(x: Inputs, impl: str) -> Outputs:
        (plain,), wide = problem.truth(x), {k: v.detach().double() for k, v in x.items()}
        (exact,) = problem.truth(wide)
        found = exact + next(calls) * budget(exact, plain.detach(), problem.dtype)
        # float64, so that rounding does not change the multiple
        return (plain.double() - plain.detach().double() + found,)

    (record,) = gpu_checks.run_check(dataclasses.replace(problem, call=call), ["reference"])
    assert record["correct"] is correct and record["draws"] == draws
    assert next(calls, None) is None


def small_attention_problems() -> list[gpu_check.Check]:
    skipped = ("segments of 4096", "D 64", "D 80", "D 96", "D 256")
    return [c for c in gpu_checks.checks(CPU, ("attention",)) if c.name not in skipped and c.dtype == torch.float32]


@pytest.mark.parametrize("problem", small_attention_problems(), ids=lambda c: c.name)
def test_the_dense_truth_agrees_with_the_reference(problem: gpu_checks.Check) -> None:
    """Two computations that share nothing but the cut into segments."""
    wide = {k: v.double() for k, v in problem.draw(0).items()}
    for expected, found in zip(problem.truth(wide), problem.call(wide, "reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("label", [n for n, (_, same) in gpu_attention.BASELINES.items() if same and "flash" not in n])
def test_baselines_of_attention_do_the_same_work(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cuDNN" in label:  # the same preparation with the backend a CPU has
        math = torch.nn.attention.SDPBackend.MATH
        prepare = lambda x, options: gpu_attention.sdpa_assembled(math, x, options)  # noqa: E731
    else:
        prepare = gpu_attention.BASELINES[label][0]
    differentiable = "Flex" not in label  # not on a CPU
    if not differentiable:  # the formula itself, uncompiled
        monkeypatch.setattr(torch, "compile", lambda f, **options: f)
        monkeypatch.setattr(gpu_attention, "_leaf", torch.clone)
    case = gpu_cases.attention_case(TINY, 64, 16, torch.float32, "tiny")
    x = case.inputs(CPU)
    expected = dense_attention({k: v.double() for k, v in x.items()}, case.options)[0]
    call, leaves = prepare(x, case.options)
    (found,) = call()
    assert error(expected, found.detach()) <= 10 * budget(expected, expected, torch.float32)
    assert not differentiable or all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), leaves))


def test_baselines_without_slots_attend_within_segments() -> None:
    case = gpu_cases.attention_case(TINY, 64, 16, torch.float32, "tiny")
    x = case.inputs(CPU)
    call, _ = gpu_attention.sdpa_without_slots(torch.nn.attention.SDPBackend.MATH, x, case.options)
    tokens = {k: x[k].double() for k in "qkv"}
    expected = dense_attention(tokens, case.options)[0].view(4, 16, 4, 16).transpose(1, 2)
    torch.testing.assert_close(call()[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_suite_holds_the_shapes_it_promises() -> None:
    found = gpu_cases.cases()
    assert {c.op for c in found} == set(gpu_checks.OPS)
    shapes = [c.shape for c in found if c.op == "attention"]
    for tokens, length in ((16384, 4096), (32768, 8192), (49152, 12288), *((16384, n) for n in gpu_cases.SEGMENTS)):
        assert any(f" {tokens} tokens, segments of {length}," in s for s in shapes)
    assert [c.op for c in gpu_cases.cases(["local_slots"])] == ["local_slots"] * 3
    routed = [c.shape for c in found if c.op == "hga_attention"]
    for what in ("1 query, 65536 tokens", "1 query, 1048576 tokens", "32768 queries, 32768 tokens"):
        assert any(s.startswith(what) for s in routed)


def test_bytes_and_flops_are_those_of_the_tensors() -> None:
    case = gpu_cases.attention_case(TINY, 64, 16, torch.bfloat16, "tiny")
    x = case.inputs(CPU)
    assert case.forward.bytes == sum(t.nbytes for t in x.values()) + x["q"].nbytes
    assert case.backward.bytes == 2 * sum(t.nbytes for t in x.values()) + 2 * x["q"].nbytes
    visible = sum(12 + j + 1 for j in range(16)) * 4 * 4
    assert case.forward.flops == 4 * 16 * visible
    slots = gpu_cases.slots_case(TINY, 64, 16, torch.bfloat16, width=32, heads=4)
    x = slots.inputs(CPU)
    out = slots.call(x, "reference")[0]
    assert slots.forward.bytes == sum(t.nbytes for t in x.values()) + out.nbytes
    assert slots.backward.bytes == 2 * sum(t.nbytes for t in x.values()) + out.nbytes


def test_bytes_of_routed_attention_are_those_of_what_is_seen() -> None:
    case = gpu_hga_cases.decode_case(1 << 16, torch.bfloat16)
    windows, opened = 11 * 64, 32 * 16
    tables = 1024 * 8 * 128 + 16 * 4 * 32 * 128  # chunk keys once, groups of the chunks that a head picks
    assert case.forward.bytes == 2 * (2 * 128 * (windows * 8 + opened * 32) + tables)
    assert case.forward.flops == 4 * 128 * 32 * (windows + opened) + 2 * 128 * 32 * (1024 + 64)


@pytest.mark.parametrize("name", ["small chunks", "odd"])
def test_problems_of_hga_catch_what_is_slightly_off(name: str) -> None:
    """Another summary, another group, another sum."""
    found = [c for c in gpu_checks.checks(CPU, gpu_checks.OPS[3:]) if c.name == name and c.dtype == torch.bfloat16]
    assert found
    for problem in found:
        assert gpu_checks.run_check(problem, ["reference"])[0]["correct"] is True

        def call(x: Inputs, impl: str, problem: gpu_check.Check = problem) -> Outputs:
            first, *rest = problem.call(x, impl)
            return (first.roll(1, -1) if problem.op == "hga_route" else 1.05 * first, *rest)

        assert gpu_checks.run_check(dataclasses.replace(problem, call=call), ["reference"])[0]["correct"] is False


def test_routes_of_the_problems_are_exact_in_every_dtype() -> None:
    """What end-to-end comparison rests on: no rounding of means or scores decides a route."""
    for problem in gpu_checks.checks(CPU, ("hga_route",)):
        if problem.name == "small chunks":
            x = problem.draw(0)
            for wide, low in zip(problem.truth(x), problem.truth({k: v.bfloat16() for k, v in x.items()}), strict=True):
                assert torch.equal(wide, low.double())


def test_arguments_are_those_of_the_implementations() -> None:
    from hici_kernels import _dispatch

    for case in tiny_cases():
        if case.arguments is None:  # two operations
            continue
        module, _ = _dispatch.load(case.op, "reference")
        x = case.inputs(CPU)
        found = module.forward(*case.arguments(x))
        found = found[0] if isinstance(found, tuple) else found
        assert torch.equal(found, case.call(x, "reference")[0])


def test_sides_alternate() -> None:
    order: list[str] = []
    times = gpu_timing.alternate({n: (lambda n=n: order.append(n)) for n in "ab"}, gpu_timing.HostClock(), 3)
    assert order[:6] == list("aaabbb")  # warmed up, and the host's time taken, for which the device will wait
    assert order[6:] == list("aabb" * 3)  # once for the device's time, once for the host's
    assert set(times["a"]) == {"median_s", "fastest_s", "slowest_s", "host_s", "head_start_s"}


def test_the_device_waits_for_a_host_that_is_slow() -> None:
    waited: list[float] = []

    class Clock(gpu_timing.HostClock):
        def host_seconds(self, call: object) -> float:
            return 1e-2

        def seconds(self, call: object, ahead: float = gpu_timing.HEAD_START) -> float:
            waited.append(ahead)
            return 1.0

    found = gpu_timing.alternate({"a": lambda: None}, Clock(), 2)["a"]
    assert waited == [2e-2, 2e-2] and found["head_start_s"] == 2e-2


CASES = {c.op + c.name: c for c in tiny_cases()[:-1]}  # a store goes on from call to call


@pytest.mark.parametrize("name", CASES)
def test_every_case_of_the_suite_is_compared_where_it_is_timed(name: str) -> None:
    """An implementation that returns zeros is right nowhere."""
    case, limits = CASES[name], {"matmul_flops": {str(torch.float32): 1e9}, "copy_bytes_per_s": 1e9}
    right = case.call

    def zeros(x: Inputs, impl: str) -> Outputs:
        outs = right(x, "reference")
        return tuple(torch.zeros_like(y) for y in outs) if impl == "zeros" else outs

    tried = dataclasses.replace(case, call=zeros)
    row = gpu_run.measure(tried, "forward", ["zeros", "reference"], CPU, gpu_timing.HostClock(), 2, limits)
    assert row["sides"]["zeros"]["correct"] is False and "median_s" not in row["sides"]["zeros"]
    assert row["sides"]["reference"]["correct"] is True and row["sides"]["reference"]["rows_alike"] == 1
    assert row["sides"]["reference"]["median_s"] > 0


def test_a_case_without_its_truth_says_what_was_checked() -> None:
    case = dataclasses.replace(tiny_cases()[2], truth="nobody")
    limits = {"matmul_flops": {str(torch.float32): 1e9}, "copy_bytes_per_s": 1e9}
    row = gpu_run.measure(case, "forward", ["reference"], CPU, gpu_timing.HostClock(), 2, limits)
    side = row["sides"]["reference"]
    assert side["correct"] is None and side["checked"] == "small problems only" and side["median_s"] > 0


def test_inputs_that_do_not_fit_are_a_row_of_the_table() -> None:
    def inputs(device: torch.device) -> Inputs:
        raise MemoryError("too large")

    case = dataclasses.replace(tiny_cases()[2], inputs=inputs)
    row = gpu_run.measure(case, "forward", ["reference"], CPU, gpu_timing.HostClock(), 2, {})
    assert row["sides"] == {"reference": {"error": "MemoryError: too large"}}


def test_bytes_of_routed_cases_are_read_once() -> None:
    c, d, size = gpu_hga_cases.HGAConfig(), 128, 2
    case = gpu_hga_cases.route_case(512, 4096, torch.bfloat16)
    keys = 512 * 8 * d * (1 + c.groups_per_chunk)
    assert case.forward.bytes == size * (keys + 4096 * 32 * d) + 4 * 4096 * 32 * c.topk_groups
    one = gpu_hga_cases.route_case(16384, 1, torch.bfloat16)
    assert one.forward.bytes < size * (16384 * 8 * d + 32 * d * (1 + c.topk_chunks * c.groups_per_chunk)) + (1 << 16)
    routed = gpu_hga_cases.routed_case(32768, 32768, torch.bfloat16)
    assert routed.forward.bytes == size * 2 * d * (8 + 32) * 32768


def test_folder_names() -> None:
    assert gpu_run.slug("NVIDIA H200") == "nvidia-h200"
    assert gpu_run.slug("AMD Instinct MI300X (OAM)") == "amd-instinct-mi300x-oam"
