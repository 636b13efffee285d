"""hici chat: talk to a local model directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

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
) -> None:
    """Answer the prompts given, or those typed in until the end of input."""
    from ..integrations.chat import Conversation, open_model

    values = fields(settings)
    opened = open_model(
        model, method, config=values, adapter=adapter, store=store, device=device, dtype=_dtype(dtype),
        **fields(store_settings),
    )  # fmt: skip
    conversation = Conversation(*opened)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    turns = []
    attached = "" if file is None else file.read_text(encoding="utf-8") + "\n\n"
    typer.echo(f"{model.name} · {method}" + (f" · history in {store}" if method == "hga" else ""))
    try:
        for text in prompts or _typed():
            turn = conversation.say(attached + text, max_new_tokens=max_new_tokens, show=_show, **sampling)
            attached = ""
            typer.echo()
            typer.echo(_summary(turn), err=True)
            turns.append({"prompt": text, **turn.to_dict()})
    finally:
        conversation.close()
    if json_path is not None:
        content = {"model": str(model), "method": method, "store": store, "turns": turns}
        json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _show(piece: str) -> None:
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
