"""Files that a command writes its result to: checked before its work, so that no work is lost for want of a folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any, TypeVar

from . import _optional

T = TypeVar("T")


def prepare(json_path: Path | None, chart_path: Path | None = None, *, kept: Iterable[Path | None] = ()) -> None:
    """Make the folders of the files named by --json and --chart.

    Args:
        kept: other files of the command, read or written, which these must not replace.

    Raises:
        ValueError: naming the option, where its file could not be written, or charts not be drawn.
    """
    taken = {path.resolve() for path in kept if path is not None}
    for option, path in (("--json", json_path), ("--chart", chart_path)):
        if path is None:
            continue
        if path.resolve() in taken:
            raise ValueError(
                f"{option} must be a file of its own, got {str(path)!r}, which the command has another use for"
            )
        taken.add(path.resolve())
        if path.is_dir():
            raise ValueError(f"{option} must be a file, got the folder {str(path)!r}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{option} must be in a folder that can be made, got {str(path)!r}: {error}") from error
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{option} must be a file that can be written, got {str(path)!r}")
    if chart_path is not None:
        _check_charts(chart_path)


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    """``content`` as text that ends with a line, in one piece; numbers that JSON has no word for become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(content), indent=indent, allow_nan=False) + "\n"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(found)
    return found


def save_chart(drawn: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure to exactly this file: matplotlib adds an ending to a name without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=dpi, format=_format(path))


def progress(items: Iterable[T], text: str, total: int | None = None) -> Iterable[T]:
    """``items``, with a bar on stderr while they last."""
    from rich.console import Console
    from rich.progress import track

    count = len(items) if total is None and isinstance(items, Sized) else total
    return track(items, text, total=count, console=Console(stderr=True), transient=True)


def _format(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def _check_charts(path: Path) -> None:
    reason = _optional.missing("matplotlib", "charts")
    if reason is not None:
        raise ValueError(f"--chart needs a package: {reason}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if _format(path) not in kinds:
        raise ValueError(f"--chart must end with .png or one of {', '.join(sorted(kinds))}, got {str(path)!r}")
