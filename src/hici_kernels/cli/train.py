"""hici train and hici sft."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import typer

from .. import _outputs
from .checkpoints import fields

#: the published fine-tuning differs from continued pre-training in this
SFT = {"hici_lr": 1e-4}


def run(
    kind: str,
    model: Path,
    data: list[Path],
    out: Path,
    engine: str,
    recipe_path: Path | None,
    settings: list[str],
    adapter: Path | None,
    resume: bool,
    report_to: str,
    json_path: Path | None,
    chart_path: Path | None,
) -> None:
    """Build the recipe from defaults, file and options, and train."""
    from ..train import Recipe
    from ..train import run as train

    values: dict[str, Any] = dict(SFT) if kind == "answers" else {}
    if recipe_path is not None:
        try:
            content = json.loads(recipe_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{recipe_path} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{recipe_path} must hold a JSON object, got {type(content).__name__}")
        values |= {k: v for k, v in content.items() if k not in ("kind", "data", "model", "checkpoint")}
    values |= fields(settings)
    made = Recipe.from_dict(values)
    _outputs.prepare(json_path, chart_path, kept=(*data, recipe_path))
    done = train(
        model, data, out, made, kind=kind, engine=engine, checkpoint=adapter, resume=resume,
        report_to=report_to,
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")):
        return
    typer.echo(f"{done['step']} steps, loss {done['loss']}; metrics in {done['metrics']}")
    typer.echo(f"checkpoint in {done['result']}: hici merge {model} {done['result']} OUT")
    if json_path is not None:
        _outputs.write_json(json_path, done)
    if chart_path is not None:
        write_chart(Path(done["metrics"]), chart_path)


def write_chart(metrics: Path, path: Path) -> None:
    """A PNG of the loss over the steps of a run, those before it was resumed included."""
    entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    logged = [entry for entry in entries if "loss" in entry]
    figure = _outputs.figure(8, 4.8)
    ax = figure.subplots()
    ax.plot([entry["step"] for entry in logged], [entry["loss"] for entry in logged], marker="o", markersize=3)
    ax.set(xlabel="step", ylabel="loss, nats per token")
    ax.set_title(str(metrics), fontsize=8, loc="left")
    ax.grid(alpha=0.3)
    _outputs.save_chart(figure, path)
