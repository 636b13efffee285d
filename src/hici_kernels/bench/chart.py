"""Bars of time per case, one per side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import roof


def require_matplotlib() -> None:
    """ValueError naming the extra, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--chart needs matplotlib: pip install 'hici-kernels[charts]'") from error


def write(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """A PNG: median milliseconds with the whole spread, and the share of the roofline as text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    heights = [sum("median_s" in s for s in row["sides"].values()) for row in rows]
    figure = Figure(figsize=(11, 1.6 + 0.42 * sum(heights) + 0.55 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[h + 1 for h in heights])[:, 0]
    for ax, row in zip(axes, rows, strict=True):
        sides = [(n, s) for n, s in row["sides"].items() if "median_s" in s]
        for y, (name, s) in enumerate(reversed(sides)):
            ms, low, high = (1e3 * s[k] for k in ("median_s", "fastest_s", "slowest_s"))
            ax.barh(y, ms, color=f"C{names.index(name) % 10}", xerr=[[ms - low], [high - ms]], ecolor="0.25", capsize=3)
            note = "other work" if s.get("other_work") else f"{100 * roof(s):.2g} % of roof"
            ax.text(high, y, f"  {ms:.3g} ms, {note}", va="center", fontsize=9)
        ax.set_yticks(range(len(sides)), [n for n, _ in reversed(sides)], fontsize=9)
        ax.set_title(f"{row['op']}, {row['case']}, {row['dtype']}, {row['direction']}", fontsize=10, loc="left")
        ax.margins(x=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds, median; whisker = fastest to slowest")
    figure.suptitle(f"{machine['cpu']['model']}, {machine['threads']} threads, torch {machine['torch']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
