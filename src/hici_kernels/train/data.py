"""Documents packed into rows, with their boundaries instead of padding."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluate.tokens import without_end
from .recipe import Recipe

IGNORED = -100
KINDS = ("text", "answers")


def documents(paths: Sequence[Path], kind: str, template: str) -> Iterator[tuple[str, str]]:
    """(prompt, text) of every document; the prompt is read, the text is learned.

    "text": a .txt (or .md) file is one document; .jsonl has {"text": ...} in every line. The prompt is empty.
    "answers": .json (a list) or .jsonl with instruction, output and perhaps input, as in LongAlpaca.

    Raises:
        ValueError: a file of another kind or without these fields.
    """
    for path in paths:
        if path.suffix in (".txt", ".md"):
            if kind != "text":
                raise ValueError(f"{path} holds plain text; instruction tuning needs .json or .jsonl")
            try:
                text = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} must be UTF-8: {error}") from error
            yield "", text
            continue
        if path.suffix not in (".json", ".jsonl"):
            raise ValueError(f"{path} must be .txt, .md, .json or .jsonl")
        for at, entry in enumerate(_entries(path)):
            wanted = ("text",) if kind == "text" else ("instruction", "output")
            lacking = [n for n in wanted if not isinstance(entry, dict) or not isinstance(entry.get(n), str)]
            if lacking:
                raise ValueError(f"{path}, entry {at}: expected the text field {lacking[0]!r}")
            if kind == "text":
                yield "", entry["text"]
            else:
                asked = entry["instruction"] + (f"\n\n{entry['input']}" if entry.get("input") else "")
                yield template.format(instruction=asked), entry["output"]


def _entries(path: Path) -> Iterable[Any]:
    with open(path, "rb") as file:
        if path.suffix == ".json":
            try:
                content = json.loads(file.read().decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"{path} is not JSON in UTF-8: {error}") from error
            if not isinstance(content, list):
                raise ValueError(f"{path} must hold a list, got {type(content).__name__}")
            yield from content
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    entry = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is not JSON in UTF-8: {error}") from error
                yield entry


def prepare(paths: Sequence[Path], kind: str, tokenizer: Any, recipe: Recipe, directory: Path) -> Path:
    """Tokenise and pack into a folder below ``directory``; what is there already for the same input is kept.

    Returns the folder: tokens.bin and labels.bin (int32, one after the other), pieces.npy (int64 [pieces, 3]: row,
    start, end in these files), meta.json. A row holds at most ``recipe.context`` tokens. Text longer than what is left
    of a row goes on in the next one as a document of its own; an answer is kept whole, and left out (and counted) where
    it is longer than a row.

    Raises:
        ValueError: nothing to train on. FileNotFoundError.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
    out = directory / _fingerprint(paths, kind, tokenizer, recipe)
    if (out / "meta.json").is_file():
        return out
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to end documents with; see special_tokens of Recipe")
    beside = directory / f".{out.name}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    pieces: list[tuple[int, int, int]] = []
    row = held = written = skipped = count = 0
    digest = hashlib.sha256()
    with open(beside / "tokens.bin", "wb") as tokens, open(beside / "labels.bin", "wb") as labels:
        for prompt, text in tqdm(documents(paths, kind, recipe.template), desc="tokens", unit=" documents",
                                 disable=None):  # fmt: skip
            asked = without_end(tokenizer(prompt)["input_ids"], tokenizer) if prompt else []
            answer = without_end(tokenizer(text, add_special_tokens=not prompt)["input_ids"], tokenizer)
            ids = np.asarray([*asked, *answer, tokenizer.eos_token_id], dtype=np.int32)
            learned = ids.copy()
            learned[: len(asked)] = IGNORED
            count += 1
            if kind == "answers" and len(ids) > recipe.context:
                skipped += 1
                continue
            at = 0
            while at < len(ids):
                room = recipe.context - held
                # a single token teaches nothing: its predecessor is in another piece
                if room < 2 or (kind == "answers" and len(ids) > room):
                    row, held = row + 1, 0
                    continue
                end = min(len(ids), at + room)
                if end - at >= 2:
                    for part, file in ((ids[at:end], tokens), (learned[at:end], labels)):
                        file.write(part.tobytes())
                        digest.update(part.tobytes())
                    pieces.append((row, written, written + end - at))
                    written, held = written + end - at, held + end - at
                at = end
    if not pieces:
        shutil.rmtree(beside)
        raise ValueError(f"nothing to train on in {len(paths)} files: {count} documents, {skipped} longer than a row")
    np.save(beside / "pieces.npy", np.asarray(pieces, dtype=np.int64))
    meta = {"documents": count, "longer_than_a_row": skipped, "tokens": written, "rows": pieces[-1][0] + 1,
            "sha256": digest.hexdigest()[:16]}  # fmt: skip
    (beside / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, out)
    return out


