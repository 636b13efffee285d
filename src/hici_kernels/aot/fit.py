"""Shrink configurations until what they compile to stays within the limits of :mod:`hici_kernels.aot`.

    python -m hici_kernels.aot.fit [--op TABLES] [--arch NAMES] [--report FILE] [--jobs N]

For every entry that nobody has measured: the configuration it has if all of its kernels compile within the spill limit
and the chip's shared memory, else the first of :func:`candidates` that does. Rewrites the tables, and the report, which
is also the cache. A configuration that fits is a place for ``hici tune`` to start from, no measurement.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import tuning
from ..tuning import AotSignature, Entry
from ..tuning.chips import INTERPRET
from ..tuning.table import NOT_MEASURED
from .compile import key_of
from .plan import Task, declared, modules
from .run import EXCEPTIONS, cached, compile_signature, describe, require_compiler, title, verdict, write

REPORT = Path("benchmarks/aot.json")
# Blocks a tile can be shrunk by, and the least it can be shrunk to: a matrix instruction's.
SHRINK = (1, 2, 4)
LEAST = 16
# Matrix units since sm_90 take 64 rows at a time: the block whose positions are rows of a table's products.
ROWS = {"attention": "BLOCK_M", "attention_backward": "BLOCK_N", "attention_backward_dq": "BLOCK_M"}
WHOLE_ROWS = 64


def candidates(start: dict[str, int], rows: str | None = None) -> Iterator[dict[str, int]]:
    """Smaller configurations, the most promising first: loads ahead of their use, whole rows, then the largest tiles.

    ``rows``: the block to keep at WHOLE_ROWS or more where ``start`` has as many.
    """
    blocks = [k for k in start if "BLOCK" in k]
    choices: dict[str, list[int]] = {k: [start[k] // n for n in SHRINK if start[k] // n >= LEAST] for k in blocks}
    choices["num_warps"] = sorted({start["num_warps"], 4, 8})
    choices["num_stages"] = list(range(1, start["num_stages"] + 1))
    found = [start | dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]

    def order(c: dict[str, int]) -> tuple[Any, ...]:
        area = math.prod(c[k] for k in blocks)
        ahead = c["num_stages"] > 1 or start["num_stages"] == 1
        cut = rows is not None and c[rows] < min(start[rows], WHOLE_ROWS)
        return not ahead, cut, -area, c["num_warps"] != start["num_warps"], -c["num_stages"], -c[rows or blocks[0]]

    return iter(sorted(found, key=order))


def hopeless(c: dict[str, int], failed: list[tuple[dict[str, int], str]]) -> bool:
    """Whether a configuration that is no smaller has failed for want of what this one needs as much of."""
    for f, why in failed:
        larger = all(c[k] >= f[k] for k in c if "BLOCK" in k)
        if larger and c.get("TMA") == f.get("TMA"):
            if "spill" in why and c["num_warps"] <= f["num_warps"] and c["num_stages"] == f["num_stages"]:
                return True
            if "shared memory" in why and c["num_stages"] >= f["num_stages"]:
                return True
    return False


def signatures(entry: Entry) -> list[tuple[Task, AotSignature]]:
    """What is launched for an entry."""
    found = []
    for module in modules():
        found += [(Task(module, entry, i), s) for i, s in enumerate(declared(module, entry))]
    return found


def own(entry: Entry, version: str) -> list[tuple[Task, AotSignature]]:
    """Those of them that follow the entry's configuration: the rest is of other tables."""
    c = entry.configuration
    other = dataclasses.replace(entry, configuration=c | {k: 2 * v for k, v in c.items() if "BLOCK" in k})
    fixed = {key_of(s, entry, version) for _, s in signatures(other)}
    return [(t, s) for t, s in signatures(entry) if key_of(s, entry, version) not in fixed]


def fit(entry: Entry, known: dict[str, dict[str, Any]]) -> tuple[Entry, list[dict[str, Any]], str]:
    """(the entry with a configuration that fits, records of what was compiled, what is wrong if nothing fits)."""
    import triton

    exceptions = json.loads(EXCEPTIONS.read_text(encoding="utf-8"))
    failed: list[tuple[dict[str, int], str]] = []
    records: dict[str, dict[str, Any]] = {}
    for configuration in candidates(entry.configuration, ROWS.get(entry.op)):
        if hopeless(configuration, failed):
            continue
        candidate = dataclasses.replace(entry, configuration=configuration)
        wrong = ""
        for task, signature in own(candidate, triton.__version__):
            record = describe(task, signature, triton.__version__)
            if record["key"] not in records:
                record |= known[record["key"]] if record["key"] in known else compile_signature(signature, candidate)
                record["verdict"] = verdict(record, exceptions)
                records[record["key"]] = record
            record = records[record["key"]]
            if record["verdict"] not in ("ok", "listed exception"):
                wrong = f"{record['kernel']} ({record['variant']}): {record['verdict']}"
                break
        if not wrong:
            return _moved(entry, configuration, failed), list(records.values()), ""
        failed.append((configuration, wrong))
    return entry, list(records.values()), failed[0][1]


def _moved(entry: Entry, configuration: dict[str, int], failed: list[tuple[dict[str, int], str]]) -> Entry:
    if configuration == entry.configuration:
        return entry
    start = " ".join(f"{k}={v}" for k, v in entry.configuration.items())
    why = f"{entry.why.split('; shrunk')[0]}; shrunk from {start}: {failed[0][1]}"
    return entry.with_configuration(configuration, NOT_MEASURED, why)


def run(ops: list[str], archs: list[str] | None, report: Path, jobs: int) -> int:
    """0 if every entry fits in the end."""
    require_compiler()
    import triton

    known = cached(report) if report.is_file() else {}
    rows = {op: list(tuning.read(op)) for op in ops}
    wanted = [
        (op, i)
        for op in ops
        for i, e in enumerate(rows[op])
        if e.arch != INTERPRET and (archs is None or e.arch in archs) and isinstance(e.measured, str)
    ]
    kept = json.loads(report.read_text(encoding="utf-8"))["kernels"] if report.is_file() else []
    records = {r["key"]: r for r in kept}
    code = 0
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [(op, i, pool.submit(fit, rows[op][i], known)) for op, i in wanted]
        for op, i, future in futures:
            entry, found, wrong = future.result()
            rows[op][i] = entry
            records |= {r["key"]: r for r in found if "error" not in r}
            tuning.write(op, rows[op])
            write(report, list(records.values()), triton.__version__)
            for r in found:
                typer.echo(f"  {title(r)}: {r.get('registers')} registers, {r['verdict']}")
            settings = " ".join(f"{k}={v}" for k, v in entry.configuration.items())
            typer.echo(f"{op} {entry.arch} {entry.dtype} D {entry.head_dim}: {settings} {wrong or 'fits'}")
            code |= bool(wrong)
    return code


def main(
    op: Annotated[str, typer.Option("--op", help="Tables, separated by commas; none = all.")] = "",
    arch: Annotated[str, typer.Option("--arch", help="Architectures, separated by commas; none = all.")] = "",
    report: Annotated[Path, typer.Option("--report", help="JSON report, also the cache.")] = Path(
        "benchmarks/aot.json"
    ),
    jobs: Annotated[int, typer.Option("--jobs", help="Processes; 0 = one per core.")] = 0,
) -> None:
    """Shrink configurations that nobody has measured until everything compiles within the limits."""
    ops = op.split(",") if op else tuning.tables()
    try:
        code = run(ops, arch.split(",") if arch else None, report, jobs or os.cpu_count() or 1)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
    sys.exit()
