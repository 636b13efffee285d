"""Correctness first, in the same run; then both sides alternating in one process."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import _dispatch
from ..errors import ImplError
from ..testing import budget, error
from .case import Case, Outputs, with_gradients
from .machine import spread
from .memory import peak_bytes

# A call shorter than this is repeated inside one timing, so that the clock's own step does not show.
SHORTEST = 2e-3
PLAIN = "plain PyTorch"


def measure(
    case: Case, impls: list[str] | None, rounds: int, ceilings: dict[str, Any], *, backward: bool
) -> dict[str, Any]:
    """One row of the report. A side that misses its error budget, or raises, gets its reason instead of a speed.

    backward: forward and backward together are timed, and gradients are checked too.
    """
    inputs = case.rounded()

    def whole(call: Callable[[Any], Outputs]) -> Callable[[Any], Outputs]:
        return (lambda x: with_gradients(x, case.differentiable, call)) if backward else call

    oracle = [x.double() for x in whole(case.oracle or case.plain)(case.wide(inputs))]
    plain = list(whole(case.plain)(inputs))
    sides: dict[str, dict[str, Any]] = {}
    runnable: dict[str, Callable[[], object]] = {PLAIN: lambda: whole(case.plain)(inputs)}
    for impl in impls if impls is not None else _dispatch.ORDER:
        module, reason = _dispatch.load(case.op, impl)
        if module is None:
            if impls is not None:
                sides[impl] = {"error": f"impl={impl!r} cannot serve {case.op}: {reason}", "correct": None}
            continue
        call = whole(_named(case, impl))
        try:
            checked = check(oracle, plain, list(call(inputs)), case.dtype)
        except ImplError as refused:
            sides[impl] = {"error": str(refused), "correct": None}
            continue
        sides[impl] = checked
        if checked["correct"]:
            runnable[impl] = functools.partial(call, inputs)
    sides[PLAIN] = {"correct": True, "error_max": max(error(o, p) for o, p in zip(oracle, plain, strict=True))}
    if not backward:
        for name, baseline in case.baselines.items():
            sides[name] = {"correct": None, "other_work": True}
            runnable[name] = functools.partial(baseline, inputs)
    flops = case.flops * (7 if backward else 2) // 2  # a backward pass costs 2.5 times its forward pass
    with torch.set_grad_enabled(backward):
        for name, times in alternate(runnable, rounds).items():
            sides[name] |= spread(times)
            if not sides[name].get("other_work"):
                sides[name] |= rates(sides[name]["median_s"], flops, case, ceilings, backward)
            sides[name]["peak_bytes"] = peak_bytes(runnable[name])
    for side in sides.values():
        if "median_s" in side:
            side["speedup_over_plain"] = sides[PLAIN]["median_s"] / side["median_s"]
    return {
        "op": case.op,
        "case": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": "forward+backward" if backward else "forward",
        "flops": flops,
        "bytes": case.bytes,
        "sides": sides,
    }


def _named(case: Case, impl: str) -> Callable[[Any], Outputs]:
    return lambda x: case.call(x, impl)


def check(oracle: list[Any], plain: list[Any], found: list[Any], dtype: torch.dtype) -> dict[str, Any]:
    """Largest error over all outputs, and whether each is within max(2 x plain's own error, 2 eps max|oracle|)."""
    worst, correct, allowed = 0.0, True, 0.0
    for o, p, f in zip(oracle, plain, found, strict=True):
        limit, e = budget(o, p, dtype), error(o, f)
        correct = correct and e <= limit
        if e >= worst:
            worst, allowed = e, limit
    return {"correct": correct, "error_max": worst, "error_allowed": allowed}


def alternate(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call: every round runs every side once, so that drift of the machine hits all alike."""
    repeats = {}
    for name, call in sides.items():
        call()
        began = time.perf_counter()
        call()
        repeats[name] = max(1, round(SHORTEST / max(time.perf_counter() - began, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - began) / repeats[name])
    return times


def rates(seconds: float, flops: int, case: Case, ceilings: dict[str, Any], backward: bool) -> dict[str, float]:
    """FLOP/s, bytes/s, and the share of the roofline: time the ceilings would need over time taken (forward only)."""
    matmul = ceilings["matmul_flops"][str(case.dtype)]
    found = {"flops_per_s": flops / seconds, "matmul_share": flops / seconds / matmul}
    if not backward:
        need = max(flops / matmul, case.bytes / ceilings["copy_bytes_per_s"])
        found |= {"bytes_per_s": case.bytes / seconds, "roofline_share": need / seconds}
    return found
