"""What one layer of a store keeps at hand: key tables, sinks, local window and active chunk, and where the rest lies.

A row of length tokens in chunks of C, n = length // C, keeps three parts:

    sinks    [0, min(base, F))           on the device
    records  [F, base)                   in the tier: exactly the chunks that a route can open
    tail     [base, n]                   on the device: the local window and the active chunk

with base = min(n, max(F, n - W)). After a rewind base may be larger than that until the tail is rebuilt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import HGAConfig
from .columns import Columns
from .lists import room
from .meter import Meter
from .on_device import upload


class LayerState:
    """Buffers of one layer; row b of each is left-aligned. Beyond what ``lengths`` says, they are scratch."""

    def __init__(self, number: int, batch: int, config: HGAConfig, dtype: torch.dtype, meter: Meter) -> None:
        self.number, self.config, self.dtype, self.meter = number, config, dtype, meter
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self.base = torch.zeros(batch, dtype=torch.int64)
        self.columns = [Columns() for _ in range(batch)]
        self.records = torch.full((batch, 0), -1, dtype=torch.int64)  # [B, chunks]
        # "sinks.k", "tail.k", ... [B, tokens, heads, D]; "chunk_keys", "group_keys", "super_keys" [B, chunks, ...]
        self.buffers: dict[str, Tensor] = {}
        self.last_pages: Tensor | None = None  # of the latest decode-sized call
        self._there: tuple[Tensor, Tensor] | None = None  # records, and a copy on the device

    @property
    def batch(self) -> int:
        return len(self.columns)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.buffers.values())

    def reserve(self, name: str, count: int, like: tuple[int, ...], device: torch.device, most: int | None) -> Tensor:
        """Buffer ``name`` [B, at least count, *like]: doubled, at most ``most``, or exact if the limit allows no more.

        In memory the heads, which come before D, are outermost after B, so that all of one head lies together.

        Raises:
            ValueError: the limit allows not even that; nothing has changed then.
        """
        old = self.buffers.get(name)
        if old is not None and old.shape[1] >= count:
            return old
        held = 0 if old is None else old.shape[1]
        one = self.batch * torch.Size(like).numel() * self.dtype.itemsize
        size = max(count, 2 * held, self.config.chunk_size if name.startswith(("sinks", "tail")) else 1)
        if most is not None:
            size = max(count, min(size, most))
        # old and new are both there while one is copied into the other
        if not self.meter.fits("device", size * one):
            size = count
        total = int(self.lengths.max()) if self.batch else 0
        self.meter.require("device", size * one, f"{name} of layer {self.number} beyond {total} tokens")
        *between, heads, d = like
        new = torch.empty(self.batch, heads, size, *between, d, dtype=self.dtype, device=device).movedim(1, -2)
        self._enter(name, (0 if old is None else old.nbytes) + new.nbytes)
        if old is not None:
            new[:, :held] = old
        self._enter(name, new.nbytes)
        self.buffers[name] = new
        return new

    def reserve_records(self, chunks: int) -> None:
        """Room for the records of chunks [0, chunks) of every row. Raises as :meth:`reserve`."""
        held = self.records.shape[1]
        size = room(held, chunks)
        if size > held:
            self.meter.require("host", 8 * self.batch * size, f"the list of {size} chunks of layer {self.number}")
            new = self.records.new_full((self.batch, size), -1)
            new[:, :held] = self.records
            self.records = new
            self.meter.set("host", f"layer {self.number} records", new.nbytes)

    def records_there(self, device: torch.device) -> Tensor:
        """``records`` on the device; entries from ``base`` on may be stale. Raises as :meth:`reserve`."""
        if self._there is None or self._there[0] is not self.records:
            what = f"the list of {self.records.shape[1]} chunks of layer {self.number}"
            self.meter.require("device", self.records.nbytes, what)
            # a copy on the CPU too: kernels that are interpreted see what others would
            self._there = self.records, upload(self.records.clone(), device)
            self._enter("records", self.records.nbytes)
        return self._there[1]

    def set_records(self, rows: Tensor, chunks: Tensor, numbers: Tensor) -> None:
        """Records [n] of ``chunks`` of ``rows``."""
        self.records[rows, chunks] = numbers
        if self._there is not None and self._there[0] is self.records:
            there = self._there[1]
            there[upload(rows, there.device), upload(chunks, there.device)] = upload(numbers, there.device)

    def select(self, rows: Tensor, device: torch.device) -> None:
        """Row i becomes row rows[i]."""
        there = upload(rows, device)
        self.lengths, self.base, self.records = self.lengths[rows], self.base[rows], self.records[rows]
        self.columns = [self.columns[i].copy() for i in rows.tolist()]
        for name, old in list(self.buffers.items()):
            self.buffers[name] = old.movedim(-2, 1).index_select(0, there).movedim(1, -2)
            self._enter(name, self.buffers[name].nbytes)
        self.meter.set("host", f"layer {self.number} records", self.records.nbytes)
        self.last_pages = None

    def snapshot(self) -> tuple[object, ...]:
        """What :meth:`restore` needs to undo later commits (records apart)."""
        kept = {n: x.clone() for n, x in self.buffers.items() if n.startswith(("sinks", "tail"))}
        return self.lengths.clone(), self.base.clone(), [c.copy() for c in self.columns], self.records.clone(), kept

    def restore(self, taken: tuple[object, ...]) -> None:
        self.lengths, self.base, self.columns, self.records, kept = taken  # type: ignore[assignment]
        for name, x in kept.items():  # type: ignore[attr-defined]
            self.buffers[name][:, : x.shape[1]] = x

    def _enter(self, name: str, size: int) -> None:
        self.meter.set("device", f"layer {self.number} {name}", size)
