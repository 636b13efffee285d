"""The main job of the library: hierarchical attention at work on real text, in one command."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from .. import _outputs
from .hga_part import (
    BUDGETS,
    FULL_LIMIT,
    Budget,
    ContextGain,
    Row,
    context_gains,
    full_budget_difference,
    read_all_dense,
    read_windows,
    rope_of,
    work_of,
)
from .hici_part import Timing, compare, make_inputs, serving
from .lm import ByteLM
from .summary import context_sentences, hga_sentences, hici_sentences
from .tables import budget_table, hga_table, hici_table
from .text import Stream, Window, file_stream, held_out_streams, windows

__all__ = ["CONTEXTS", "CONTEXT_RANGE", "run"]

#: Bytes of context of the default run.
CONTEXTS = (2048, 8192, 16384)
#: Allowed --context: below it no budget bites, above it the model was never trained.
CONTEXT_RANGE = (1024, 16384)
# Bytes whose loss is compared: the end of the window, where the most context lies before them.
_TARGETS = 1024
# No reading is begun later than this, and no window that would end later. It keeps a run under three minutes on two
# cores that are not idle, where the whole first window takes less.
_READING_SECONDS = 130.0
_MOST_WINDOWS = 3
_PICTURE_BUDGET = "quarter"


@dataclass(frozen=True)
class _Plan:
    """What a run reads, in bytes."""

    contexts: tuple[int, ...]
    budgets: tuple[Budget, ...]
    texts: list[Window]
    targets: int
    hici_length: int
    picture: tuple[int, str]
    runs: int


@dataclass(frozen=True)
class _Found:
    """What a run measured.

    Attributes:
        rows, gains: of HGA, and of context.
        routes: per layer [1, S, Hq, Kg] for the picture.
        full: largest difference between HGA with full budgets and dense, in attention outputs and in nats.
        hga_impl: what serves hga_attention.
        timings: of HiCI's ops.
    """

    rows: list[Row]
    gains: list[ContextGain]
    routes: list[Tensor]
    full: tuple[float, float]
    hga_impl: str
    timings: list[Timing]


def run(
    text: Path | None = None,
    context: int | None = None,
    out: Path = Path("hici-demo"),
    json_path: Path | None = None,
    quick: bool = False,
) -> int:
    """Read unseen text densely and with HGA, compare HiCI's ops with plain PyTorch, print tables, write pictures.

    Args:
        text: file to read; None = standard-library packages kept out of the model's training.
        context: bytes before the end of a window, within :data:`CONTEXT_RANGE`; None = all of :data:`CONTEXTS`.
        out: folder for the pictures and, unless json_path is given, the numbers. Made if missing.
        json_path: file for the numbers.
        quick: one short context, one budget, one window.

    Returns:
        0, or 1 if a check failed: HGA with budgets that cover everything against dense attention, or an op of HiCI
        against its float64 reference.

    Raises:
        ValueError: naming the argument, before any work.
    """
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    began = time.perf_counter()
    model = ByteLM.load()
    plan = _plan(model, text, context, quick)
    target = json_path if json_path is not None else out / "demo.json"
    _outputs.prepare(json_path)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be one that can be made, got {str(out)!r}: {error.strerror}") from error
    _outputs.prepare(target)

    _introduce(console, model, plan, text)
    with torch.no_grad():
        found = _measure(console, model, plan)
    rows, full, timings = found.rows, found.full, found.timings

    console.print(budget_table([(b.name, b.config) for b in plan.budgets]))
    itemsize = next(model.parameters()).element_size()
    console.print(hga_table(rows, plan.targets, itemsize))
    read = {(r.context, r.attention) for r in rows}
    missing = [f"{b.name} at {n:,}" for n in plan.contexts for b in plan.budgets if (n, b.name) not in read]
    if missing:
        console.print(f"Left out, because this machine is slow or busy: {', '.join(missing)} bytes.")
    _bullets(console, [*context_sentences(found.gains, plan.targets), *hga_sentences(rows, found.hga_impl)])
    ok = max(full) <= FULL_LIMIT
    console.print(
        f"Check, budgets that cover everything against dense, {min(plan.contexts):,} bytes, all layers: largest "
        f"difference {full[0]:.1e} in attention outputs, {full[1]:.1e} nats in the loss of a byte "
        f"(limit {FULL_LIMIT:.0e}): {_verdict(ok)}\n"
    )
    console.print(hici_table(timings, plan.runs))
    _bullets(console, hici_sentences(timings))
    wrong = [t.op for t in timings if not t.passed]
    console.print(f"Check, HiCI's ops against their float64 reference: {_verdict(not wrong, ', '.join(wrong))}\n")

    files = _pictures(console, plan, rows, found.routes, out)
    body = _report(model, plan, text, found, time.perf_counter() - began)
    _outputs.write_json(target, body, indent=1)
    console.print(f"{body['seconds']:.0f} s in all. Written:")
    for file in (*files, target):
        console.print(f"  {escape(str(file))}", soft_wrap=True)
    console.print("Next:\n  hici demo --text YOUR_FILE     the same on your own text (16 KiB or more)")
    console.print("  hici info                      which implementation serves each op on this machine")
    return 0 if ok and not wrong else 1


def _plan(model: ByteLM, text: Path | None, context: int | None, quick: bool) -> _Plan:
    if context is not None:
        low, high = CONTEXT_RANGE
        if isinstance(context, bool) or not isinstance(context, int):
            raise ValueError(f"context must be an int, got {context!r}")
        if not low <= context <= high:
            raise ValueError(f"context must be between {low} and {high} bytes (what the model can use), got {context}")
    contexts: tuple[int, ...] = (context,) if context is not None else CONTEXTS[:1] if quick else CONTEXTS
    streams = _streams(model, text)
    longest = max(len(s.data) for s in streams)
    # A short file is read at the contexts it can fill; one that fills none is an error of the window's own.
    contexts = tuple(n for n in contexts if n <= longest) or contexts[:1]
    targets = min(_TARGETS, min(contexts) // 2)
    texts = windows(streams, max(contexts), 1 if quick else _MOST_WINDOWS)
    hici = 8192 if 8192 in contexts else max(contexts)
    budgets = tuple(b for b in BUDGETS if b.name == _PICTURE_BUDGET) if quick else BUDGETS
    return _Plan(
        contexts=contexts,
        budgets=budgets,
        texts=texts,
        targets=targets,
        hici_length=hici - hici % 8,
        picture=(hici, _PICTURE_BUDGET),
        runs=3 if quick else 5,
    )


def _streams(model: ByteLM, text: Path | None) -> list[Stream]:
    if text is not None:
        return [file_stream(text)]
    return held_out_streams(model.record["data"]["held_out"])


def _introduce(console: Console, model: ByteLM, plan: _Plan, text: Path | None) -> None:
    size = sum(p.numel() for p in model.parameters())
    cfg = model.config
    console.print(
        f"Model: {size / 1e6:.1f} million parameters, {cfg.num_hidden_layers} layers, {cfg.num_attention_heads} query "
        f"and {cfg.num_key_value_heads} key/value heads, one byte = one token, trained on Python's standard library."
    )
    if model.record.get("finished") is False:
        console.print(f"Its training was stopped early, after {model.record.get('minutes')} minutes.")
    sources = ", ".join(dict.fromkeys(w.source for w in plan.texts))
    if text is None:
        kept = ", ".join(model.record["data"]["held_out"])
        console.print(f"Text: Python packages it was not trained on ({kept}); windows from: {sources}.")
        trained = model.record.get("python", "")
        if trained.split(".")[:2] != platform.python_version().split(".")[:2]:
            console.print(
                f"Note: it was trained beside Python {trained}; code that moved between packages since may be known."
            )
    else:
        console.print(f"Text: {escape(str(text))}.", soft_wrap=True)
    left_out = [n for n in CONTEXTS if len(plan.contexts) > 1 and n not in plan.contexts]
    if left_out:
        console.print(f"The text is too short for {', '.join(f'{n:,}' for n in left_out)} bytes of context: left out.")
    if len(plan.contexts) > 1:
        console.print("This takes about two minutes on two idle cores.")
    console.print()


def _measure(console: Console, model: ByteLM, plan: _Plan) -> _Found:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    first = plan.texts[0].ids
    # Only a comparison of contexts needs more dense windows than the budgets are read on.
    dense_seconds = _READING_SECONDS / 3 if len(plan.contexts) > 1 else 0.0
    began = time.perf_counter()
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        total = work_of(len(plan.texts), plan.contexts, 0) + work_of(1, plan.contexts, len(plan.budgets))
        task = bar.add_task("checking HGA against dense", total=1.1 * total)

        def advance(what: str, work: float) -> None:
            bar.update(task, description=what, advance=work)

        model.nll(first[:, -256:])  # the first call of a process pays for starting threads
        full = full_budget_difference(model, first[:, -min(plan.contexts) :])
        hga_impl = _hga_impl(model, first[:, -min(plan.contexts) :])
        dense = read_all_dense(model, plan.texts, plan.contexts, seconds=dense_seconds, advance=advance)
        rows, routes = read_windows(
            model,
            plan.texts,
            dense,
            plan.budgets,
            targets=plan.targets,
            seconds=_READING_SECONDS - (time.perf_counter() - began),
            advance=advance,
            keep=plan.picture,
        )
        bar.update(task, completed=total, description="HiCI's ops")
        inputs = make_inputs(model, first[:, -plan.hici_length :], plan.hici_length // 8)
        timings = compare(inputs, plan.runs, lambda what: advance(what, total / 30))
    return _Found(rows, context_gains(dense, plan.targets), routes, full, hga_impl, timings)


def _hga_impl(model: ByteLM, ids: Tensor) -> str:
    """Implementation that serves hga_attention on tensors like the model's."""
    from ..config import HGAConfig
    from ..ops.hga_attention import hga_attention

    q, k, v = model.qkv(ids, 0)
    rope = rope_of(model)
    return serving("hga_attention", lambda name: hga_attention(q, k, v, HGAConfig(), rope=rope, impl=name))


