"""hici train and hici sft."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import typer

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
) -> None:
    """Build the recipe from defaults, file and options, and train."""
    from ..train import Recipe
    from ..train import run as train

    values: dict[str, Any] = dict(SFT) if kind == "answers" else {}
    if recipe_path is not None:
        content = json.loads(recipe_path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{recipe_path} must hold a JSON object, got {type(content).__name__}")
        values |= {k: v for k, v in content.items() if k != "kind"}
    values |= fields(settings)
    done = train(
        model, data, out, Recipe.from_dict(values), kind=kind, engine=engine, checkpoint=adapter, resume=resume,
        report_to=report_to,
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")):
        return
    typer.echo(f"{done['step']} steps, loss {done['loss']}; metrics in {done['metrics']}")
    typer.echo(f"checkpoint in {done['result']}: hici merge {model} {done['result']} OUT")
    if json_path is not None:
        json_path.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
