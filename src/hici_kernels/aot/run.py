"""Compile the plan, judge every record, write the report."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import tuning
from ..tuning import AotSignature, Entry
from . import REQUIRED, SPILL_LIMIT
from .compile import compile_one, key_of, name_of, options_of
from .plan import Task, signature_of, tasks, with_signatures

EXCEPTIONS = Path(__file__).with_name("exceptions.json")
# Hours of compilation are written down this often.
SAVE_SECONDS = 30.0


def run(report: Path | None, jobs: int, one_per_kernel: bool, use_cache: bool) -> int:
    """0 if everything holds, else 1. Prints a table and, if asked to, writes the report."""
    require_compiler()
    import triton

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    plan = list(tasks(one_per_kernel))
    before = cached(report) if report is not None and use_cache else {}
    plan, records = distinct(plan, triton.__version__)
    missing = [i for i, r in enumerate(records) if r["key"] not in before]
    compiled: dict[int, dict[str, Any]] = {}

    def keep() -> float:
        if report is not None and compiled:
            save(report, [records[i] | result for i, result in compiled.items()], triton.__version__)
        return time.monotonic()

    try:
        kept = keep()
        for i, result in zip(missing, _compile_all([plan[i] for i in missing], jobs), strict=True):
            compiled[i] = result
            if time.monotonic() - kept > SAVE_SECONDS:
                kept = keep()
    except BaseException:
        keep()
        raise
    exceptions = json.loads(EXCEPTIONS.read_text(encoding="utf-8"))
    for i, record in enumerate(records):
        record |= compiled[i] if i in compiled else before[record["key"]]
        record["verdict"] = verdict(record, exceptions)
    problems = [f"{title(r)}: {r['verdict']}" for r in records if r["verdict"] not in ("ok", "listed exception")]
    if not one_per_kernel:
        problems += absent(records) + unused(records, tuning.tables())
    show(console, records, len(compiled))
    if report is not None:
        # of one record per kernel, the others' are kept
        (save if one_per_kernel else write)(report, records, triton.__version__)
    for line in problems:
        console.print(f"FAILED: {line}", markup=False)
    return 1 if problems else 0


def require_compiler() -> None:
    try:
        import triton
    except ImportError as error:
        raise ValueError("ahead-of-time compilation needs triton: pip install triton") from error
    if triton.knobs.runtime.interpret:
        raise ValueError("ahead-of-time compilation needs TRITON_INTERPRET unset: the interpreter compiles nothing")


def _compile_all(plan: list[Task], jobs: int) -> Iterator[dict[str, Any]]:
    """Results in the order of the plan."""
    if not plan:
        return
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        results = pool.map(_compile_task, plan)
        yield from track(results, "compiling", len(plan), console=Console(stderr=True), transient=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _compile_task(task: Task) -> dict[str, Any]:
    return compile_signature(signature_of(task), task.entry)


def compile_signature(signature: AotSignature, entry: Entry) -> dict[str, Any]:
    """Compile without leaving anything behind in Triton's cache."""
    import triton

    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return compile_one(signature, entry)


def distinct(plan: list[Task], version: str) -> tuple[list[Task], list[dict[str, Any]]]:
    """The plan without compilations that another one of it already is, and what is known of each before compiling.

    Helpers that take nothing from a table are launched for every entry; one of them stands for all.
    """
    kept: dict[str, tuple[Task, dict[str, Any]]] = {}
    tables: dict[str, set[str]] = {}
    for task, signature in with_signatures(plan):
        record = describe(task, signature, version)
        kept.setdefault(record["key"], (task, record))
        tables.setdefault(record["key"], set()).add(task.entry.op)
    for key, (_, record) in kept.items():
        record["tables"] = sorted(tables[key])
    return [task for task, _ in kept.values()], [record for _, record in kept.values()]


def describe(task: Task, signature: AotSignature, version: str) -> dict[str, Any]:
    """The part of a record that is known before compiling."""
    entry = task.entry
    return {
        "kernel": name_of(signature),
        "variant": signature.variant,
        "tables": [entry.op],
        "arch": entry.arch,
        "head_dim": entry.head_dim,
        "segment_len": entry.segment_len,
        "dtype": entry.dtype,
        "configuration": {
            **{k: v for k, v in signature.constexprs.items() if k.isupper() and type(v) is int},
            **options_of(signature, entry),
        },
        "key": key_of(signature, entry, version),
    }


