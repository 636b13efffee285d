"""Results as a table, as JSON and as a chart (PNG)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import _outputs

_COLUMNS = {
    "perplexity": ("length", "protocol", "loss", "loss_se", "perplexity", "windows", "valid"),
    "topics": ("topics", "cases", "accuracy"),
    "passkey": (),
}


def statement(row: dict[str, Any]) -> str:
    """Method, mode, leak or none, density, seed, in one line."""
    mode = f", mode {row['mode']}" if row.get("mode") else ""
    leak = row["leak"]
    said = f"LEAKS (logits move at least {leak['furthest']} tokens early)" if leak["leaks"] else "no leak"
    return (
        f"{row['model']}: {row['method']}{mode}, {row['attention']} attention; {said}; density {row['density']:.3f} "
        f"at {row['length']} tokens; seed {row['seed']}"
    )


def show(console: Any, result: dict[str, Any]) -> None:
    """The statements, then the numbers."""
    from rich.table import Table

    for line in dict.fromkeys(statement(r) for r in result["rows"]):
        console.print(line, markup=False, soft_wrap=True)
    if result["task"] == "passkey":
        console.print("passkey, accuracy by depth of the key")
        console.print(_grid(result["cells"]))
        return
    columns = _COLUMNS.get(result["task"], ("task", "metric", "value"))
    table = Table(title=result["task"])
    for c in columns:
        table.add_column(c)
    for row in result["rows"]:
        table.add_row(*(_cell(row.get(c)) for c in columns))
    console.print(table)


def _grid(cells: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    depths = sorted({c["depth"] for c in cells})
    table = Table()
    table.add_column("length")
    for d in depths:
        table.add_column(f"{100 * d:.0f} %")
    for length in sorted({c["length"] for c in cells}):
        at = {c["depth"]: c["accuracy"] for c in cells if c["length"] == length}
        table.add_row(str(length), *(f"{at[d]:.2f}" for d in depths))
    return table


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def write_json(result: dict[str, Any], path: Path) -> None:
    """The result with the versions it was made with."""
    _outputs.write_json(path, {**result, "torch": torch.__version__, "threads": torch.get_num_threads()})


def write_chart(result: dict[str, Any], path: Path) -> None:
    """Passkey: a heat map. Perplexity: loss over length. Others: bars."""
    figure = _outputs.figure(8, 4.8)
    ax = figure.subplots()
    rows = result["rows"]
    if result["task"] == "passkey":
        cells = result["cells"]
        lengths, depths = sorted({c["length"] for c in cells}), sorted({c["depth"] for c in cells})
        at = {(c["length"], c["depth"]): c["accuracy"] for c in cells}
        grid = [[at[n, d] for n in lengths] for d in depths]
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        ax.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        ax.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
        ax.set(xlabel="prompt length, tokens", ylabel="depth of the key")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
        figure.colorbar(image, label="accuracy")
    elif result["task"] == "perplexity":
        for protocol in dict.fromkeys(r["protocol"] for r in rows):
            mine = [r for r in rows if r["protocol"] == protocol]
            label = protocol if all(r["valid"] for r in mine) else f"{protocol} (leaks: no perplexity)"
            errors = [r["loss_se"] or 0.0 for r in mine]
            ax.errorbar(
                [r["length"] for r in mine], [r["loss"] for r in mine], errors, marker="o", capsize=3, label=label
            )
        ax.set_xscale("log", base=2)
        ax.set(xlabel="context length, tokens", ylabel="loss, nats per token; whisker = standard error")
        ax.legend()
        ax.grid(alpha=0.3)
    else:
        key = "accuracy" if result["task"] == "topics" else "value"
        names = [str(r.get("topics") or f"{r['task']} {r['metric']}") for r in rows]
        ax.barh(range(len(rows)), [r[key] for r in rows])
        ax.set_yticks(range(len(rows)), names)
        ax.set_xlabel(key if result["task"] != "topics" else "accuracy, by number of topics")
    ax.set_title("\n".join(dict.fromkeys(statement(r) for r in rows[:2])), fontsize=7, loc="left")
    _outputs.save_chart(figure, path, dpi=120)
