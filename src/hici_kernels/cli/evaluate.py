"""hici eval: perplexity, retrieval, the standard harness."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import _outputs

app = typer.Typer(no_args_is_help=True, help="Evaluate a local model: every result says method, mode, leak, density.")

ModelOption = Annotated[str, typer.Option("--model", help="Directory of a model and its tokenizer, or: demo.")]
MethodOption = Annotated[str, typer.Option("--method", help="none, hga, hici or dca.")]
AttentionOption = Annotated[
    str, typer.Option("--attention", help="method, or full = plain attention with these weights, no slots.")
]
AdapterOption = Annotated[Path | None, typer.Option("--adapter", help="HiCI checkpoint for this model.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A configuration field, name=value; may be repeated.", metavar="NAME=VALUE"),
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16. Default: as stored.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Of the model.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")]
ChartOption = Annotated[Path | None, typer.Option("--chart", help="Write a chart (PNG) to this file.")]
LengthsOption = Annotated[str, typer.Option("--lengths", help="Context lengths in tokens, separated by commas.")]


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    from .main import user_errors

    with user_errors():
        yield


def _numbers(option: str, given: str, kind: type) -> list[Any]:
    try:
        found = [kind(x) for x in given.split(",") if x.strip()]
    except ValueError as error:
        raise ValueError(f"{option} must be numbers separated by commas, got {given!r}") from error
    if not found:
        raise ValueError(f"{option} must name at least one number, got {given!r}")
    return found


def _open(
    model: str,
    method: str,
    attention: str,
    adapter: Path | None,
    settings: list[str] | None,
    dtype: str | None,
    device: str,
) -> Any:
    from ..evaluate.models import open_model
    from .checkpoints import _dtype, fields

    return open_model(
        model,
        method,
        config=fields(settings or []),
        adapter=adapter,
        attention=attention,
        device=device,
        dtype=_dtype(dtype),
    )


def _finish(result: dict[str, Any], json: Path | None, chart: Path | None) -> None:
    from rich.console import Console

    from ..evaluate import report

    report.show(Console(highlight=False), result)
    if json is not None:
        report.write_json(result, json)
    if chart is not None:
        report.write_chart(result, chart)


@app.command()
def prepare(
    text: Annotated[list[Path], typer.Argument(help="Text files (UTF-8), joined in this order.")],
    out: Annotated[Path, typer.Option("--out", help="Token file to write.")],
    model: ModelOption = "demo",
    whole: Annotated[bool, typer.Option("--whole", help="Encode all at once with special tokens (Llama-2).")] = False,
    piece: Annotated[
        int | None, typer.Option("--piece", help="Characters encoded at a time otherwise.", show_default="1000000")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Tokenise text into a flat memory map (uint16 up to 65535 symbols, else uint32)."""
    with _errors():
        from ..evaluate import tokens

        if whole and piece is not None:
            raise ValueError(f"--piece has no meaning with --whole, got {piece}")
        _outputs.prepare(json, kept=(*text, out, Path(f"{out}.json")))
        tokenizer: Any = tokens.ByteTokenizer()
        if model != "demo":
            from transformers import AutoTokenizer

            if not Path(model).is_dir():
                raise ValueError(f"model must be a directory or 'demo', got {model!r}")
            tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        size = None if whole else 1_000_000 if piece is None else piece
        record = tokens.prepare(text, tokenizer, out, piece=size)
        typer.echo(f"{record['tokens']:,} tokens ({record['dtype']}) in {out}")
        if json is not None:
            _outputs.write_json(json, {**record, "file": str(out)})


@app.command()
def ppl(
    data: Annotated[Path, typer.Option("--data", help="Token file of hici eval prepare.")],
    model: ModelOption = "demo",
    method: MethodOption = "none",
    attention: AttentionOption = "method",
    adapter: AdapterOption = None,
    settings: SetOption = None,
    lengths: LengthsOption = "1024,2048,4096",
    protocol: Annotated[str, typer.Option("--protocol", help="sliding, last or both.")] = "both",
    stride: Annotated[int, typer.Option("--stride", help="Of the sliding protocol.")] = 256,
    windows: Annotated[int | None, typer.Option("--windows", help="At most so many windows per length.")] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    json: JsonOption = None,
    chart: ChartOption = None,
) -> None:
    """Perplexity: the published sliding windows, and last tokens only (valid for every mode)."""
    with _errors():
        from ..evaluate import perplexity, tokens

        _outputs.prepare(json, chart, kept=(data, Path(f"{data}.json")))
        sizes = _numbers("--lengths", lengths, int)
        chosen = perplexity.PROTOCOLS if protocol == "both" else (protocol,)
        opened = _open(model, method, attention, adapter, settings, dtype, device)
        ids = tokens.read(data, opened.vocab_size)
        result = perplexity.run(opened, ids, sizes, protocols=chosen, stride=stride, windows=windows, seed=seed)
        _finish({**result, "data": str(data)}, json, chart)