RESULTS = (
    "registers",
    "spill_bytes",
    "spill_load_bytes",
    "spilled_scalars",
    "shared_bytes",
    "shared_limit",
    "instructions",
    "seconds",
)


def cached(report: Path) -> dict[str, dict[str, Any]]:
    """key -> what the compiler said, of an earlier report; errors are tried again."""
    if not report.is_file():
        return {}
    rows = json.loads(report.read_text(encoding="utf-8"))["kernels"]
    return {r["key"]: {k: r[k] for k in RESULTS if k in r} for r in rows if "error" not in r}


def verdict(record: dict[str, Any], exceptions: list[dict[str, Any]]) -> str:
    """ "ok", "listed exception", or what is wrong."""
    if "error" in record:
        return f"does not compile: {record['error']}"
    if record["shared_bytes"] > record["shared_limit"]:
        return f"{record['shared_bytes']} bytes of shared memory, {record['arch']} has {record['shared_limit']}"
    if record["spill_bytes"] <= SPILL_LIMIT:
        return "ok"
    for rule in exceptions:
        if all(record[k] == v for k, v in rule["where"].items()) and record["spill_bytes"] <= rule["spill_bytes"]:
            return "listed exception"
    return f"{record['spill_bytes']} bytes of spill per thread, allowed {SPILL_LIMIT}"


def absent(records: list[dict[str, Any]]) -> list[str]:
    """Kernels without a configuration for a required architecture."""
    found: dict[str, set[str]] = {}
    for r in records:
        found.setdefault(r["kernel"], set()).add(r["arch"])
    return [f"{k}: its table has no entry for {a}" for k, archs in found.items() for a in REQUIRED if a not in archs]


def unused(records: list[dict[str, Any]], tables: list[str]) -> list[str]:
    """Tables that no kernel is compiled from."""
    used = {t for r in records for t in r["tables"]}
    return [f"{t}: no kernel is launched for this table" for t in tables if t not in used]


def title(record: dict[str, Any]) -> str:
    settings = " ".join(f"{k}={v}" for k, v in record["configuration"].items())
    return (
        f"{record['kernel']} ({record['variant']}) {record['arch']} {record['dtype']} D {record['head_dim']} "
        f"L {record['segment_len']} {settings}"
    )


def show(console: Console, records: list[dict[str, Any]], compiled: int) -> None:
    """The worst of every kernel and chip, and one line for every compilation that is not simply good."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in records:
        groups.setdefault((r["kernel"], r["arch"]), []).append(r)
    table = Table("kernel", "arch", "compiled", "registers", "shared bytes", "spilled bytes", title="at most")
    for (kernel, arch), rows in groups.items():
        worst = (max((r[k] for r in rows if k in r), default="-") for k in ("registers", "shared_bytes", "spill_bytes"))
        table.add_row(kernel, arch, str(len(rows)), *map(str, worst))
    console.print(table, markup=False)
    for r in records:
        if r["verdict"] == "listed exception":
            console.print(f"listed exception: {title(r)}: {r['spill_bytes']} bytes spilled", markup=False)
    console.print(f"{len(records)} kernels, {compiled} compiled now, {len(records) - compiled} taken from the report")


def save(path: Path, records: list[dict[str, Any]], version: str) -> None:
    """What has been compiled so far, beside what the report has held: the next run takes it over and goes on."""
    new = {r["key"] for r in records}
    old = json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.is_file() else []
    exceptions = json.loads(EXCEPTIONS.read_text(encoding="utf-8"))
    judged = [r | {"verdict": verdict(r, exceptions)} for r in records]
    write(path, [r for r in old if r["key"] not in new] + judged, version)


def write(path: Path, records: list[dict[str, Any]], version: str) -> None:
    """One line per record, in a fixed order: a change of one kernel is a change of its lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted(json.dumps(r) for r in records)
    head = f'{{\n  "triton": {json.dumps(version)},\n  "spill_limit": {SPILL_LIMIT},\n  "kernels": [\n    '
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(head + ",\n    ".join(rows) + "\n  ]\n}\n", encoding="utf-8")
    os.replace(temporary, path)
