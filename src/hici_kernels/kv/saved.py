"""A store as one file, to be opened again: visible only when complete, every part verified when it is read.

    magic · parts · index (JSON) · 24 bytes: offset and length of the index, its CRC-32, magic

A part is a run of bytes of one row of one layer; the index has its place and CRC-32. The file is written under another
name, synchronised, renamed and its directory synchronised, so that a crash leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from ..config import HGAConfig
from ..errors import KVStoreError
from ..rope import Rope
from .columns import Columns

try:
    import fcntl
except ImportError:  # a system without it sweeps nothing
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from .store import KVStore

MAGIC = b"HICIKV01"
FOOTER = struct.Struct("<QQI4s")
PREFIX = "hici-kv-save-"  # csrc/io/page_file.cpp removes leftovers of this name too
RECORDS_PER_PART = 16


def save(store: KVStore, path: str | os.PathLike[str]) -> None:
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path must be in a directory that exists, got {os.fspath(path)!r}")
    _sweep(target.parent)
    temporary = target.parent / f"{PREFIX}{os.getpid()}-{os.urandom(6).hex()}"
    try:
        with open(temporary, "xb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(store, file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise KVStoreError(f"saving to {target} failed: {error}", file=str(target)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Saved:
    """An open saved file: the arguments of its store, and its parts."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            self.file = open(path, "rb")  # noqa: SIM115  closed by whoever restores
        except OSError as error:
            raise KVStoreError(f"{self.path} cannot be opened: {error}", file=self.path) from error
        try:
            self.index = self._index()
            index = self.index
            self.arguments: dict[str, Any] = {
                "config": HGAConfig.from_dict(index["config"]),
                "rope": Rope(
                    torch.tensor(index["inv_freq"], dtype=torch.float64).to(_dtype(index["rope_dtype"])),
                    attention_scaling=index["attention_scaling"],
                ),
                "layers": index["layers"],
                "kv_heads": index["kv_heads"],
                "head_dim": index["head_dim"],
                "batch": index["batch"],
                "dtype": _dtype(index["dtype"]),
                "cold_dtype": torch.int8 if index["cold"] else None,
            }
        except BaseException:
            self.file.close()
            raise

    def restore(self, store: KVStore) -> None:
        """Fill an empty store made with :attr:`arguments`."""
        if store.config.routing == "prefix" and not self.index["query_heads"]:
            return  # nothing was attended: pages also hold queries, whose number the first call will tell
        engine = store._build(self.index["query_heads"])
        c, first = store.config.chunk_size, store.config.keep_first
        for number, rows in enumerate(self.index["rows"]):
            state = store._layers[number]
            for b, row in enumerate(rows):
                length, base = row["length"], row["base"]
                n = length // c
                state.reserve_records(n)
                for part in row["parts"]:
                    data = self._read(part, number, b)
                    if part["name"] == "records":
                        chunk = torch.arange(part["chunk"], part["chunk"] + part["count"])
                        pages = data.view(part["count"], engine.layout.pages, engine.layout.page_bytes)
                        numbers = engine.take(state, torch.full_like(chunk, b), chunk)
                        state.records[b, chunk] = numbers
                        engine.tier.write(numbers, pages)
                        continue
                    x = data.view(store.dtype).view(part["shape"]).to(store.device)
                    most = {"sinks": first * c, "tail": engine.tail_tokens}.get(part["name"].split(".")[0])
                    buffer = state.reserve(part["name"], len(x), tuple(x.shape[1:]), store.device, most)
                    buffer[b, : len(x)] = x
                state.lengths[b], state.base[b] = length, base
                state.columns[b] = Columns.of_runs([tuple(x) for x in row["columns"]], row["following"])

    def _index(self) -> dict[str, Any]:
        size = os.fstat(self.file.fileno()).st_size
        footer = self._bytes(max(0, size - FOOTER.size), FOOTER.size)
        if len(footer) == FOOTER.size and self._bytes(0, len(MAGIC)) == MAGIC:
            start, length, crc, end = FOOTER.unpack(footer)
            if end == MAGIC[:4] and start + length + FOOTER.size == size:
                raw = self._bytes(start, length)
                if zlib.crc32(raw) == crc:
                    return json.loads(raw)
        raise KVStoreError(f"{self.path} is no complete saved history", file=self.path)

    def _read(self, part: dict[str, Any], layer: int, row: int) -> Tensor:
        raw = self._bytes(part["at"], part["bytes"])
        if len(raw) != part["bytes"] or zlib.crc32(raw) != part["crc"]:
            chunk = part.get("chunk")
            which = part["name"] if chunk is None else f"chunks {chunk} to {chunk + part['count'] - 1}"
            raise KVStoreError(
                f"reading {which} of row {row} in layer {layer} failed: its bytes are not those that were written "
                f"(file {self.path})",
                layer=layer,
                row=row,
                chunk=chunk,
                file=self.path,
            )
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)

    def _bytes(self, start: int, count: int) -> bytes:
        try:
            self.file.seek(start)
            return self.file.read(count)
        except OSError as error:
            raise KVStoreError(f"{self.path} cannot be read: {error}", file=self.path) from error


