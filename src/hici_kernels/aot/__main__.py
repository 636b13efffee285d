"""``python -m hici_kernels.aot``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def main(
    report: Annotated[Path | None, typer.Option("--report", help="JSON report, also the cache.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes; 0 = one per core.")] = 0,
    one_per_kernel: Annotated[bool, typer.Option("--one-per-kernel", help="One of each kernel and target.")] = False,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Take over what the report proves.")] = True,
) -> None:
    """Compile every configuration of every table for its chip; registers, shared memory, spills."""
    from .run import run

    try:
        code = run(report, jobs or os.cpu_count() or 1, one_per_kernel, cache)
    except ValueError as error:
        typer.echo(f"aot: {error}", err=True)
        code = 2
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
    sys.exit()
