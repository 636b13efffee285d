"""hici chat: talk to a local model directory."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import typer

from .. import _checks, _outputs
from .checkpoints import _dtype, fields


def run(
    model: Path,
    method: str,
    store: str,
    adapter: Path | None,
    settings: list[str],
    store_settings: list[str],
    prompts: list[str],
    file: Path | None,
    max_new_tokens: int,
    temperature: float,
    dtype: str | None,
    device: str,
    json_path: Path | None,
    chart_path: Path | None,
) -> None:
    """Answer the prompts given, or those typed in until the end of input.

    Raises:
        ValueError, TypeError: naming the argument, before the model is read.
    """
    from ..integrations.chat import Conversation, open_model

    _checks.integer("--max-new-tokens", max_new_tokens, 1)
    _checks.number("--temperature", temperature)
    if temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {temperature}")
    attached = "" if file is None else file.read_text(encoding="utf-8") + "\n\n"
    values = fields(settings)
    _outputs.prepare(json_path, chart_path, kept=(file,))
    opened = open_model(
        model, method, config=values, adapter=adapter, store=store, device=device, dtype=_dtype(dtype),
        **fields(store_settings, "--store-set"),
    )  # fmt: skip
    conversation = Conversation(*opened)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    turns = []
    typer.echo(f"{model.name} · {method}" + (f" · history in {store}" if method == "hga" else ""))
    try:
        for text in prompts or _typed():
            try:
                with _Interrupt(asking=not prompts) as interrupt:
                    turn = conversation.say(
                        attached + text,
                        max_new_tokens=max_new_tokens,
                        show=interrupt.show,
                        stop=interrupt.asked,
                        **sampling,
                    )
            except KeyboardInterrupt:
                if prompts:
                    raise
                typer.echo("\n[interrupted: this turn is forgotten, and the next one reads everything again]", err=True)
                continue
            attached = ""
            typer.echo()
            typer.echo(_summary(turn), err=True)
            turns.append({"prompt": text, **turn.to_dict()})
    finally:
        conversation.close()
    if json_path is not None:
        _outputs.write_json(
            json_path,
            {"model": str(model), "method": method, "store": store if method == "hga" else None, "turns": turns},
        )
    if chart_path is not None:
        _write_chart(turns, f"{model.name}, {method}", chart_path)


def _write_chart(turns: list[dict[str, Any]], title: str, path: Path) -> None:
    """Tokens per second of every answer, and the seconds that its reading and its writing took."""
    figure = _outputs.figure(8, 4.8)
    speed, cost = figure.subplots(2, 1, sharex=True)
    at = range(1, len(turns) + 1)
    speed.bar(at, [t["tokens_per_s"] for t in turns])
    speed.set(ylabel="tokens written per s")
    reading = [t["prefill_s"] for t in turns]
    cost.bar(at, reading, label="reading")
    cost.bar(at, [t["decode_s"] for t in turns], bottom=reading, label="writing")
    cost.set(ylabel="seconds", xlabel="prompt")
    cost.set_xticks(list(at))
    cost.legend()
    speed.set_title(title, fontsize=9, loc="left")
    _outputs.save_chart(figure, path)


class _Interrupt:
    """Shows an answer, and ends it at the first interrupt after it has begun; any other interrupt ends the turn.

    What was read for an answer that is cut short stays in the cache. asking: False leaves interrupts as they are.
    """

    def __init__(self, asking: bool) -> None:
        # handlers belong to the main thread
        self._asking = asking and threading.current_thread() is threading.main_thread()
        self._begun = self._asked = False

    def __enter__(self) -> _Interrupt:
        if self._asking:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._asking:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: object) -> None:
        if self._asked or not self._begun:
            raise KeyboardInterrupt
        self._asked = True

    def asked(self) -> bool:
        return self._asked

    def show(self, piece: str) -> None:
        self._begun = True
        typer.echo(piece, nl=False)
        sys.stdout.flush()


def _typed() -> Any:
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if text.strip():
            yield text


def _summary(turn: Any) -> str:
    read = f"{turn.prompt_tokens} tokens read in {turn.prefill_s:.2f} s"
    if turn.reused_tokens:
        read += f" ({turn.reused_tokens} still held)"
    memory = ", ".join(f"{tier} {size / 2**20:.1f} MiB" for tier, size in turn.memory.items() if size)
    return f"[{read}; {turn.new_tokens} written, {turn.tokens_per_s:.1f} tokens/s; history: {memory or 'empty'}]"
