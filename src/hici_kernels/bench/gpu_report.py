"""What a GPU run prints and draws."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import _outputs


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def show_machine(console: Console, where: dict[str, Any]) -> None:
    console.print(
        f"{where['device']}; torch {where['torch']}, triton {where['triton']}, revision {where['revision']}, "
        f"{where['time']}",
        markup=False,
    )


def show_checks(console: Console, records: list[dict[str, Any]]) -> None:
    """How many were right, and every one that was not."""
    for op, impl in dict.fromkeys((r["op"], r["impl"]) for r in records):
        own = [r for r in records if (r["op"], r["impl"]) == (op, impl)]
        right = sum(r["correct"] is True for r in own)
        refused = sum(r["correct"] is None for r in own)
        console.print(f"{op}, {impl}: {right} of {len(own)} checks right, {refused} not served", markup=False)
        for r in own:
            if r["correct"] is False:
                reason = r.get("error") or (
                    f"error {r['error_max']:.2e}, allowed {r['error_allowed']:.2e}; in the median of {r['draws']} "
                    f"draws {r['usual']:.2g} of the budget"
                )
                console.print(f"  WRONG: {r['case']} {r['dtype']}: {reason}", markup=False)


def show_ceilings(console: Console, found: dict[str, Any]) -> None:
    rates = ", ".join(f"{k.removeprefix('torch.')} {v / 1e12:.0f} TFLOP/s" for k, v in found["matmul_flops"].items())
    console.print(
        f"ceilings of this run: matmul of {found['matmul_size']} {rates}; copy "
        f"{found['copy_bytes_per_s'] / 1e9:.0f} GB/s (read + written)"
    )


def show_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """One table per case and direction; a side without a speed says why."""
    for row in rows:
        title = f"{row['op']} · {row['case']} · {row['dtype']} · {row['direction']}\n{row['shape']}"
        title += f"\n{row['flops'] / 1e9:.3g} GFLOP, {row['bytes'] / 1e6:.3g} MB at least"
        table = Table("side", "ms", "spread ms", "TFLOP/s", "% matmul", "GB/s", "% copy", "host us", title=title)
        for name, s in row["sides"].items():
            if "median_s" not in s:
                wrong = f"WRONG: differs by {s['difference']:.2e}" if "difference" in s else ""
                table.add_row(name, wrong or s.get("error", ""), *[""] * 6)
                continue
            table.add_row(
                name,
                f"{s['median_s'] * 1e3:.3f}",
                f"{s['fastest_s'] * 1e3:.3f} to {s['slowest_s'] * 1e3:.3f}",
                f"{s['flops_per_s'] / 1e12:.1f}",
                f"{100 * s['matmul_share']:.1f}",
                f"{s['bytes_per_s'] / 1e9:.0f}",
                f"{100 * s['copy_share']:.1f}",
                f"{s['host_s'] * 1e6:.0f}",
            )
        console.print(table, markup=False)


def write_chart(rows: list[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    """A PNG: TFLOP/s of attention, GB/s of the others, one bar per side, the share of the ceiling as text."""
    shown = [(row, [(n, s) for n, s in row["sides"].items() if "median_s" in s]) for row in rows]
    shown = [(row, sides) for row, sides in shown if sides]
    names = list(dict.fromkeys(n for _, sides in shown for n, _ in sides))
    heights = [len(sides) + 1 for _, sides in shown] or [1]
    figure = _outputs.figure(11, 1.4 + 0.34 * sum(heights))
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (row, sides) in zip(axes, shown, strict=False):
        bound = "flops" if row["op"] == "attention" else "bytes"
        unit, share, ceiling = (1e12, "matmul_share", "matmul") if bound == "flops" else (1e9, "copy_share", "copy")
        for y, (name, s) in enumerate(reversed(sides)):
            rate = s[f"{bound}_per_s"] / unit
            ax.barh(y, rate, color=f"C{names.index(name) % 10}")
            less = "" if s["same_work"] else ", less work"
            text = f"  {rate:.4g}, {100 * s[share]:.3g} % of {ceiling}, {s['median_s'] * 1e3:.4g} ms{less}"
            ax.text(rate, y, text, va="center", fontsize=8)
        ax.set_yticks(range(len(sides)), [n for n, _ in reversed(sides)], fontsize=8)
        title = f"{row['op']}, {row['case']}, {row['dtype']}, {row['direction']}"
        ax.set_title(f"{title} ({'TFLOP/s' if bound == 'flops' else 'GB/s'})", fontsize=9, loc="left")
        ax.margins(x=0.35)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{where['device']}, torch {where['torch']}, triton {where['triton']}, {where['time']}", fontsize=10
    )
    _outputs.save_chart(figure, path)
