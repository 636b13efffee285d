"""The command ``hici``. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hierarchical long-context attention: HiCI and HGA.",
)

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Wrong input is one line on stderr and exit code 2, not a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"hici: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def demo(
    text: Annotated[Path | None, typer.Option("--text", help="Read this file instead of unseen library code.")] = None,
    context: Annotated[int | None, typer.Option("--context", help="Only this context length, in bytes.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for pictures and numbers.")] = Path("hici-demo"),
    json: JsonOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="One short context, one budget.")] = False,
) -> None:
    """A small language model reads real text, dense and with HGA; then the HiCI operations."""
    with user_errors():
        from ..demo.run import run

        code = run(text, context, out, json, quick)
    raise typer.Exit(code)


@app.command()
def info(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    timing: Annotated[bool, typer.Option("--timing", help="Also measure import time and install time.")] = False,
    source: Annotated[Path | None, typer.Option("--source", help="Source tree whose install is timed.")] = None,
) -> None:
    """Versions, processor, GPUs, and which implementation serves which operation."""
    with user_errors():
        from .info import show

        show(as_json=json, timing=timing, source=source)


@app.command()
def bench(
    op: Annotated[str | None, typer.Option("--op", help="Operations, separated by commas. Default: all.")] = None,
    impl: Annotated[str | None, typer.Option("--impl", help="Implementations. Default: all that can run.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    suite: Annotated[str, typer.Option("--suite", help="Named list of cases.")] = "quick",
    threads: Annotated[int | None, typer.Option("--threads", help="Threads of PyTorch.")] = None,
    path: Annotated[str | None, typer.Option("--path", help="Instruction set: base, avx512, avx512_bf16, amx.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Timed rounds of every side.")] = 7,
    json: JsonOption = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Write a chart (PNG) to this file.")] = None,
) -> None:
    """Check, then measure: every implementation beside plain PyTorch doing the same work."""
    with user_errors():
        from ..bench.command import run

        code = run(
            ops=op,
            impls=impl,
            dtype=dtype,
            suite=suite,
            threads=threads,
            rounds=rounds,
            json_path=json,
            chart_path=chart,
            path=path,
        )
    raise typer.Exit(code)


@app.command()
def tune(
    op: Annotated[str | None, typer.Option("--op", help="Tables, separated by commas. Default: all.")] = None,
    head_dim: Annotated[str | None, typer.Option("--head-dim", help="Head dims of attention. Default: all.")] = None,
    segment_len: Annotated[str | None, typer.Option("--segment-len", help="Default: 1K to 16K tokens.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Default: bfloat16.")] = None,
    json: JsonOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print, leave the tables alone.")] = False,
) -> None:
    """Measure kernel configurations on this GPU and rewrite its entries of the tables."""
    with user_errors():
        from ..tuning.search import run

        code = run(ops=op, head_dims=head_dim, segment_lens=segment_len, dtypes=dtype, json_path=json, dry_run=dry_run)
    raise typer.Exit(code)


if __name__ == "__main__":
    sys.exit(app())
