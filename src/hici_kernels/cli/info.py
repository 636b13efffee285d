"""``hici info``: what is installed here, and which implementation serves which operation."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch
from rich.console import Console
from rich.table import Table

import hici_kernels

from .. import _native
from .._dispatch import OPS, ORDER, explain

FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve")
IMPORT_RUNS = 5


def show(as_json: bool, timing: bool, source: Path | None) -> None:
    """Print the report; ``timing`` also measures import and install."""
    report = collect()
    if timing:
        report["timing"] = {"import": import_times(), "install": install_time(source)}
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for key in ("hici-kernels", "python", "torch", "triton", "native library", "cpu", "gpus"):
        console.print(f"{key:15s} {_text(report[key])}")
    table = Table("operation", *ORDER, title="What serves each operation here (the first that can takes a call)")
    notes: dict[str, int] = {}
    for op, row in report["operations"].items():
        cells = []
        for name in ORDER:
            reason = row[name]
            cells.append("yes" if reason is None else f"no [{notes.setdefault(reason, len(notes) + 1)}]")
        table.add_row(op, *cells)
    console.print(table, markup=False)
    for reason, number in notes.items():
        console.print(f"[{number}] {reason}", markup=False)
    if timing:
        _print_timing(console, report["timing"])


def collect() -> dict[str, Any]:
    """Everything but timings, as plain JSON types."""
    native = _native.status()
    return {
        "hici-kernels": hici_kernels.__version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "triton": _version("triton") or "not installed",
        "native library": native or f"usable, paths {', '.join(_native.paths())} (the last is used)",
        "cpu": cpu(),
        "gpus": gpus() or "none",
        "operations": {op: explain(op) for op in OPS},
    }


def cpu() -> dict[str, Any]:
    """Model name, cores and the instruction sets kernels ask for, as far as the system tells.

    Family and model number belong to the name: a virtual machine may call several generations the same.
    """
    model, flags = platform.processor() or platform.machine(), set()
    numbers: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("cpu family", "model"):
                numbers[key.strip()] = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    except OSError:
        pass
    if len(numbers) == 2:
        model = f"{model}, family {numbers['cpu family']} model {numbers['model']}"
    found = [x for x in FEATURES if x in flags]
    return {"model": model, "cores": os.cpu_count(), "features": found}


def gpus() -> list[str]:
    """Name, capability and memory of every GPU torch can use."""
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return found


def import_times() -> dict[str, float]:
    """Median seconds of ``import torch`` and of ``import hici_kernels`` after it, over fresh processes."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import hici_kernels; "
        "print(b - a, time.perf_counter() - b)"
    )
    runs = []
    for _ in range(IMPORT_RUNS):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        runs.append([float(x) for x in done.stdout.split()])
    first, second = zip(*runs, strict=True)
    return {"torch_s": statistics.median(first), "hici_kernels_s": statistics.median(second), "runs": IMPORT_RUNS}


def install_time(source: Path | None) -> dict[str, Any]:
    """Seconds of ``pip install`` of the source tree, build isolation included, into a folder that is thrown away."""
    tree = source or source_tree()
    if tree is None or not (tree / "pyproject.toml").is_file():
        if source is not None:
            raise ValueError(f"--source must be a source tree with a pyproject.toml, got {source}")
        return {"seconds": None, "why": "not installed from a source tree that is still here; name one with --source"}
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, str(tree)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        native = (Path(target) / "hici_kernels" / _native.PATH.name).is_file()
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"seconds": None, "why": f"pip failed: {last}"}
    return {"seconds": seconds, "native_library": native, "source": str(tree)}


def source_tree() -> Path | None:
    """The tree this installation was made from, if it is still there."""
    try:
        text = importlib.metadata.distribution("hici-kernels").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    if text:
        url = urlparse(json.loads(text).get("url", ""))
        if url.scheme == "file" and Path(unquote(url.path)).is_dir():
            return Path(unquote(url.path))
    beside = Path(hici_kernels.__file__).resolve().parents[2]
    return beside if (beside / "pyproject.toml").is_file() else None


def _print_timing(console: Console, timing: dict[str, Any]) -> None:
    times, install = timing["import"], timing["install"]
    console.print(
        f"import          torch {times['torch_s']:.2f} s, hici_kernels on top {times['hici_kernels_s']:.3f} s "
        f"(median of {times['runs']} fresh processes)"
    )
    if install["seconds"] is None:
        console.print(f"install         not measured: {install['why']}", markup=False)
    else:
        with_native = "with" if install["native_library"] else "without"
        console.print(f"install         {install['seconds']:.1f} s from source, {with_native} the native library")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['model']}, {value['cores']} cores, {' '.join(value['features']) or 'features unknown'}"
    return "; ".join(value) if isinstance(value, list) else str(value)
