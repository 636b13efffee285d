"""hici merge, extract, convert."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import typer


def fields(texts: list[str], option: str = "--set") -> dict[str, Any]:
    """``name=value`` options; values are JSON, or text where they are none.

    A whole number may be written like 2e9; options that are no integers take integers too.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{option} takes name=value, got {text!r}")
        try:
            found[name.strip()] = json.loads(value, parse_float=_number)
        except json.JSONDecodeError:
            found[name.strip()] = value
    return found


def _number(literal: str) -> int | float:
    value = float(literal)
    # Decimal: a float is not exact beyond 2 ** 53
    return int(Decimal(literal)) if "e" in literal.lower() and value.is_integer() else value


def merge(base: Path, checkpoint: Path, out: Path, keep_slots: bool, settings: list[str], dtype: str | None) -> None:
    """Load a HiCI checkpoint onto its base and write one model directory."""
    from ..integrations import load_hici, merge_hici

    if not (base / "config.json").is_file():
        raise ValueError(f"{base} is not a model directory: it has no config.json")
    for name, given in (("base", base), ("checkpoint", checkpoint)):
        if out.resolve() == given.resolve():
            raise ValueError(f"out must be another directory than the {name}, got {str(out)!r}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a directory, got the file {str(out)!r}")
    values = fields(settings)
    model: Any = base
    if dtype is not None or checkpoint.resolve() != base.resolve():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=_dtype(dtype) or "auto")
    typer.echo(f"base       {base}")
    loaded = load_hici(model, checkpoint, merge_lora=True, **values)
    typer.echo(f"checkpoint {checkpoint}")
    merge_hici(loaded, out, keep_slots)
    _copy_tokenizer(base, checkpoint, out)
    kept = "slots kept: needs this library" if keep_slots else "slots dropped: a standard model, full attention"
    typer.echo(f"merged     {out} ({kept})")


def _dtype(name: str | None) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise ValueError(f"--dtype must be one of {', '.join(known)}, got {name!r}")
    return None if name is None else known[name]


def _copy_tokenizer(base: Path, checkpoint: Path, out: Path) -> None:
    """The checkpoint's tokenizer (it may have new tokens), or the base's."""
    from transformers import AutoTokenizer

    for source in (checkpoint, base):
        if (source / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(out)
            return


def extract(run: Path, out: Path, dtype: str | None) -> None:
    """Weights of a training run as a HiCI checkpoint."""
    from ..checkpoints import extract

    extract(run, out, dtype=_dtype(dtype), progress=typer.echo)


def convert(path: Path, remove: bool) -> None:
    """.bin to .safetensors."""
    from ..checkpoints import convert

    convert(path, remove=remove, progress=typer.echo)
