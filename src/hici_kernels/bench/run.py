"""Correctness first, in the same run; then all sides alternating in one process."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from .. import _dispatch
from ..errors import ImplError
from ..testing import budget, error
from .case import FASTEST, PLAIN, Baseline, Case, Inputs, Outputs, Part, weights, with_gradients
from .ceilings import least_seconds, product_loop, product_rate
from .machine import spread
from .memory import kept_memory, peak_bytes, resident_growth

# Shorter calls are repeated inside one timing until they take so long: the clock's own step must not show, and the
# first calls after another side find its data in the caches and its threads still spinning.
SHORTEST = 5e-3
# Sides that no conclusion rests on are timed in fewer rounds once a call takes this long, and once where it takes very
# long; neither is a long call repeated for its allocator's record.
LONG, FEW, VERY_LONG = 1.0, 3, 8.0
# Cases of shorter calls are timed in three times as many rounds: one other process in between doubles a call.
BRIEF = 1e-2
# Beside calls of this length the ceiling is measured again in every round, for so long: over minutes a machine that is
# shared with others, or grows warm, is not the one whose best 20 ms are known.
STEADY, STEADY_LOOP = 0.25, 0.3
CEILING = "product ceiling"

Work = Callable[[Inputs], Outputs]


def measure(
    case: Case, impls: list[str] | None, rounds: int, ceilings: dict[str, Any], *, backward: bool
) -> dict[str, Any]:
    """One row of the report. A side that misses its error budget, or raises, gets its reason instead of a speed.

    backward: forward and backward together are timed, and gradients are checked too.
    """
    with torch.set_grad_enabled(backward):
        return _measure(case, impls, rounds, ceilings, backward)


def _measure(
    case: Case, impls: list[str] | None, rounds: int, ceilings: dict[str, Any], backward: bool
) -> dict[str, Any]:
    inputs = case.rounded()
    checked = _Check(case, inputs, backward)
    sides: dict[str, dict[str, Any]] = {}
    runnable: dict[str, Callable[[], object]] = {}
    known: dict[str, float] = {}
    for name, call in _candidates(case, impls, backward, sides).items():
        try:
            sides[name], known[name] = checked.of(call)
        except ImplError as refused:
            sides[name] = {"error": str(refused), "correct": None}
            continue
        except Exception as failed:  # the other sides, and the cases after this one, are still of use
            sides[name] = {"error": f"{type(failed).__name__}: {failed}", "correct": False}
            continue
        if sides[name]["correct"]:
            runnable[name] = functools.partial(checked.whole(call), inputs)
    if case.against == PLAIN:
        runnable[PLAIN] = functools.partial(checked.whole(case.plain), inputs)
        sides[PLAIN] = {"correct": True, "error_max": checked.plain_error}
    for name, baseline in case.baselines.items():
        if baseline.backward or not backward:
            sides[name] = {"correct": None, "other_work": True, "note": baseline.note}
            runnable[name] = _prepared(baseline, inputs, backward)
    steady = _time(case, sides, runnable, known, rounds, ceilings, backward)
    return {
        "op": case.op,
        "case": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": "forward+backward" if backward else "forward",
        "flops": _flops(case, backward),
        "bytes": case.bytes,
        "exps": case.exps,
        "steady_products_per_s": steady,
        "against": case.against,
        "checked": "everything" if case.part is None else case.part.note,
        "served_by": {op: _first(op) for op in case.needs},
        "sides": sides,
    }


def _candidates(
    case: Case, impls: list[str] | None, backward: bool, sides: dict[str, dict[str, Any]]
) -> dict[str, Work]:
    """The implementations to measure; a named one that cannot serve the operation at all gets its reason."""
    if case.needs:
        return {name: _named(case, None if name == FASTEST else name) for name in impls or [FASTEST]}
    found: dict[str, Work] = {}
    for impl in impls if impls is not None else _dispatch.ORDER:
        module, reason = _dispatch.load(case.op, impl)
        if impls is None and impl == "reference" and backward and case.against != PLAIN:
            continue  # minutes, and nothing is compared with it
        if module is not None:
            found[impl] = _named(case, impl)
        elif impls is not None:
            sides[impl] = {"error": f"impl={impl!r} cannot serve {case.op}: {reason}", "correct": None}
    return found


def _named(case: Case, impl: str | None) -> Work:
    return lambda x: case.call(x, impl)


def _first(op: str) -> str:
    """The implementation that impl=None tries first on this machine."""
    return next(name for name, reason in _dispatch.explain(op).items() if reason is None)


class _Check:
    """Results against float64, by the budget max(2 x plain PyTorch's own error, 2 eps max|oracle|)."""

    def __init__(self, case: Case, inputs: Inputs, backward: bool) -> None:
        self.case, self.inputs = case, inputs
        self.part = case.part or Part("everything", dict, tuple)
        names = case.differentiable if backward else ()
        self.names = names
        seen = self.part.inputs(inputs)
        with torch.no_grad():
            shapes = case.call(inputs, None) if backward else ()
        self.upstream = weights(shapes)
        self.part_upstream = self._outputs(self.upstream) if backward else ()
        truth = self._with(case.oracle or case.plain, self.part_upstream)(case.wide(seen))
        self.oracle = [x.double() for x in truth]
        self.plain = self._with(case.plain, self.part_upstream)(seen)
        self.plain_error = max(error(o, p) for o, p in zip(self.oracle, self.plain, strict=True))
        self.plain_whole: Outputs | None = None

    def whole(self, call: Work) -> Work:
        return self._with(call, self.upstream)

    def of(self, call: Work) -> tuple[dict[str, Any], float]:
        """Errors of one side and how far its first call raised resident memory; the seconds of that call."""
        if self.part.outputs is None:
            small = check(self.oracle, self.plain, call(self.part.inputs(self.inputs)), self.case.dtype)
            return self._against_plain(call, small)
        began = time.perf_counter()
        found, grown = resident_growth(lambda: self.whole(call)(self.inputs))
        seconds = time.perf_counter() - began
        count = len(found) - len(self.names)
        gradients = self.part.inputs(dict(zip(self.names, found[count:], strict=True)))
        seen = (*self._outputs(found[:count]), *gradients.values())
        return check(self.oracle, self.plain, seen, self.case.dtype) | {"resident_bytes": grown}, seconds

    def _against_plain(self, call: Work, small: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """The whole call may differ from plain PyTorch by twice what both may err in the small one."""
        if self.plain_whole is None:
            self.plain_whole = self.case.plain(self.inputs)
        began = time.perf_counter()
        found, grown = resident_growth(lambda: call(self.inputs))
        seconds = time.perf_counter() - began
        far = max(error(p.double(), f) for p, f in zip(self.plain_whole, found, strict=True))
        near = far <= 2 * (small["error_allowed"] + self.plain_error)
        return small | {"correct": small["correct"] and near, "from_plain": far, "resident_bytes": grown}, seconds

    def _with(self, call: Work, upstream: Outputs) -> Work:
        if not self.names:
            return call
        return lambda x: with_gradients(x, self.names, call, upstream)

    def _outputs(self, outputs: Outputs) -> Outputs:
        assert self.part.outputs is not None, "a part that is a call of its own has no gradients"
        return self.part.outputs(outputs)


def _prepared(baseline: Baseline, inputs: Inputs, backward: bool) -> Callable[[], object]:
    prepared = baseline.prepare(inputs)
    if not backward:
        return lambda: baseline.call(prepared)
    names = [n for n, x in prepared.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    with torch.no_grad():
        upstream = weights(baseline.call(prepared))
    return lambda: with_gradients(prepared, names, baseline.call, upstream)


def check(oracle: Any, plain: Any, found: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Largest error over all outputs, and whether each is within max(2 x plain's own error, 2 eps max|oracle|)."""
    worst, correct, allowed = 0.0, True, 0.0
    for o, p, f in zip(oracle, plain, found, strict=True):
        limit, e = budget(o, p, dtype), error(o, f)
        correct = correct and e <= limit
        if e >= worst:
            worst, allowed = e, limit
    return {"correct": correct, "error_max": worst, "error_allowed": allowed}


def _time(
    case: Case,
    sides: dict[str, dict[str, Any]],
    runnable: dict[str, Callable[[], object]],
    known: dict[str, float],
    rounds: int,
    ceilings: dict[str, Any],
    backward: bool,
) -> float | None:
    """Fill in speeds and memory of the sides that may have them; the median of the ceiling between them, if taken."""
    aside = {n for n in runnable if n != case.against and (n == "reference" or n in (PLAIN, *case.baselines))}
    if not case.judged:
        aside = set(runnable)
    if case.memory:
        for name, call in runnable.items():
            if name not in known:
                call()
            began = time.perf_counter()
            sides[name]["resident_bytes"] = resident_growth(call)[1]
            known[name] = time.perf_counter() - began
    loop = None
    if case.judged and max((s for n, s in known.items() if n not in aside), default=0.0) > STEADY:
        loop = product_loop(ceilings, case.dtype, STEADY_LOOP)
    between = {} if loop is None else {CEILING: loop[0]}
    if known and max(known.values()) < BRIEF:
        rounds *= 3
    measured = alternate(runnable | between, rounds, aside, known)
    steady = None if loop is None else loop[1] / spread(measured.pop(CEILING))["median_s"]
    for name, times in measured.items():
        side = sides[name]
        side |= spread(times) | {"rounds": len(times)}
        if not side.get("other_work"):
            side |= rates(side["median_s"], case, ceilings, backward)
            side["steady_share"] = None if steady is None else side["flops_per_s"] / steady
        side["peak_bytes"] = peak_bytes(runnable[name]) if side["median_s"] < LONG else None
    compared = sides.get(case.against, {}).get("median_s")
    for side in sides.values():
        if "median_s" in side and compared:
            side["speedup"] = compared / side["median_s"]
    return steady


def alternate(
    sides: dict[str, Callable[[], object]],
    rounds: int,
    aside: Collection[str] = (),
    known: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call: every round runs every side once, so that drift of the machine hits all alike.

    Freed memory stays with the process meanwhile (:func:`kept_memory`), so that its warm-up is the first round's. Long
    sides among ``aside`` run in the first rounds only. known: seconds of earlier calls, which warmed their sides.
    """
    repeats, left = {}, {}
    for name, call in sides.items():
        first = (known or {}).get(name) or _seconds(call)
        # a first call may load and allocate: it says nothing about a short one
        again = first if first > LONG / 4 else _seconds(call)
        repeats[name] = 1 if again >= SHORTEST else _repeats(call)
        few = 1 if again > VERY_LONG else FEW if again > LONG else rounds
        left[name] = few if name in aside else rounds
    times: dict[str, list[float]] = {name: [] for name in sides}
    with kept_memory():
        for _ in range(rounds):
            for name, call in sides.items():
                if len(times[name]) < left[name]:
                    began = time.perf_counter()
                    for _ in range(repeats[name]):
                        call()
                    times[name].append((time.perf_counter() - began) / repeats[name])
    return times


def _repeats(call: Callable[[], object]) -> int:
    """Calls that together take SHORTEST once they are warm."""
    count = 1
    while True:
        began = time.perf_counter()
        for _ in range(count):
            call()
        seconds = time.perf_counter() - began
        if seconds >= SHORTEST:
            return max(1, round(count * SHORTEST / seconds))
        count *= 2


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _flops(case: Case, backward: bool) -> int:
    return case.flops * (7 if backward else 2) // 2  # a backward pass costs 2.5 times its forward pass


def rates(seconds: float, case: Case, ceilings: dict[str, Any], backward: bool) -> dict[str, float]:
    """FLOP/s, its shares of the measured ceilings, bytes/s, and forward the share of the roofline."""
    flops = _flops(case, backward)
    found = {
        "flops_per_s": flops / seconds,
        "matmul_share": flops / seconds / ceilings["matmul_flops"][str(case.dtype)],
        "product_share": flops / seconds / product_rate(ceilings, case.dtype),
    }
    if not backward:
        need = least_seconds(ceilings, case.dtype, flops, case.exps, case.bytes)
        found |= {"bytes_per_s": case.bytes / seconds, "roofline_share": need / seconds}
    return found
