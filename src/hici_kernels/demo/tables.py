"""The demo's printed tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ..config import HGAConfig
from .hga_part import Row
from .hici_part import Timing

__all__ = ["budget_table", "hga_table", "hici_table"]


def _size(count: float | None) -> str:
    """Bytes in MB (10^6)."""
    return "n/a" if count is None else f"{count / 1e6:.2f}"


def _milliseconds(seconds: float, spread: float) -> str:
    return f"{1e3 * seconds:.3g} ±{1e3 * spread / 2:.2g}"


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )


def budget_table(budgets: Sequence[tuple[str, HGAConfig]]) -> Table:
    """What the names of the budgets mean, in bytes (= tokens of this model) per query and head."""
    table = _table("Budgets: what one query may read (first and last always, the picked by score)", "")
    for heading in ("budget", "first", "last", "picks", "opens", "at most"):
        table.add_column(heading, justify="left" if heading == "budget" else "right")
    for name, c in budgets:
        most = (c.keep_first + c.keep_last + 1) * c.chunk_size + c.topk_groups * c.group_size
        table.add_row(
            name,
            f"{c.keep_first * c.chunk_size} B",
            f"{c.keep_last * c.chunk_size} B + own",
            f"{c.topk_chunks} chunks of {c.chunk_size} B" if c.topk_chunks else "nothing",
            f"{c.topk_groups} groups of {c.group_size} B" if c.topk_groups else "nothing",
            f"{most:,} B",
        )
    return table


def hga_table(rows: Sequence[Row], targets: int, itemsize: int) -> Table:
    """One section per context."""
    caption = (
        f"loss: nats per byte on the last {targets:,} bytes of every window (lower is better); gap: that loss minus "
        "dense, ± standard error; whole: the gap over the whole window; pairs: (query, key) pairs computed, of those "
        "causal attention has; choose: routing dot products, in the same unit; pass: one reading of the window, all "
        f"layers; KV read: bytes of cached keys and values ({itemsize} bytes each number, all layers) that the step "
        "after the last byte touches."
    )
    windows = rows[0].windows
    title = f"Reading text the model has not seen ({'one window' if windows == 1 else f'means over {windows} windows'})"
    table = _table(title, caption)
    for heading in ("context", "attention"):
        table.add_column(heading, justify="right" if heading == "context" else "left", no_wrap=True)
    for heading in ("loss\nnats/B", "gap\nnats/B", "whole\nnats/B", "pairs\n%", "choose\n%", "pass\ns", "KV read\nMB"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and row.context != previous:
            table.add_section()
        dense = row.config is None
        table.add_row(
            f"{row.context:,} B" if row.context != previous else "",
            f"[bold]{row.attention}[/bold]" if dense else row.attention,
            f"{row.loss:.4f}",
            "0" if dense else f"{row.gap:+.4f} ±{row.gap_error:.4f}",
            "0" if dense else f"{row.gap_all:+.4f}",
            f"{100 * row.density:.1f}",
            "" if dense else f"{100 * row.scored:.1f}",
            f"{row.seconds:.2f}",
            _size(row.step),
        )
        previous = row.context
    return table


def hici_table(rows: Sequence[Timing], runs: int) -> Table:
    """Ours beside plain PyTorch."""
    caption = (
        "error: largest difference from the float64 reference of the op; allowed: max(2 x plain PyTorch's own error, "
        f"2 eps max|reference|); time: median of {runs} rounds of both sides in turn, ± half the range; memory: peak "
        "above the inputs, from torch's allocator."
    )
    title = (
        f"HiCI's ops on {rows[0].length:,} hidden states in segments of {rows[0].segment_len:,}, beside plain PyTorch"
    )
    table = _table(title, caption)
    table.add_column("op", no_wrap=True)
    table.add_column("served by", no_wrap=True)
    for heading in ("error", "allowed", "ours\nms", "plain\nms", "ours\nMB", "plain\nMB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.op,
            row.impl,
            f"{row.error:.1e}" if row.passed else f"[bold red]{row.error:.1e}[/bold red]",
            f"{row.allowed:.1e}",
            _milliseconds(row.seconds, row.spread),
            _milliseconds(row.plain_seconds, row.plain_spread),
            _size(row.memory),
            _size(row.plain_memory),
        )
    return table
