"""Token files in the layout of the published evaluation: a flat memory map of token ids, nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import _checks


class ByteTokenizer:
    """Bytes of UTF-8 as tokens 0..255: the tokenizer of the shipped demo model. No special tokens."""

    vocab_size = 256
    eos_token_id = None
    eos_token = None
    bos_token_id = None
    pad_token_id = 0
    name_or_path = "bytes"

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", "replace")


def without_end(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Tokens of a text without the end-of-text token that some tokenizers put at their end."""
    found = list(ids)
    return found[:-1] if found and found[-1] == tokenizer.eos_token_id else found


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that is to be continued: as the tokenizer begins texts, without an end."""
    return without_end(tokenizer.encode(text, add_special_tokens=True), tokenizer)


def dtype_for(vocab_size: int) -> np.dtype:
    """uint16 up to 65535 symbols, else uint32: the published rule."""
    return np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)


def prepare(
    texts: list[Path], tokenizer: Any, out: Path, *, piece: int | None = 1_000_000, separator: str = "\n"
) -> dict[str, Any]:
    """Write the token ids of ``texts``, joined by ``separator``, to ``out``; the record goes to ``out``.json.

    Args:
        piece: characters encoded at a time, without special tokens (a token boundary per piece, the published rule for
            Llama-3 and Qwen3). None = the whole text at once with the tokenizer's special tokens (one BOS, as published
            for Llama-2).

    Raises:
        ValueError: no text, none in it, or an id that does not fit. OSError. ``out`` is replaced only when all is
            written.
    """
    if piece is not None:
        _checks.integer("piece", piece, 1)
    if not texts:
        raise ValueError("texts must name at least one file")
    for path in texts:
        if not path.is_file():
            raise ValueError(f"text must be an existing file, got {str(path)!r}")
        if path.resolve() in (out.resolve(), Path(f"{out}.json").resolve()):
            raise ValueError(f"out must be another file than the text {str(path)!r}, which it would replace")
    kind = dtype_for(len(tokenizer))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    count, digest = 0, hashlib.sha256()
    try:
        with part.open("wb") as file:
            for some in _encoded(texts, tokenizer, piece, separator):
                if some and max(some) > np.iinfo(kind).max:
                    raise ValueError(
                        f"token id {max(some)} does not fit {kind.name}: the tokenizer has {len(tokenizer)}"
                    )
                raw = np.asarray(some, dtype=kind).tobytes()
                digest.update(raw)
                file.write(raw)
                count += len(some)
        if not count:
            raise ValueError(f"text must hold something, {', '.join(map(str, texts))} give no token")
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    record = {
        "tokens": count,
        "dtype": kind.name,
        "vocab_size": len(tokenizer),
        "tokenizer": str(getattr(tokenizer, "name_or_path", type(tokenizer).__name__)),
        "piece": piece,
        "texts": [str(p) for p in texts],
        "sha256": digest.hexdigest(),
    }
    part.replace(out)
    Path(f"{out}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _encoded(texts: list[Path], tokenizer: Any, piece: int | None, separator: str) -> Iterator[list[int]]:
    if piece is None:
        yield tokenizer.encode(separator.join(p.read_text(encoding="utf-8") for p in texts))
        return
    held = ""
    for i, path in enumerate(texts):
        with path.open(encoding="utf-8") as file:
            held += separator if i else ""
            while some := file.read(piece):
                held += some
                while len(held) >= piece:
                    yield tokenizer.encode(held[:piece], add_special_tokens=False)
                    held = held[piece:]
    if held:
        yield tokenizer.encode(held, add_special_tokens=False)


def read(path: Path, vocab_size: int | None = None) -> np.ndarray:
    """The ids as a read-only memory map. The dtype is that of ``path``.json, else follows from ``vocab_size``."""
    record = Path(f"{path}.json")
    if not path.is_file():
        raise ValueError(f"data must be an existing token file (hici eval prepare), got {str(path)!r}")
    if record.is_file():
        try:
            kind = np.dtype(json.loads(record.read_text(encoding="utf-8"))["dtype"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{record} must be the record of a token file, which names its dtype") from error
    elif vocab_size is not None:
        kind = dtype_for(vocab_size)
    else:
        raise ValueError(f"{path} has no {record.name} beside it, so vocab_size must be given")
    if path.stat().st_size % kind.itemsize or path.stat().st_size == 0:
        raise ValueError(f"{path} holds {path.stat().st_size} bytes, expected a positive multiple of {kind.itemsize}")
    ids = np.memmap(path, dtype=kind, mode="r")
    if vocab_size is not None and int(ids.max()) >= vocab_size:
        raise ValueError(f"{path} holds token {int(ids.max())}, the model has {vocab_size}: another tokenizer wrote it")
    return ids
