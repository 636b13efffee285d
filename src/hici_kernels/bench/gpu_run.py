"""``hici bench --suite gpu``: check everything, then measure what was right, then write it down."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import _dispatch, _outputs
from . import gpu_report, machine
from .gpu_case import GpuCase
from .gpu_cases import cases
from .gpu_checks import OPS, checks, implementations, run_check
from .gpu_timing import Clock, DeviceClock, alternate, ceilings

ROUNDS = 21
DIRECTIONS = ("forward", "backward")


def run(
    *,
    ops: list[str] | None,
    impls: list[str] | None,
    dtype: torch.dtype | None,
    rounds: int,
    json_path: Path | None,
    chart_path: Path | None,
) -> int:
    """0, or 1 if any result was wrong (it then has no speed).

    Raises:
        ValueError: no GPU, nothing to check and measure on it, or an operation that is not measured on one.
    """
    device = require_gpu("--suite gpu")
    foreign = [op for op in ops or () if op not in OPS]
    if foreign:
        raise ValueError(f"--suite gpu measures {', '.join(OPS)}, not {', '.join(foreign)}")
    require_implementations(ops or list(OPS), impls)
    folder = Path("benchmarks") / "results" / slug(torch.cuda.get_device_name(device))
    return measure_all(
        device=device,
        clock=DeviceClock(device),
        plan=cases(ops, dtype or torch.bfloat16),
        impls=impls,
        rounds=max(rounds, ROUNDS),
        json_path=json_path or folder / "gpu.json",
        chart_path=chart_path or folder / "gpu.png",
    )


def require_gpu(what: str) -> torch.device:
    """The current GPU; ValueError saying what is missing."""
    if not torch.cuda.is_available():
        build = "this build of torch has no GPU support" if torch.version.cuda is None else "torch finds none"
        if torch.version.hip:
            build = "torch finds none"
        raise ValueError(
            f"{what} needs an NVIDIA or AMD GPU: {build} (torch {torch.__version__}); nothing was measured"
        )
    return torch.device("cuda", torch.cuda.current_device())


def require_implementations(ops: list[str], impls: list[str] | None) -> None:
    """ValueError where an operation has none of ``impls`` (None: any): the baselines alone are no result of ours."""
    for op in ops:
        known = _dispatch.explain(op)
        wanted = implementations(op, impls)
        if not any(known[name] is None for name in wanted):
            reasons = "; ".join(f"{n}: {known[n]}" for n in impls or ("triton", "flash_attn"))
            raise ValueError(f"--suite gpu has no implementation of {op} to measure: {reasons}")


def slug(name: str) -> str:
    """A folder name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measure_all(
    *,
    device: torch.device,
    clock: Clock,
    plan: list[GpuCase],
    impls: list[str] | None,
    rounds: int,
    json_path: Path,
    chart_path: Path,
    limits: Callable[..., dict[str, Any]] = ceilings,
) -> int:
    """The whole command on a given device with a given clock."""
    _outputs.prepare(json_path, chart_path)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    ops = tuple(dict.fromkeys(c.op for c in plan))
    sides = {op: implementations(op, impls) for op in ops}
    where = machine.describe() | {"device": gpu_report.device_name(device), "triton": gpu_report.triton_version()}
    gpu_report.show_machine(console, where)

    records = []
    for problem in _outputs.progress(list(checks(device, ops)), "checking"):
        records += run_check(problem, sides[problem.op])
    gpu_report.show_checks(console, records)
    wrong = {(r["op"], r["impl"]) for r in records if r["correct"] is False}

    found = limits(device, clock, sorted({c.dtype for c in plan}, key=str))
    gpu_report.show_ceilings(console, found)
    rows = []
    with repeatable_backward():
        # an operation without a backward of its own has no work there
        pairs = [(c, d) for c in plan for d in DIRECTIONS if c.work(d).bytes]
        for case, direction in _outputs.progress(pairs, "measuring"):
            right = [i for i in sides[case.op] if (case.op, i) not in wrong]
            rows.append(measure(case, direction, right, device, clock, rounds, found))
    gpu_report.show_rows(console, rows)

    result = {
        "machine": where,
        "ceilings": found,
        "rounds": rounds,
        "suite": "gpu",
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "checks": records,
        "cases": rows,
    }
    _outputs.write_json(json_path, result, indent=1)
    gpu_report.write_chart(rows, where, chart_path)
    console.print(f"written: {json_path}, {chart_path}", markup=False)
    lines = [f"{r['op']} {r['case']} {r['dtype']}: {r['impl']}" for r in records if r["correct"] is False]
    lines += [
        f"{r['op']} {r['case']} {r['direction']}: {name}"
        for r in rows
        for name, s in r["sides"].items()
        if s.get("correct") is False
    ]
    for line in lines:
        console.print(f"WRONG RESULT, no speed: {line}", markup=False)
    return 1 if lines else 0