def _write(store: KVStore, file: BinaryIO) -> None:
    file.write(MAGIC)
    at = len(MAGIC)
    rows: list[list[dict[str, Any]]] = []
    for number in range(store.layers):
        rows.append([])
        for b in range(store.batch):
            described, parts = _row(store, number, b)
            for part, raw in parts:
                file.write(raw)
                described["parts"].append(part | {"at": at, "bytes": len(raw), "crc": zlib.crc32(raw)})
                at += len(raw)
            rows[-1].append(described)
    engine = store._engine
    index = {
        "config": store.config.to_dict(),
        "inv_freq": store.rope.inv_freq.double().tolist(),
        "rope_dtype": str(store.rope.inv_freq.dtype).removeprefix("torch."),
        "attention_scaling": store.rope.attention_scaling,
        "layers": store.layers,
        "kv_heads": store.kv_heads,
        "head_dim": store.head_dim,
        "batch": store.batch,
        "dtype": str(store.dtype).removeprefix("torch."),
        "cold": store.cold_dtype is not None,
        "query_heads": engine.layout.query_heads if engine is not None else 0,
        "rows": rows,
    }
    raw = json.dumps(index).encode()
    file.write(raw)
    file.write(FOOTER.pack(at, len(raw), zlib.crc32(raw), MAGIC[:4]))


def _row(store: KVStore, number: int, b: int) -> tuple[dict[str, Any], Iterator[tuple[dict[str, Any], bytes]]]:
    state, engine = store._layers[number], store._engine
    c, first = store.config.chunk_size, store.config.keep_first
    length, base = int(state.lengths[b]), int(state.base[b])
    counts = {"chunk_keys": length // c, "group_keys": length // c, "sinks": min(base, first) * c}
    counts["tail"] = length - base * c
    if store.config.super_chunk:
        counts["super_keys"] = length // c // store.config.super_chunk

    def parts() -> Iterator[tuple[dict[str, Any], bytes]]:
        for name, buffer in state.buffers.items():
            x = buffer[b, : counts[name.split(".")[0]]].cpu().contiguous()
            if len(x):
                yield {"name": name, "shape": list(x.shape)}, x.view(torch.uint8).numpy().tobytes()
        for start in range(first, base, RECORDS_PER_PART):
            records = state.records[b, start : min(base, start + RECORDS_PER_PART)]
            assert engine is not None
            pages = engine.tier.pages(engine.records.pages_of(records).flatten()).cpu()
            yield {"name": "records", "chunk": start, "count": len(records)}, pages.numpy().tobytes()

    columns = state.columns[b]
    described = {"length": length, "base": base, "columns": columns.runs, "following": columns.following, "parts": []}
    return described, parts()


def _sweep(directory: Path) -> None:
    """Remove what processes that were killed while saving have left: nobody holds its lock."""
    for path in directory.glob(f"{PREFIX}*") if fcntl is not None else ():
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
