"""Bars of time per case, one per side; lines of time per decode-sized call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import _outputs
from . import decode
from .report import roof


def write(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """A PNG: median milliseconds with the whole spread, and the share of the roofline as text."""
    names = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    heights = [sum("median_s" in s for s in row["sides"].values()) for row in rows]
    figure = _outputs.figure(11, 1.6 + 0.42 * sum(heights) + 0.55 * len(rows))
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[h + 1 for h in heights])[:, 0]
    for ax, row in zip(axes, rows, strict=True):
        sides = [(n, s) for n, s in row["sides"].items() if "median_s" in s]
        for y, (name, s) in enumerate(reversed(sides)):
            ms, low, high = (1e3 * s[k] for k in ("median_s", "fastest_s", "slowest_s"))
            ax.barh(y, ms, color=f"C{names.index(name) % 10}", xerr=[[ms - low], [high - ms]], ecolor="0.25", capsize=3)
            note = "not compared" if s.get("other_work") else f"{100 * roof(s):.2g} % of roof"
            ax.text(high, y, f"  {ms:.3g} ms, {note}", va="center", fontsize=9)
        ax.set_yticks(range(len(sides)), [n for n, _ in reversed(sides)], fontsize=9)
        ax.set_title(f"{row['op']}, {row['case']}, {row['dtype']}, {row['direction']}", fontsize=10, loc="left")
        ax.margins(x=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds, median; whisker = fastest to slowest")
    figure.suptitle(_where(machine), fontsize=10)
    _outputs.save_chart(figure, path)


def write_rows(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """A PNG of the suite "hga": milliseconds of every side on a logarithmic axis, with the whole spread."""
    heights = [sum("median_s" in s for s in row["sides"].values()) for row in rows]
    figure = _outputs.figure(11, 1.6 + 0.36 * sum(heights) + 0.55 * len(rows))
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[h + 1 for h in heights])[:, 0]
    for ax, row in zip(axes, rows, strict=True):
        sides = [(n, s) for n, s in row["sides"].items() if "median_s" in s]
        for y, (name, s) in enumerate(reversed(sides)):
            ms, low, high = (1e3 * s[k] for k in ("median_s", "fastest_s", "slowest_s"))
            ours = name.startswith("hici")
            ax.barh(y, ms, color="C0" if ours else "0.7", xerr=[[ms - low], [high - ms]], ecolor="0.25", capsize=3)
            share = f", {100 * s['read_share']:.0f} % of read bandwidth" if s.get("read_share") else ""
            ax.text(high, y, f"  {ms:.3g} ms{share}", va="center", fontsize=9)
        ax.set_xscale("log")
        ax.set_yticks(range(len(sides)), [n for n, _ in reversed(sides)], fontsize=9)
        ax.set_title(row["name"], fontsize=10, loc="left")
        ax.margins(x=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds, median; whisker = fastest to slowest")
    figure.suptitle(_where(machine), fontsize=10)
    _outputs.save_chart(figure, path)


def beside(path: Path, what: str) -> Path:
    """Where a second chart goes: beside the first."""
    return path.with_name(f"{path.stem}-{what}{path.suffix}")


def write_decode(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """A PNG: microseconds a call over cached keys, one panel per dtype and kind, one colour per number of queries."""
    kinds = list(dict.fromkeys((r["dtype"], r["slots"]) for r in rows))
    figure = _outputs.figure(13, 4.6 * -(-len(kinds) // 2))
    panels = figure.subplots(-(-len(kinds) // 2), 2, squeeze=False).flatten()
    for ax, (dtype, slots) in zip(panels, kinds, strict=False):
        of = [r for r in rows if (r["dtype"], r["slots"]) == (dtype, slots)]
        cached = sorted({r["cached"] for r in of})
        for colour, queries in enumerate(sorted({r["queries"] for r in of})):
            mine = sorted((r for r in of if r["queries"] == queries), key=lambda r: r["cached"])
            for side, style in ((decode.OURS, "-o"), (decode.PLAIN, "--")):
                shown = [r for r in mine if "median_s" in r["sides"][side]]
                at = [cached.index(r["cached"]) for r in shown]
                times = [1e6 * r["sides"][side]["median_s"] for r in shown]
                label = f"{queries} queries" if side == decode.OURS else None
                ax.plot(at, times, style, color=f"C{colour}", label=label, markersize=4)
            lost = decode.losses(mine)
            slower = [1e6 * r["sides"][decode.OURS]["median_s"] for r in lost]
            ax.plot([cached.index(r["cached"]) for r in lost], slower, "x", color="black", markersize=9)
        ax.set_yscale("log")
        ax.set_xticks(range(len(cached)), [str(c) for c in cached])
        ax.set_xlabel("cached keys")
        ax.set_ylabel("microseconds a call, median")
        ax.set_title(f"{dtype}, {'with' if slots else 'without'} slots", fontsize=10, loc="left")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    for ax in panels[len(kinds) :]:
        ax.set_axis_off()
    figure.suptitle(f"solid: ours, dashed: PyTorch, cross: ours is slower. {_where(machine)}", fontsize=10)
    _outputs.save_chart(figure, path)


def write_store(stored: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """A PNG of the history on disk: milliseconds of a decode step in memory, on disk and dense; GB/s of reading."""
    figure = _outputs.figure(13, 4.8 * len(stored))
    for (times, rates), found in zip(figure.subplots(len(stored), 2, squeeze=False), stored, strict=True):
        sides = [(f"{s['routes']}, {t}", s[t], i) for s in found["steps"] for i, t in enumerate(("host", "disk"))]
        sides += [(name, s, 2) for name, s in found["dense"].items()]
        for y, (_, s, colour) in enumerate(reversed(sides)):
            ms, low, high = (1e3 * s[k] for k in ("median_s", "fastest_s", "slowest_s"))
            times.barh(y, ms, color=f"C{colour}", xerr=[[ms - low], [high - ms]], ecolor="0.25", capsize=3)
            times.text(high, y, f"  {ms:.3g} ms", va="center", fontsize=9)
        times.set_xscale("log")
        times.set_yticks(range(len(sides)), [name for name, _, _ in reversed(sides)], fontsize=9)
        times.set_xlabel("milliseconds of a decode step of a layer, median; whisker = fastest to slowest")
        times.margins(x=0.3)
        readers = ("bare", "threads", "tier")
        rates.bar(readers, [found["reading"][name]["gb_per_s"] for name in readers])
        rates.set_ylabel("GB/s read at random")
        rates.set_title(found["size"]["text"], fontsize=8, loc="left", wrap=True)
    figure.suptitle(_where(machine), fontsize=10)
    _outputs.save_chart(figure, path)


def _where(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']['model']}, {machine['threads']} threads, torch {machine['torch']}"
