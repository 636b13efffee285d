"""``hici bench``: choose cases, check, measure, report."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from .. import _dispatch
from . import chart, machine, report
from .case import Case
from .run import measure
from .shapes import SUITES

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
) -> int:
    """Measure and print; 0, or 1 if any result was wrong (it then has no speed).

    Raises:
        ValueError: an unknown name, naming the choices, before any work.
    """
    chosen = _names("--op", ops, _dispatch.OPS) or list(_dispatch.OPS)
    sides = _names("--impl", impls, _dispatch.ORDER) or None
    kind = next(iter(_names("--dtype", dtype, tuple(DTYPES))), None)
    _names("--suite", suite, (*SUITES, "gpu"))
    if rounds < 7:
        raise ValueError(f"--rounds must be at least 7 for a median that means something, got {rounds}")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    if chart_path is not None:
        chart.require_matplotlib()
    if suite == "gpu":
        from . import gpu_run

        return gpu_run.run(
            ops=chosen if ops else None,
            impls=sides,
            dtype=None if kind is None else DTYPES[kind],
            rounds=rounds,
            json_path=json_path,
            chart_path=chart_path,
        )
    cases = [c for op in chosen for c in load(op, suite) if kind is None or c.dtype == DTYPES[kind]]
    if not cases:
        raise ValueError(f"--dtype {kind} has no case in suite {suite!r} for {', '.join(chosen)}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
        where = machine.describe()
        ceilings = machine.ceilings(sorted({c.dtype for c in cases}, key=str))
        report.show_machine(console, where, ceilings)
        plan = [(c, backward) for c in cases for backward in ((False, True) if c.differentiable else (False,))]
        rows = [
            measure(case, sides, rounds, ceilings, backward=backward)
            for case, backward in track(plan, "measuring", console=Console(stderr=True), transient=True)
        ]
    finally:
        torch.set_num_threads(before)
    report.show_rows(console, rows)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {
            "machine": where,
            "ceilings": ceilings,
            "rounds": rounds,
            "suite": suite,
            "cases": rows,
        }
        json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if chart_path is not None:
        chart.write(rows, where, chart_path)
    wrong = report.failures(rows)
    for line in wrong:
        console.print(f"WRONG RESULT, no speed: {line}", markup=False)
    return 1 if wrong else 0


def load(op: str, suite: str) -> list[Case]:
    """The cases of an operation in a suite."""
    return importlib.import_module(f"{__package__}.{op}").cases(suite)


def _names(option: str, given: str | None, allowed: tuple[str, ...]) -> list[str]:
    names = [x.strip() for x in given.split(",")] if given else []
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option} must be among {', '.join(allowed)}, got {name!r}")
    return names
