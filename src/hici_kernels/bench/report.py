"""The printed tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from . import decode


def show_machine(console: Console, machine: dict[str, Any], ceilings: dict[str, Any]) -> None:
    cpu = machine["cpu"]
    console.print(
        f"{cpu['model']}, {cpu['cores']} cores, {machine['threads']} threads; torch {machine['torch']}, Python "
        f"{machine['python']}; load {machine['load_average']}; GPUs: {machine['gpus'] or 'none'}",
        markup=False,
    )
    show_ceilings(console, ceilings, "ceilings of this run")


def show_ceilings(console: Console, ceilings: dict[str, Any], title: str) -> None:
    rates = ", ".join(f"{k.removeprefix('torch.')} {v / 1e9:.0f} GFLOP/s" for k, v in ceilings["matmul_flops"].items())
    copy = ceilings["copy_bytes_per_s"] / 1e9
    console.print(f"{title}: torch matmul {rates}; copy {copy:.1f} GB/s (read + written)", markup=False)
    if ceilings.get("path") is None:
        console.print("no native library: no loops of its own", markup=False)
        return
    products = ceilings["bfloat16_products"]
    tiles = f"{ceilings['bfloat16_flops'] / 1e9:.0f} GFLOP/s ({products})" if products else "none on this path"
    console.print(
        f"native loops, path {ceilings['path']}: float32 multiply-adds {ceilings['fma_flops'] / 1e9:.0f} GFLOP/s; "
        f"bfloat16 products {tiles}; exp {ceilings['exp_per_s'] / 1e9:.1f} G/s; "
        f"read {ceilings['read_bytes_per_s'] / 1e9:.1f} GB/s",
        markup=False,
    )


def show_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """One table per case; a side that failed its check shows its error and no speed."""
    for row in rows:
        title = f"{row['op']} · {row['case']} · {row['dtype']} · {row['direction']}\n{row['shape']}"
        title += f"\n{row['flops'] / 1e9:.3g} GFLOP, {row['bytes'] / 1e6:.3g} MB at least"
        if row["exps"]:
            title += f", {row['exps'] / 1e9:.3g} G exponentials"
        if row["checked"] != "everything":
            title += f"\nchecked: {row['checked']}"
        if row.get("steady_products_per_s"):
            title += f"\nproducts between the calls: {row['steady_products_per_s'] / 1e9:.0f} GFLOP/s (median)"
        if row["served_by"]:
            title += "\nserved by: " + ", ".join(f"{op} {name}" for op, name in row["served_by"].items())
        against = f"x {row['against']}"
        table = Table("side", "error", "ms", "spread ms", "n", "GFLOP/s", "% roof", against, "peak MB", title=title)
        for name, s in row["sides"].items():
            if "median_s" not in s:
                table.add_row(name, _wrong(s), *[""] * 7)
                continue
            other = s.get("other_work", False)
            peak = s["peak_bytes"] if s["peak_bytes"] is not None else s.get("resident_bytes")
            table.add_row(
                name,
                "not compared" if other else f"{s['error_max']:.1e}",
                f"{s['median_s'] * 1e3:.3f}",
                f"{s['fastest_s'] * 1e3:.3f} to {s['slowest_s'] * 1e3:.3f}",
                str(s["rounds"]),
                "-" if other else f"{s['flops_per_s'] / 1e9:.1f}",
                "-" if other else f"{100 * roof(s):.1f}",
                f"{s['speedup']:.2f}" if "speedup" in s else "-",
                "-" if peak is None else f"{peak / 1e6:.1f}",
            )
        console.print(table, markup=False)
        for name, s in row["sides"].items():
            if s.get("note"):
                console.print(f"{name}: {s['note']}", markup=False)


def _wrong(side: dict[str, Any]) -> str:
    if "error" in side:
        return str(side["error"])
    return f"WRONG: error {side['error_max']:.2e}, allowed {side['error_allowed']:.2e}"


def roof(side: dict[str, Any]) -> float:
    """Share of the roofline; of the rate of products where bytes are not counted (backward)."""
    return float(side.get("roofline_share", side["product_share"]))


def show_decode(console: Console, rows: list[dict[str, Any]]) -> None:
    """Microseconds a call, ours / PyTorch, by queries and cached keys; then every size that is slower."""
    kinds = list(dict.fromkeys((r["dtype"], r["slots"]) for r in rows))
    for dtype, slots in kinds:
        of = [r for r in rows if (r["dtype"], r["slots"]) == (dtype, slots)]
        queries = sorted({r["queries"] for r in of})
        beside = "torch.cat of slots and keys, SDPA" if slots else "SDPA"
        title = f"decode · {dtype} · {'12' if slots else 'no'} slots\nmicroseconds a call, ours / {beside}"
        table = Table("cached keys", *(f"S {s}" for s in queries), title=title)
        for cached in sorted({r["cached"] for r in of}):
            cells = {r["queries"]: _cell(r) for r in of if r["cached"] == cached}
            table.add_row(str(cached), *(cells.get(s, "") for s in queries))
        console.print(table, markup=False)
    for row in decode.longest(rows):
        for name, s in row["sides"].items():
            if "bytes_per_s" in s:
                share = "" if s["read_share"] is None else f", {100 * s['read_share']:.0f} % of read bandwidth"
                console.print(f"{decode.size_of(row)}: {name} {s['bytes_per_s'] / 1e9:.1f} GB/s{share}", markup=False)
    if not rows:
        return
    lost = decode.losses(rows)
    console.print(f"sizes where PyTorch is faster: {len(lost)} of {len(rows)}", markup=False)
    for row in lost:
        console.print(f"  {decode.size_of(row)}: {_cell(row)} us, {row['speedup']:.2f} x", markup=False)


def _cell(row: dict[str, Any]) -> str:
    ours, theirs = row["sides"][decode.OURS], row["sides"][decode.PLAIN]
    left = f"{ours['median_s'] * 1e6:.1f}" if "median_s" in ours else "WRONG" if ours["correct"] is False else "-"
    mark = " (slower)" if row.get("speedup", 1.0) < 1.0 else ""
    return f"{left} / {theirs['median_s'] * 1e6:.1f}{mark}"


def show_goals(console: Console, found: list[dict[str, Any]]) -> None:
    """Every goal with its number."""
    table = Table("goal", "measured", "needed", "aim", "verdict", "note", title="goals of the CPU kernels")
    for g in found:
        sign = "<= " if g["at_most"] else ">= "
        table.add_row(
            g["goal"],
            _amount(g["value"], g["unit"]) or "-",
            sign + _amount(g["needed"], g["unit"]) if g["needed"] is not None else "",
            _amount(g["aim"], g["unit"]),
            g["verdict"],
            g["note"],
        )
    console.print(table, markup=False)


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.0f} {unit}" if unit.startswith("of ") else f"{value:.2f} {unit}"


def timed(rows: list[dict[str, Any]], decoded: list[dict[str, Any]], sides: list[str]) -> bool:
    """Whether any of the implementations asked for has got a time."""
    return any("median_s" in row["sides"].get(name, {}) for row in rows for name in sides) or any(
        "median_s" in row["sides"][decode.OURS] for row in decoded
    )


def failures(rows: list[dict[str, Any]], decoded: list[dict[str, Any]] | None = None) -> list[str]:
    """Sides whose result was wrong."""
    wrong = [
        f"{row['op']} {row['case']} {row['dtype']} {row['direction']}: {name}"
        for row in rows
        for name, side in row["sides"].items()
        if side["correct"] is False
    ]
    return wrong + [
        f"decode: {decode.size_of(r)}" for r in decoded or [] if r["sides"][decode.OURS]["correct"] is False
    ]