def _fingerprint(paths: Sequence[Path], kind: str, tokenizer: Any, recipe: Recipe) -> str:
    digest = hashlib.sha256(json.dumps([kind, recipe.context, recipe.template, tokenizer.eos_token_id]).encode())
    whole = getattr(tokenizer, "backend_tokenizer", None)
    if whole is not None:
        # with normaliser, splitting rules and merges: the same vocabulary may cut texts otherwise
        digest.update(whole.to_str().encode())
    digest.update(json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]).encode())
    for path in paths:
        about = path.stat()
        digest.update(f"{path.resolve()}:{about.st_size}:{about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


class PackedRows(torch.utils.data.Dataset):
    """Rows of :func:`prepare`: {"input_ids", "labels" int64 [n], "starts" of its pieces, "segment_len"}.

    segment_len: that of the model's slots; where the recipe mixes several, one of those is drawn for a row.
    """

    def __init__(self, directory: Path, recipe: Recipe, segment_len: int) -> None:
        self.tokens = np.memmap(directory / "tokens.bin", dtype=np.int32, mode="r")
        self.labels = np.memmap(directory / "labels.bin", dtype=np.int32, mode="r")
        self.pieces = np.load(directory / "pieces.npy")
        self.first = np.searchsorted(self.pieces[:, 0], np.arange(self.pieces[-1, 0] + 2))
        self.recipe = recipe
        self.meta: dict[str, Any] = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.segment_len = segment_len

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        pieces = self.pieces[self.first[row] : self.first[row + 1]]
        begin, end = int(pieces[0, 1]), int(pieces[-1, 2])
        mixed = self.recipe.mixed_segments
        drawn = random.Random(f"{self.recipe.seed} {row}").choice(mixed) if mixed else self.segment_len
        return {
            "input_ids": torch.from_numpy(self.tokens[begin:end].astype(np.int64)),
            "labels": torch.from_numpy(self.labels[begin:end].astype(np.int64)),
            "starts": (pieces[:, 1] - begin).tolist(),
            "segment_len": drawn,
        }


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows one after the other as one packed batch [1, tokens].

    The first token of every document is no target. position_ids restart with every document; an attention_mask of ones
    keeps transformers from forming a [tokens, tokens] mask out of them. cu_seq_lens_q, total_segments and
    hici_segment_len go to the attention function. Rows of one batch share the segment length drawn for the first.
    """
    segment_len = rows[0]["segment_len"]
    starts, offset = [], 0
    for row in rows:
        starts += [offset + s for s in row["starts"]]
        offset += len(row["input_ids"])
    cu = torch.tensor([*starts, offset], dtype=torch.int32)
    lengths = cu.diff()
    labels = torch.cat([row["labels"] for row in rows])
    labels[cu[:-1].long()] = IGNORED
    positions: Tensor = torch.cat([torch.arange(n) for n in lengths.tolist()])
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "labels": labels[None],
        "position_ids": positions[None],
        "attention_mask": torch.ones(1, offset, dtype=torch.int64),
        "cu_seq_lens_q": cu,
        "total_segments": sum(-(-n // segment_len) for n in lengths.tolist()),
        "hici_segment_len": segment_len,
    }
