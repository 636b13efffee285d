"""The demo's two pictures. Importing this module needs matplotlib (the extra ``charts``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from ..config import HGAConfig
from .counting import regions
from .hga_part import Row

__all__ = ["draw_gaps", "draw_routes", "opened_share", "pick_picture"]

_LINES = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5a9e")
_MARKERS, _GREY = ("o", "s", "D", "^", "v"), "#444444"
_SINK, _WINDOW, _ACTIVE = "#e3a23b", "#7fb8d6", "#2b4c7e"
_FUTURE = "#ffffff"
# Chunks beyond which a pick counts as far; nearer ones follow the local window in almost every head.
_FAR = 8


def _figure(width: float, height: float) -> Figure:
    # Figure and canvas by hand: pyplot would choose a window system and keep every figure alive.
    figure = Figure(figsize=(width, height), dpi=130)
    FigureCanvasAgg(figure)
    return figure


def draw_gaps(rows: Sequence[Row], targets: int, path: Path) -> None:
    """Loss gap to dense against the share of pairs computed, one line per context."""
    figure = _figure(9, 6.4)
    ax = figure.add_axes((0.1, 0.22, 0.87, 0.665))
    contexts = sorted({r.context for r in rows})
    routed = [r for r in rows if r.config is not None]
    names = list(dict.fromkeys(r.attention for r in routed))
    markers = dict(zip(names, _MARKERS * len(names), strict=False))
    lines: list[Line2D] = []
    points: list[Line2D] = []
    for colour, context in zip(_LINES * len(contexts), contexts, strict=False):
        mine = [r for r in routed if r.context == context]
        picking = sorted((r for r in mine if r.config and r.config.topk_groups), key=lambda r: r.density)
        ax.plot([100 * r.density for r in picking], [r.gap for r in picking], color=colour, lw=2)
        for r in mine:
            ax.errorbar(100 * r.density, r.gap, r.gap_error, color=colour, marker=markers[r.attention], ms=8, mew=1.5,
                        mfc=colour if r in picking else "white", capsize=3, elinewidth=1)  # fmt: skip
        lines.append(Line2D([], [], color=colour, lw=2, label=f"{context:,} bytes of context"))
    for name in names:
        picks = any(r.attention == name and r.config and r.config.topk_groups for r in routed)
        label = f"budget “{name}”" if picks else f"“{name}”: nothing is picked"
        fill = _GREY if picks else "white"
        points.append(Line2D([], [], ls="", marker=markers[name], color=_GREY, mfc=fill, ms=8, mew=1.5, label=label))
    ax.axhline(0, color=_GREY, lw=1.2, ls="--")
    ax.annotate("dense attention", (1, 0), (-4, -4), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="top", fontsize=9, color=_GREY)  # fmt: skip
    ax.set_xscale("log")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
    ax.xaxis.set_minor_locator(NullLocator())
    low = min(100 * r.density for r in rows)
    ax.set_xlim(max(t for t in (0.5, *ticks) if t < low), 115)
    ax.set_xlabel("share of causal (query, key) pairs computed (log scale)", fontsize=11)
    ax.set_ylabel("loss minus dense loss, nats per byte", fontsize=11)
    windows = max(r.windows for r in rows)
    plural = "s" if windows > 1 else ""
    ax.set_title("What HGA's savings cost in prediction quality", loc="left", fontsize=14, fontweight="bold", pad=24)
    ax.text(0, 1.02, f"Unseen text, last {targets:,} bytes of {windows} window{plural}; bars: standard error",
            transform=ax.transAxes, fontsize=10, color=_GREY)  # fmt: skip
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    for handles, height in ((lines, 0.105), (points, 0.06)):
        figure.legend(handles=handles, ncols=len(handles), frameon=False, fontsize=10, loc="center",
                      bbox_to_anchor=(0.52, height))  # fmt: skip
    figure.savefig(path)


def opened_share(routes: Tensor, config: HGAConfig) -> Tensor:
    """Share of each chunk's groups that the queries of each chunk opened, mean over its queries, per head.

    Args:
        routes: [S, Hq, Kg] group ids of tokens 0..S-1, unused entries -1.

    Returns:
        [Hq, n, n] float32 in [0, 1], n = S // chunk_size; rows are query chunks, columns key chunks.
    """
    n, heads = routes.shape[0] // config.chunk_size, routes.shape[1]
    ids = routes[: n * config.chunk_size].long().unflatten(0, (n, config.chunk_size))
    chunk = torch.where(ids >= 0, ids // config.groups_per_chunk, n)
    counts = torch.zeros(n, heads, n + 1)
    flat = chunk.permute(0, 2, 1, 3).flatten(2)
    counts.scatter_add_(2, flat, torch.ones(flat.shape))
    return (counts[..., :n] / (config.chunk_size * config.groups_per_chunk)).transpose(0, 1)


def pick_picture(shares: Sequence[Tensor]) -> tuple[int, int, Tensor]:
    """(layer, head, its [n, n] map) of the head that most decidedly picks by content and far away.

    A head that picks by position draws lines parallel to the diagonal and says nothing about the text. With x the
    shares of one such line and its mean m, over all lines at least _FAR chunks away, the head with the largest
        (sum (x - m)^2)^2 / sum x^2
    is taken: much variation along the lines, and little besides.

    Args:
        shares: per layer [Hq, n, n].
    """
    maps = torch.stack(list(shares))
    varied, whole = torch.zeros(maps.shape[:2]), torch.zeros(maps.shape[:2])
    for distance in range(min(_FAR, maps.shape[-1] - 1), maps.shape[-1]):
        line = maps.diagonal(-distance, 2, 3)
        varied += (line - line.mean(-1, keepdim=True)).square().sum(-1)
        whole += line.square().sum(-1)
    score = varied.square() / whole.clamp_min(1e-12)
    layer, head = divmod(int(score.argmax()), maps.shape[1])
    return layer, head, maps[layer, head]


def draw_routes(
    shares: Tensor, config: HGAConfig, *, layer: int, head: int, budget: str, source: str, path: Path
) -> None:
    """Map of what one head read.

    Args:
        shares: [n, n] as :func:`opened_share` gives for one head.
        config: of the routes.
        layer, head: counted from 0, for the title.
    """
    n = shares.shape[0]
    size = config.chunk_size
    own, sinks, local = regions(torch.arange(n) * size, config)
    key = torch.arange(n)
    kind = torch.full((n, n), torch.nan)
    kind[key < sinks[:, None]] = 0
    kind[(key >= local[:, None]) & (key < own[:, None])] = 1
    kind[key == own[:, None]] = 2
    pool = (key >= sinks[:, None]) & (key < local[:, None])

    figure = _figure(9.6, 8.6)
    ax = figure.add_axes((0.085, 0.075, 0.77, 0.77 * 9.6 / 8.6))
    extent = (0, n * size / 1024, n * size / 1024, 0)
    ax.imshow(kind.numpy(), cmap=ListedColormap([_SINK, _WINDOW, _ACTIVE]), vmin=0, vmax=2, extent=extent,
              interpolation="nearest")  # fmt: skip
    picked = torch.where(pool, shares, torch.nan)
    image = ax.imshow(picked.numpy(), cmap="magma_r", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    bar = figure.colorbar(image, cax=figure.add_axes((0.88, 0.2, 0.022, 0.6)))
    bar.set_label("share of the key chunk's groups that was opened\n(mean over the queries of a row)", fontsize=10)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
    ax.set_xlabel(f"key position, KiB of text (one column = one chunk of {size} bytes)", fontsize=11)
    ax.set_ylabel(f"query position, KiB of text (one row = one chunk of {size} bytes)", fontsize=11)
    ax.set_title("Which chunks each query opened", loc="left", fontsize=14, fontweight="bold", pad=26)
    ax.text(0, 1.015, f"layer {layer}, query head {head}, budget “{budget}”: {config.topk_chunks} chunks picked, "
            f"{config.topk_groups} groups opened per query; text: {source}",
            transform=ax.transAxes, fontsize=10, color=_GREY)  # fmt: skip
    ax.legend(
        handles=[
            Patch(color=_SINK, label="sinks: first chunks, always read"),
            Patch(color=_WINDOW, label="window: last chunks, always read"),
            Patch(color=_ACTIVE, label="own chunk, read up to the query"),
            Patch(facecolor=_FUTURE, edgecolor="#bbbbbb", label="the future: never read"),
        ],
        loc="upper right",
        fontsize=10,
        framealpha=1,
    )
    figure.savefig(path)
