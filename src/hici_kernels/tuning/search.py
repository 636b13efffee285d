"""``hici tune``: measure candidate configurations on the GPU at hand and rewrite its entries of the tables.

From the entry that serves a shape now, one value at a time is moved (blocks halved and doubled, warps and stages one
step) as long as that is faster: tens of candidates per shape instead of all combinations. A candidate that does not
compile, does not fit the chip, or gives another result than the entry it started from is passed over.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import _dispatch, _outputs
from ..bench.gpu_cases import GpuCase, attention_case, slots_case, stats_case
from ..bench.gpu_hga_cases import gather_case, route_case, routed_case, summaries_case
from ..bench.gpu_report import device_name, triton_version
from ..bench.gpu_run import require_gpu
from ..bench.gpu_timing import Clock, DeviceClock
from ..bench.shapes import Layer
from .chips import architecture
from .given import backward_arguments
from .lookup import entry_for, trial
from .table import FOLDER, Entry, read, tables, write

SEGMENTS = (1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 80, 96, 128, 256)
#: of those, the ones that routed attention has entries for
ROUTED_DIMS = (64, 128, 256)
#: what one of these has given serves the other, where only one is asked for
HALF = frozenset(("bfloat16", "float16"))
ROUNDS = 11
# A candidate must be faster by this much to be moved to: less is noise.
GAIN = 0.01
BLOCKS = (16, 256)
COUNTS = (1, 64)
WARPS = (1, 2, 4, 8, 16)
STAGES = (1, 5)


def run(
    *,
    ops: str | None,
    head_dims: str | None,
    segment_lens: str | None,
    dtypes: str | None,
    json_path: Path | None,
    dry_run: bool,
) -> int:
    """Tune, print, rewrite the tables unless ``dry_run``.

    Raises:
        ValueError: no GPU, or an unknown name or number, before anything is measured.
    """
    chosen = _choice("--op", ops, tables(), str)
    dims = _choice("--head-dim", head_dims, HEAD_DIMS, int)
    lens = _choice("--segment-len", segment_lens, None, int) if segment_lens else list(SEGMENTS)
    kinds = _choice("--dtype", dtypes, ("bfloat16", "float16", "float32"), str) if dtypes else ["bfloat16"]
    device = require_gpu("hici tune")
    plan = list(shapes(chosen, dims, lens, kinds))
    return tune(plan, device, DeviceClock(device), json_path=json_path, folder=None if dry_run else FOLDER)


def _choice(option: str, given: str | None, allowed: Any, kind: Callable[[str], Any]) -> list[Any]:
    if given is None:
        return list(allowed)
    try:
        found = [kind(x.strip()) for x in given.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be whole numbers separated by commas, got {given!r}") from error
    for x in found:
        if allowed is not None and x not in allowed:
            raise ValueError(f"{option} must be among {', '.join(map(str, allowed))}, got {x!r}")
        if isinstance(x, int) and x < 1:
            raise ValueError(f"{option} must be at least 1, got {x}")
    return found


@dataclasses.dataclass(frozen=True)
class Shape:
    """A table and a problem that meets it; ``key`` is (head_dim, segment_len) of the entry to write."""

    op: str
    key: tuple[int, int]
    case: GpuCase

    @property
    def backward(self) -> bool:
        return "_backward" in self.op

    @property
    def dtype(self) -> str:
        return str(self.case.dtype).removeprefix("torch.")


def shapes(ops: list[str], dims: list[int], lens: list[int], dtypes: list[str]) -> Iterator[Shape]:
    """What is measured for every table: 16K tokens of attention with 32 heads of which 8 for keys, and so on."""
    for op in ops:
        for name in dtypes:
            dtype = getattr(torch, name)
            for length in lens:
                tokens = max(16384 // length, 1) * length
                if op.startswith("attention"):
                    for d in dims:
                        layer = Layer(f"D {d}", 4096, 32, 8, d)
                        case = attention_case(layer, tokens, length, dtype, f"segments of {length}")
                        yield Shape(op, (d, length), case)
                elif op.startswith("local_slots"):
                    yield Shape(op, (4096, length), slots_case(Layer("7B", 4096, 32, 8, 128), tokens, length, dtype))
            if op == "hga_summaries":
                yield Shape(op, (128, 64), summaries_case(32768, dtype))
            elif op == "hga_route":
                yield Shape(op, (128, 0), route_case(512, 4096, dtype))
            elif op.startswith("hga_attention"):
                for d in dims:
                    if d in ROUTED_DIMS:
                        yield Shape(op, (d, 0), routed_case(32768, 4096, dtype, d))
            elif op == "gather_rows":
                yield Shape(op, (1 << 15, 0), gather_case(1 << 15, 2048, dtype))
            if op.startswith("global_stats"):
                for n in (4, 4096):
                    yield Shape(op, (4096, n), stats_case(f"{n} segments", n, dtype, False))


def tune(plan: list[Shape], device: torch.device, clock: Clock, *, json_path: Path | None, folder: Path | None) -> int:
    """Measure every shape of the plan; write entries into ``folder`` (None = only report)."""
    _outputs.prepare(json_path)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    table = Table("table", "shape", "dtype", "before us", "now us", "configuration", "tried", title=device_name(device))
    results = []
    for shape in plan:
        console.print(f"{shape.op}: {shape.case.shape}, {shape.dtype}", markup=False)
        found = best(shape, device, clock)
        results.append(found)
        settings = " ".join(f"{k}={v}" for k, v in found["configuration"].items())
        before, now = (f"{1e6 * found[k]:.1f}" for k in ("started_s", "median_s"))
        table.add_row(shape.op, str(shape.key), shape.dtype, before, now, settings, str(len(found["tried"])))
        if folder is not None:  # at once: an interrupted run keeps what it has
            asked = {x.dtype for x in plan if (x.op, x.key) == (shape.op, shape.key)}
            entry = entry_of(shape, found, device, both=len(asked & HALF) < 2)
            write(shape.op, merged(list(read(shape.op)), entry), folder)
    console.print(table, markup=False)
    if json_path is not None:
        _outputs.write_json(json_path, results, indent=1)
    return 0


def best(shape: Shape, device: torch.device, clock: Clock) -> dict[str, Any]:
    """The fastest configuration found for a shape, and everything that was tried."""
    call = problem(shape, device)
    start = entry_for(shape.op, architecture(device), *shape.key, shape.dtype)
    tried: dict[tuple[tuple[str, int], ...], dict[str, Any]] = {}
    with trial(shape.op, start.configuration):
        expected = call()

    def seconds(configuration: dict[str, int]) -> float:
        identity = tuple(sorted(configuration.items()))
        if identity not in tried:
            tried[identity] = {"configuration": configuration} | _measure(
                shape.op, configuration, call, expected, clock
            )
        return float(tried[identity].get("median_s", float("inf")))

    current, fastest = dict(start.configuration), seconds(start.configuration)
    started = fastest
    if started == float("inf"):
        raise ValueError(f"{shape.op}: the entry to start from fails: {next(iter(tried.values()))['error']}")
    moved = True
    while moved:
        moved = False
        for candidate in neighbours(current):
            taken = seconds(candidate)
            if taken < fastest * (1 - GAIN):
                current, fastest, moved = candidate, taken, True
                break
    return {
        "op": shape.op,
        "key": list(shape.key),
        "dtype": shape.dtype,
        "shape": shape.case.shape,
        "configuration": current,
        "median_s": fastest,
        "started_s": started,
        "started_from": start.configuration,
        "tried": list(tried.values()),
    }


def problem(shape: Shape, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """One direction of the Triton implementation at a shape, called without autograd: a trial is of one thread."""
    op = shape.case.op
    module, reason = _dispatch.load(op, "triton")
    if module is None:
        raise ValueError(f"{op} cannot be tuned: {reason}")
    if shape.case.arguments is None:
        raise ValueError(f"{op} cannot be tuned: its case names no arguments")
    arguments = shape.case.arguments(shape.case.inputs(device))
    forward = functools.partial(module.forward, *arguments)
    if not shape.backward:
        return lambda: _tuple(forward())
    outs = _tuple(forward())
    generator = torch.Generator(device).manual_seed(1)

    def gradient(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)

    given = backward_arguments(op, outs, arguments, gradient)
    return lambda: _tuple(module.backward(*given))


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def _measure(
    op: str, configuration: dict[str, int], call: Callable[[], tuple[Tensor, ...]], expected: Any, clock: Clock
) -> dict[str, Any]:
    """{"median_s": ...}, or {"error": ...} if it fails or computes something else."""
    with trial(op, configuration):
        try:
            found = call()
        except Exception as error:
            # too many registers, too much shared memory, a block the kernel cannot take: not a configuration
            return {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        for e, f in zip(expected, found, strict=True):
            if not e.is_floating_point():
                # scores formed in another order may turn a few choices, and no more
                turned = int((e != f).sum())
                if turned > e.numel() // 1000:
                    return {"error": f"another result: {turned} of {e.numel()} ids differ"}
                continue
            allowed = 8 * torch.finfo(e.dtype).eps * float(e[e.isfinite()].abs().max()) if e.numel() else 0.0
            distance = (e - f)[e.isfinite()].abs().float()
            if distance.numel() and not float(distance.max()) <= allowed:
                return {"error": f"another result: differs by {float(distance.max()):.2e}, allowed {allowed:.2e}"}
        call()
        return {"median_s": statistics.median(clock.seconds(call) for _ in range(ROUNDS))}


def neighbours(configuration: dict[str, int]) -> Iterator[dict[str, int]]:
    """Configurations one step away: of one value, or of a block and the warps that share it, which stay as busy."""
    for name, value in configuration.items():
        for other in steps(name, value):
            yield {**configuration, name: other}
    warps = configuration.get("num_warps", 0)
    for name in [n for n in configuration if "BLOCK" in n]:
        for other in steps(name, configuration[name]):
            shared = warps * other // configuration[name]
            if shared in WARPS:
                yield {**configuration, name: other, "num_warps": shared}


def steps(name: str, value: int) -> list[int]:
    """Values next to ``value``: blocks and other counts (tiles per program) halved and doubled, stages one step."""
    if name == "num_warps":
        at = WARPS.index(value)
        return [WARPS[i] for i in (at - 1, at + 1) if 0 <= i < len(WARPS)]
    if name == "num_stages":
        return [v for v in (value - 1, value + 1) if STAGES[0] <= v <= STAGES[1]]
    if name == "TMA":
        return [1 - value]
    low, high = BLOCKS if "BLOCK" in name else COUNTS
    return [v for v in (value // 2, value * 2) if low <= v <= high]


def entry_of(shape: Shape, found: dict[str, Any], device: torch.device, both: bool = True) -> Entry:
    """The entry to write, with its history; ``both``: what one half precision has given serves the other too."""
    head_dim, segment_len = shape.key
    now = 1e6 * found["median_s"]
    return Entry(
        op=shape.op,
        arch=architecture(device),
        head_dim=head_dim,
        segment_len=segment_len,
        dtypes=tuple(sorted(HALF)) if both and shape.dtype in HALF else (shape.dtype,),
        configuration=found["configuration"],
        measured={
            "gpu": device_name(device),
            "when": time.strftime("%Y-%m-%d", time.gmtime()),
            "median_us": round(now, 2),
            "shape": shape.case.shape,
            "dtype": shape.dtype,
            "torch": torch.__version__,
            "triton": triton_version(),
        },
        why=f"fastest of {len(found['tried'])} candidates reached from {json.dumps(found['started_from'])}, "
        f"which took {1e6 * found['started_s']:.2f} us",
    )


def merged(entries: list[Entry], new: Entry) -> list[Entry]:
    """The table with one entry replaced, or added behind those of its architecture."""

    def key(e: Entry) -> tuple[Any, ...]:
        return e.arch, e.head_dim, e.segment_len

    found: list[Entry] = []
    for e in entries:
        if key(e) == key(new) and set(e.dtypes) & set(new.dtypes):
            rest = tuple(d for d in e.dtypes if d not in new.dtypes)
            if rest:
                found.append(dataclasses.replace(e, dtypes=rest))
            continue
        found.append(e)
    at = max((i for i, e in enumerate(found) if e.arch == new.arch), default=len(found) - 1)
    return [*found[: at + 1], new, *found[at + 1 :]]
