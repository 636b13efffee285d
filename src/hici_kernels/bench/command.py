"""``hici bench``: choose cases, check, measure, report."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import _checks, _dispatch, _native, _outputs
from . import ceilings as limits
from . import chart, decode, hga_layer, kv_store, machine, report
from .case import Case
from .goals import goals
from .run import measure
from .shapes import SUITES

#: What ``--op`` may name: operations, the layer made of them, and the table of decode-sized calls.
SUBJECTS = (*_dispatch.OPS, "hici_layer", "decode")
#: The suite of routed attention, which has rows of its own: one layer (hga_layer.py), and its history on disk.
HGA = "hga"
HGA_SUBJECTS = ("hga_layer", "kv_store")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(
    *,
    ops: str | None,
    impls: str | None,
    dtype: str | None,
    suite: str,
    threads: int | None,
    rounds: int,
    json_path: Path | None,
    chart_path: Path | None,
    path: str | None = None,
) -> int:
    """Measure and print; 0, or 1 if any result was wrong (it then has no speed).

    Raises:
        ValueError: an unknown name, naming the choices, before any work.
    """
    subjects = HGA_SUBJECTS if suite == HGA else SUBJECTS
    chosen = _names("--op", ops, subjects) or list(subjects)
    sides = _names("--impl", impls, _dispatch.ORDER) or None
    if dtype is not None:
        _checks.choice("--dtype", dtype, tuple(DTYPES))
    _checks.choice("--suite", suite, (*SUITES, HGA, "gpu"))
    if rounds < 7:
        raise ValueError(f"--rounds must be at least 7 for a median that means something, got {rounds}")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    if path is not None and path not in _native.paths():
        known = ", ".join(_native.paths()) or f"none: {_native.status()}"
        raise ValueError(f"--path must be among those that this machine runs ({known}), got {path!r}")
    if suite == "gpu":
        from . import gpu_run

        if path is not None or threads is not None:
            raise ValueError("--path and --threads choose among processor kernels, --suite gpu runs none")
        return gpu_run.run(
            ops=chosen if ops else None,
            impls=sides,
            dtype=None if dtype is None else DTYPES[dtype],
            rounds=rounds,
            json_path=json_path,
            chart_path=chart_path,
        )
    if suite == HGA:
        for option, given in (("--impl", impls), ("--dtype", dtype)):
            if given is not None:
                raise ValueError(f"{option} has no meaning with --suite {HGA}, got {given!r}")
        _outputs.prepare(json_path, chart_path)
        return _hga(chosen, threads=threads, rounds=rounds, json_path=json_path, chart_path=chart_path, path=path)
    wanted = None if dtype is None else DTYPES[dtype]
    cases = [c for op in chosen if op != "decode" for c in load(op, suite) if wanted in (None, c.dtype)]
    points = [p for p in decode.points(suite) if wanted in (None, p.dtype)] if "decode" in chosen else []
    if not cases and not points:
        kinds = "" if dtype is None else f" with --dtype {dtype}"
        raise ValueError(f"--suite {suite} has no case of --op {', '.join(chosen)}{kinds}")
    if points and sides is not None and len(sides) > 1:
        raise ValueError(f"--impl must be one name where --op has decode, got {impls!r}")
    _outputs.prepare(json_path, chart_path)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    try:
        with contextlib.nullcontext() if path is None else _native.path(path):
            result = _measure(console, cases, points, sides, rounds)
    finally:
        torch.set_num_threads(before)
    result = {"suite": suite, "rounds": rounds, "path": result["ceilings"]["path"], **result}
    rows, decoded = result["cases"], result["decode"]
    report.show_rows(console, rows)
    report.show_decode(console, decoded)
    report.show_ceilings(console, result["ceilings_after"], "ceilings again, after all cases")
    result["goals"] = goals(rows, decoded, result["ceilings"]) if suite == "cpu" else []
    if result["goals"]:
        report.show_goals(console, result["goals"])
    if json_path is not None:
        _outputs.write_json(json_path, result)
    if chart_path is not None and rows:
        chart.write(rows, result["machine"], chart_path)
    if chart_path is not None and decoded:
        chart.write_decode(decoded, result["machine"], chart.beside(chart_path, "decode") if rows else chart_path)
    wrong = report.failures(rows, decoded)
    for line in wrong:
        console.print(f"WRONG RESULT, no speed: {line}", markup=False)
    if sides and not wrong and not report.timed(rows, decoded, sides):
        console.print(f"NOTHING MEASURED: --impl {impls} can serve none of these cases here", markup=False)
        return 2
    return 1 if wrong else 0


def _hga(
    subjects: list[str],
    *,
    threads: int | None,
    rounds: int,
    json_path: Path | None,
    chart_path: Path | None,
    path: str | None,
) -> int:
    """Suite "hga": one layer of routed attention beside dense attention, and its history on disk."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    rows, stored = [], []
    try:
        with contextlib.nullcontext() if path is None else _native.path(path):
            where, ceilings = machine.describe(), limits.measure([torch.bfloat16])
            report.show_machine(console, where, ceilings)
            if "hga_layer" in subjects:
                rows = hga_layer.measure(rounds, ceilings)
            if "kv_store" in subjects:
                stored = [kv_store.measure(size) for size in kv_store.sizes(HGA)]
            after = limits.measure([torch.bfloat16])
    finally:
        torch.set_num_threads(before)
    result = {"suite": HGA, "rounds": rounds, "path": ceilings["path"], "machine": where, "ceilings": ceilings}
    result |= {"ceilings_after": after, "rows": rows, "kv_store": stored, "goals": []}
    if rows:
        hga_layer.show(console, rows)
        result["goals"] = hga_layer.goals(rows)
        report.show_goals(console, result["goals"])
    for found in stored:
        kv_store.show(lambda line: console.print(line, markup=False), found)
        result["goals"] += kv_store.goals(found)
    report.show_ceilings(console, after, "ceilings again, after all cases")
    if json_path is not None:
        _outputs.write_json(json_path, result)
    if chart_path is not None and rows:
        chart.write_rows(rows, where, chart_path)
    if chart_path is not None and stored:
        chart.write_store(stored, where, chart.beside(chart_path, "kv_store") if rows else chart_path)
    wrong = [r["name"] for r in rows if r["sides"][hga_layer.OURS]["correct"] is False]
    wrong += [
        f"KVStore, {s['routes']} routes: other bits on disk" for x in stored for s in x["steps"] if not s["equal"]
    ]
    for line in wrong:
        console.print(f"WRONG RESULT, no speed: {line}", markup=False)
    return 1 if wrong else 0