@contextlib.contextmanager
def repeatable_backward() -> Iterator[None]:
    """A compiled baseline's backward may be called again and again, as all are timed.

    Compiled code otherwise gives the buffers of its forward pass away in its backward. The switch is one of the thread
    that asks for it, so backward passes must run on it too.
    """
    import torch._functorch.config as compiled

    with compiled.patch(donated_buffer=False), torch.autograd.set_multithreading_enabled(False):
        yield


def measure(
    case: GpuCase,
    direction: str,
    impls: list[str],
    device: torch.device,
    clock: Clock,
    rounds: int,
    limits: dict[str, Any],
) -> dict[str, Any]:
    """One row: every implementation that agrees with the others, and the baselines, timed in alternation."""
    work = case.work(direction)
    row = {
        "op": case.op,
        "case": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": direction,
        "flops": work.flops,
        "bytes": work.bytes,
    }
    try:
        inputs = case.inputs(device)
    except Exception as error:  # too large for this device, say
        return row | {"sides": {impl: failure(error) for impl in impls}}
    sides: dict[str, dict[str, Any]] = {}
    runnable: dict[str, Callable[[], object]] = {}
    outputs: dict[str, Tensor] = {}
    flops: dict[str, int] = {}

    def add(name: str, call: Callable[[], Any], leaves: list[Tensor], forward_flops: int, same: bool) -> None:
        try:
            with torch.set_grad_enabled(direction == "backward"):
                outs = call()
        except Exception as error:
            # a backend that does not serve this shape or this device is a line of the table, not the end of the run
            sides[name] = failure(error)
            return
        sides[name] = {"same_work": same}
        flops[name] = forward_flops if direction == "forward" else 5 * forward_flops // 2
        if same:
            outputs[name] = outs[0].detach()
        if direction == "forward":
            runnable[name] = torch.no_grad()(call)
            return
        weights = [torch.randn_like(o) for o in outs]
        gradient = functools.partial(torch.autograd.grad, outs, leaves, weights, retain_graph=True, allow_unused=True)
        try:
            gradient()
        except Exception as error:
            sides[name] = failure(error)
            return
        runnable[name] = gradient

    for impl in impls:
        leaves = {k: v.detach().requires_grad_(direction == "backward") for k, v in inputs.items()}
        add(impl, functools.partial(case.call, leaves, impl), list(leaves.values()), case.forward.flops, True)
    for name, baseline in case.baselines.items():
        try:
            call, given = baseline.prepare(inputs, case.options)
        except Exception as error:
            sides[name] = failure(error)
            continue
        add(name, call, given, baseline.forward_flops, baseline.same)
    if case.truth == "reference":
        with torch.no_grad(), contextlib.suppress(Exception):  # where it cannot be had, rows say so
            outputs.setdefault("reference", case.call(inputs, "reference")[0])
    disagreements(outputs, sides, impls, case)
    outputs.clear()
    for name in [n for n, s in sides.items() if s.get("correct") is False]:
        runnable.pop(name, None)

    if direction == "backward" and case.op not in ("attention", "hga_attention"):
        flops = dict.fromkeys(flops, work.flops)
    matmul, copy = limits["matmul_flops"][str(case.dtype)], limits["copy_bytes_per_s"]
    for name, times in alternate(runnable, clock, rounds).items():
        seconds = times["median_s"]
        sides[name] |= times | {
            "flops_per_s": flops[name] / seconds,
            "matmul_share": flops[name] / seconds / matmul,
            "bytes_per_s": work.bytes / seconds,
            "copy_share": work.bytes / seconds / copy,
        }
    return row | {"sides": sides}


def failure(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}


def disagreements(
    outputs: dict[str, Tensor], sides: dict[str, dict[str, Any]], impls: list[str], case: GpuCase
) -> None:
    """Mark implementations that differ, at this very shape, from the case's truth: the published operations, mostly.

    Both round to the dtype, and the published sequence rounds weights or sums too: 8 eps of the largest value; whole
    numbers are equal. Without a truth nothing is right or wrong, and the row says what was checked.
    """
    truth = outputs.get(case.truth)
    for name in (n for n in impls if n in outputs):
        if truth is None:
            sides[name] |= {"correct": None, "checked": "small problems only"}
            continue
        exact = not truth.is_floating_point()
        limit = 0.0 if exact else 8 * torch.finfo(case.dtype).eps * float(truth.abs().max())
        apart = (outputs[name].double() - truth.double()).abs()
        # a NaN is no agreement
        share = float((apart.amax(-1) <= limit).double().mean())
        found = {"difference": float(apart.max()), "allowed": limit, "rows_alike": share}
        sides[name] |= found | {"correct": share >= case.agreement}