@app.command()
def passkey(
    model: ModelOption = "demo",
    method: MethodOption = "none",
    attention: AttentionOption = "method",
    adapter: AdapterOption = None,
    settings: SetOption = None,
    lengths: LengthsOption = "1024,2048,4096",
    depths: Annotated[
        str, typer.Option("--depths", help="Where the key is, 0 = start, 1 = end.")
    ] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option("--trials", help="Keys per length and depth.")] = 5,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    json: JsonOption = None,
    chart: ChartOption = None,
) -> None:
    """Find a number hidden in filler: accuracy by length and depth, as a heat map with --chart."""
    with _errors():
        from ..evaluate import passkey as task

        _outputs.prepare(json, chart)
        sizes, places = _numbers("--lengths", lengths, int), _numbers("--depths", depths, float)
        opened = _open(model, method, attention, adapter, settings, dtype, device)
        _finish(task.run(opened, sizes, places, trials=trials, seed=seed), json, chart)


@app.command()
def topics(
    model: ModelOption = "demo",
    method: MethodOption = "none",
    attention: AttentionOption = "method",
    adapter: AdapterOption = None,
    settings: SetOption = None,
    counts: Annotated[
        str | None, typer.Option("--topics", help="Topics per conversation.", show_default="5,10,15,20,25")
    ] = None,
    cases: Annotated[int, typer.Option("--cases", help="Conversations per number of topics.")] = 10,
    file: Annotated[Path | None, typer.Option("--file", help="Cases in LongChat's layout instead of ours.")] = None,
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 50,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    json: JsonOption = None,
    chart: ChartOption = None,
) -> None:
    """Recall the first topic of a long conversation, scored by rules."""
    with _errors():
        from ..evaluate import topics as task

        _outputs.prepare(json, chart, kept=(file,))
        numbers = None if counts is None else _numbers("--topics", counts, int)
        opened = _open(model, method, attention, adapter, settings, dtype, device)
        _finish(task.run(opened, numbers, cases=cases, file=file, seed=seed, new_tokens=new_tokens), json, chart)


def _harness(group: str) -> Any:
    def command(
        model: ModelOption,
        method: MethodOption = "none",
        attention: AttentionOption = "method",
        adapter: AdapterOption = None,
        settings: SetOption = None,
        tasks: Annotated[str | None, typer.Option("--tasks", help="Task names. Default: the whole group.")] = None,
        lengths: LengthsOption = "4096",
        limit: Annotated[int | None, typer.Option("--limit", help="Samples per task.")] = None,
        include: Annotated[Path | None, typer.Option("--include", help="Folder of further task files.")] = None,
        download: Annotated[bool, typer.Option("--download", help="Let the harness fetch data.")] = False,
        dtype: DtypeOption = None,
        device: DeviceOption = "cpu",
        seed: SeedOption = 0,
        json: JsonOption = None,
        chart: ChartOption = None,
    ) -> None:
        with _errors():
            from ..evaluate import harness

            _outputs.prepare(json, chart)
            harness.require()
            if model == "demo":
                raise ValueError("the harness needs a directory with a tokenizer, got --model demo")
            result = harness.run(
                _open(model, method, attention, adapter, settings, dtype, device),
                group,
                tasks=None if tasks is None else tasks.split(","),
                lengths=_numbers("--lengths", lengths, int),
                limit=limit,
                include_path=None if include is None else str(include),
                offline=not download,
                seed=seed,
            )
            _finish(result, json, chart)

    command.__doc__ = f"{group} through lm-evaluation-harness (extra: eval)."
    return command


app.command("longbench")(_harness("LongBench".lower()))
app.command("ruler")(_harness("ruler"))