def _measure(
    console: Console, cases: list[Case], points: list[decode.Point], sides: list[str] | None, rounds: int
) -> dict[str, Any]:
    """Machine, ceilings before and after, one row per case and direction, one per decode-sized call."""
    where = machine.describe()
    dtypes = sorted({c.dtype for c in cases} | {p.dtype for p in points}, key=str)
    ceilings = limits.measure(dtypes)
    report.show_machine(console, where, ceilings)
    plan = [(c, backward) for c in cases for backward in ((False, True) if c.differentiable else (False,))]
    rows = [
        measure(case, sides, rounds, ceilings, backward=backward)
        for case, backward in _outputs.progress(plan, "measuring")
    ]
    impl = sides[0] if sides else None
    decoded = [
        decode.measure(point, impl, rounds, ceilings) for point in _outputs.progress(points, "decode-sized calls")
    ]
    return {
        "machine": where,
        "ceilings": ceilings,
        "ceilings_after": limits.measure(dtypes),
        "cases": rows,
        "decode": decoded,
    }


def load(op: str, suite: str) -> list[Case]:
    """The cases of an operation in a suite."""
    return importlib.import_module(f"{__package__}.{op}").cases(suite)


def _names(option: str, given: str | None, allowed: tuple[str, ...]) -> list[str]:
    names = [x.strip() for x in given.split(",")] if given else []
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option} must be among {', '.join(allowed)}, got {name!r}")
    return names
