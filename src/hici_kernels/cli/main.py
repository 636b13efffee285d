"""The command ``hici``. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..errors import KVStoreError
from .evaluate import app as evaluation

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hierarchical long-context attention: HiCI and HGA.",
)

app.add_typer(evaluation, name="eval")

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")]
ChartOption = Annotated[Path | None, typer.Option("--chart", help="Write a chart (PNG) to this file.")]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Wrong input, or a disk that fails, is one line on stderr and exit code 2, not a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, KVStoreError) as error:
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
    chart: ChartOption = None,
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


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A configuration field, name=value; may be repeated.", metavar="NAME=VALUE"),
]
WeightsOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16. Default: as stored.")]


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="Directory of the base model.")],
    checkpoint: Annotated[Path, typer.Argument(help="Directory of the HiCI checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    keep_slots: Annotated[bool, typer.Option("--keep-slots/--drop-slots", help="Keep the slot modules.")] = False,
    settings: SetOption = None,
    dtype: WeightsOption = None,
) -> None:
    """Write a HiCI checkpoint and its base as one model directory."""
    with user_errors():
        from .checkpoints import merge as run

        run(base, checkpoint, out, keep_slots, settings or [], dtype)


@app.command()
def extract(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a training run.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the LoRA matrices. Default: as stored.")] = None,
) -> None:
    """Take a HiCI checkpoint out of a training run: ZeRO shards, FSDP shards or plain weights."""
    with user_errors():
        from .checkpoints import extract as run

        run(run_directory, out, dtype)


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="A .bin file, or a directory with some.")],
    remove: Annotated[bool, typer.Option("--remove", help="Delete each .bin file once its copy is checked.")] = False,
) -> None:
    """Write .bin weights as .safetensors, without running code from them."""
    with user_errors():
        from .checkpoints import convert as run

        run(path, remove)


@app.command()
def chat(
    model: Annotated[Path, typer.Option("--model", help="Directory of a model and its tokenizer.")],
    method: Annotated[str, typer.Option("--method", help="hga, hici or none.")] = "hga",
    store: Annotated[
        str, typer.Option("--store", help="Where HGA keeps the history: device, host or disk.")
    ] = "device",
    adapter: Annotated[Path | None, typer.Option("--adapter", help="HiCI checkpoint for this model.")] = None,
    settings: SetOption = None,
    store_settings: Annotated[
        list[str] | None,
        typer.Option("--store-set", help="A limit of the store, such as host_bytes=2e9.", metavar="NAME=VALUE"),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Answer this instead of asking.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Put this text before the first prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 = greedy.")] = 0.0,
    dtype: WeightsOption = None,
    device: Annotated[str, typer.Option("--device", help="Of the model.")] = "cpu",
    json: JsonOption = None,
    chart: ChartOption = None,
) -> None:
    """Talk to a local model with long-context attention; tokens per second and memory per tier after every answer."""
    with user_errors():
        from .chat import run

        run(
            model,
            method,
            store,
            adapter,
            settings or [],
            store_settings or [],
            prompt or [],
            file,
            max_new_tokens,
            temperature,
            dtype,
            device,
            json,
            chart,
        )


DataOption = Annotated[list[Path], typer.Option("--data", help="A file of documents; may be repeated.")]
ModelOption = Annotated[Path, typer.Option("--model", help="Directory of the base model and its tokenizer.")]
RunOption = Annotated[Path, typer.Option("--out", help="Folder of the run: checkpoints, metrics, the result.")]
EngineOption = Annotated[str, typer.Option("--engine", help="plain, fsdp2, zero2 or zero3.")]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="JSON file with fields of the recipe.")]
RecipeSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field of the recipe, name=value; may be repeated.", metavar="NAME=VALUE"),
]
StartOption = Annotated[Path | None, typer.Option("--adapter", help="HiCI checkpoint to go on from.")]
ResumeOption = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the newest checkpoint in --out.")]
ReportOption = Annotated[str, typer.Option("--report-to", help="none, tensorboard or another reporter.")]


@app.command()
def train(
    model: ModelOption,
    data: DataOption,
    out: RunOption,
    engine: EngineOption = "plain",
    recipe: RecipeOption = None,
    settings: RecipeSetOption = None,
    adapter: StartOption = None,
    resume: ResumeOption = True,
    report_to: ReportOption = "none",
    json: JsonOption = None,
    chart: ChartOption = None,
) -> None:
    """Continued pre-training with HiCI. Several processes: torchrun or accelerate launch -m hici_kernels train ..."""
    with user_errors():
        from .train import run

        run("text", model, data, out, engine, recipe, settings or [], adapter, resume, report_to, json, chart)


@app.command()
def sft(
    model: ModelOption,
    data: DataOption,
    out: RunOption,
    engine: EngineOption = "plain",
    recipe: RecipeOption = None,
    settings: RecipeSetOption = None,
    adapter: StartOption = None,
    resume: ResumeOption = True,
    report_to: ReportOption = "none",
    json: JsonOption = None,
    chart: ChartOption = None,
) -> None:
    """Instruction tuning with HiCI: the loss is on answers only. Launched like train."""
    with user_errors():
        from .train import run

        run("answers", model, data, out, engine, recipe, settings or [], adapter, resume, report_to, json, chart)


if __name__ == "__main__":
    sys.exit(app())