def _verdict(passed: bool, what: str = "") -> str:
    return "[green]ok[/green]" if passed else f"[bold red]FAILED {what}[/bold red]"


def _bullets(console: Console, sentences: Sequence[str]) -> None:
    for sentence in sentences:
        console.print(f"- {escape(sentence)}")
    console.print()


def _pictures(console: Console, plan: _Plan, rows: list[Row], routes: list[Tensor], out: Path) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        console.print(
            "No pictures: matplotlib is missing, pip install 'hici-kernels[charts]' brings it.\n", markup=False
        )
        return []
    from . import charts

    gaps = out / "nats_vs_density.png"
    charts.draw_gaps(rows, plan.targets, gaps)
    if not routes:  # the budget of the picture was left out for time
        return [gaps]
    config = next(b.config for b in plan.budgets if b.name == plan.picture[1])
    shares = [charts.opened_share(r[0], config) for r in routes]
    layer, head, share = charts.pick_picture(shares)
    opened = out / "opened_chunks.png"
    charts.draw_routes(
        share,
        config,
        layer=layer,
        head=head,
        budget=plan.picture[1],
        source=plan.texts[0].source,
        path=opened,
    )
    console.print(
        f"{opened.name} shows layer {layer}, head {head}: vertical marks are passages that many later queries come "
        "back to, lines along the diagonal are picks by distance.\n"
    )
    return [gaps, opened]


def _report(
    model: ByteLM,
    plan: _Plan,
    text: Path | None,
    found: _Found,
    seconds: float,
) -> dict[str, Any]:
    from .. import __version__
    from ..bench.machine import describe

    return {
        "hici_kernels": __version__,
        "machine": describe(),
        "model": {"config": model.config.to_dict(), "training": model.record},
        "text": {
            "file": None if text is None else str(text),
            "windows": [{"source": w.source, "start": w.start} for w in plan.texts[: found.gains[0].windows]],
            "windows_read_with_budgets": found.rows[0].windows,
        },
        "contexts": list(plan.contexts),
        "target_bytes": plan.targets,
        "budgets": {b.name: b.config.to_dict() for b in plan.budgets},
        "full_budget": {
            "context": min(plan.contexts),
            "attention_difference": found.full[0],
            "nats_difference": found.full[1],
            "limit": FULL_LIMIT,
        },
        "hga_served_by": found.hga_impl,
        "dense_by_context": [dataclasses.asdict(g) for g in found.gains],
        "hga": [r.to_dict() for r in found.rows],
        "hici": [t.to_dict() for t in found.timings],
        "seconds": round(seconds, 1),
    }
