"""The printed table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show_machine(console: Console, machine: dict[str, Any], ceilings: dict[str, Any]) -> None:
    cpu = machine["cpu"]
    console.print(
        f"{cpu['model']}, {cpu['cores']} cores, {machine['threads']} threads; torch {machine['torch']}, Python "
        f"{machine['python']}; load {machine['load_average']}; GPUs: {machine['gpus'] or 'none'}",
        markup=False,
    )
    rates = ", ".join(f"{k.removeprefix('torch.')} {v / 1e9:.0f} GFLOP/s" for k, v in ceilings["matmul_flops"].items())
    copy = ceilings["copy_bytes_per_s"] / 1e9
    console.print(f"ceilings of this run: matmul {rates}; copy {copy:.1f} GB/s (read + written)")


def show_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """One table per case; a side that failed its check shows its error and no speed."""
    for row in rows:
        title = f"{row['op']} · {row['case']} · {row['dtype']} · {row['direction']}\n{row['shape']}"
        title += f"\n{row['flops'] / 1e9:.3g} GFLOP, {row['bytes'] / 1e6:.3g} MB at least"
        table = Table("side", "error", "ms", "spread ms", "GFLOP/s", "% roof", "x plain", "peak MB", title=title)
        for name, s in row["sides"].items():
            if "median_s" not in s:
                reason = s.get("error") or f"WRONG: error {s['error_max']:.2e}, allowed {s['error_allowed']:.2e}"
                table.add_row(name, reason, *[""] * 6)
                continue
            other = s.get("other_work", False)
            table.add_row(
                name,
                "other work" if other else f"{s['error_max']:.1e}",
                f"{s['median_s'] * 1e3:.3f}",
                f"{s['fastest_s'] * 1e3:.3f} to {s['slowest_s'] * 1e3:.3f}",
                "-" if other else f"{s['flops_per_s'] / 1e9:.1f}",
                "-" if other else f"{100 * roof(s):.1f}",
                f"{s['speedup_over_plain']:.2f}",
                "-" if s["peak_bytes"] is None else f"{s['peak_bytes'] / 1e6:.1f}",
            )
        console.print(table, markup=False)


def roof(side: dict[str, Any]) -> float:
    """Share of the roofline; of the matmul rate where bytes are not counted (backward)."""
    return float(side.get("roofline_share", side["matmul_share"]))


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Sides whose result was wrong."""
    return [
        f"{row['op']} {row['case']} {row['dtype']} {row['direction']}: {name}"
        for row in rows
        for name, side in row["sides"].items()
        if side["correct"] is False
    ]
