"""The tier "disk": all records in a file, those used lately in a bank in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KVStoreError
from .bank import Bank
from .layout import Layout, aligned
from .meter import Meter
from .page_file import PageFile
from .records import Records


class Disk:
    """Pages are written when their chunk leaves the window, through the bank, where they stay as the youngest.

    The kernel's page cache is passed by (or dropped), so that the bank is the only cache and its size the whole cost.
    """

    resident = False
    on_device = False

    def __init__(
        self,
        directory: str,
        slots: int,
        layout: Layout,
        records: Records,
        meter: Meter,
        *,
        depth: int,
        backend: str,
        direct: bool,
        pinned: bool,
        cycle: int = 1,
    ) -> None:
        self.layout, self.meter, self.records = layout, meter, records
        size = slots * layout.stride
        meter.require("host", size, f"a bank of {slots} pages of {layout.stride} bytes")
        meter.set("host", "bank", size)
        self.bank = Bank(slots, cycle)
        self.memory = aligned(slots, layout.stride, pinned)
        self.file = PageFile(
            directory, self.memory, layout.page_bytes, records, depth=depth, backend=backend, direct=direct
        )
        self._account()
        self.hits = self.misses = self.prefetched = 0
        self._coming: tuple[int, Tensor] | None = None

    def write(self, records: Tensor, pages: Tensor) -> None:
        numbers = self.records.pages_of(records).flatten()
        data = pages.flatten(0, 1)
        self._arrive()
        if not len(numbers):
            return
        end = int(numbers.max()) + 1
        self.meter.require("host", self.bank.growth(end) + self.file.growth(end), f"the lists of {end} pages")
        # at once: lists that grow by a piece after the other may end larger
        self.bank.know(end)
        self.file.know(end)
        self._account()
        try:
            for piece, part in zip(numbers.split(self.bank.slots), data.split(self.bank.slots), strict=True):
                self.bank.find(piece)
                slots = self.bank.place(piece)
                self.memory[slots, : self.layout.page_bytes] = part.to("cpu")
                self.file.write(slots, piece)
        except BaseException:
            self.bank.drop(numbers)
            raise
        self._account()

    def groups(self, pages: Tensor, group: Tensor) -> Tensor:
        layout = self.layout
        wanted, where = pages.unique(return_inverse=True)
        if len(wanted) <= self.bank.slots:
            return layout.groups(self.memory, self._resident(wanted)[where], group)
        out = torch.empty(len(pages), 2, layout.group_size, layout.head_dim, dtype=layout.dtype)
        for start in range(0, len(wanted), self.bank.slots):
            piece = wanted[start : start + self.bank.slots]
            slots = self._resident(piece)
            there = ((where >= start) & (where < start + len(piece))).nonzero().flatten()
            out[there] = layout.groups(self.memory, slots[where[there] - start], group[there])
        return out

    def pages(self, pages: Tensor) -> Tensor:
        out = torch.empty(len(pages), self.layout.page_bytes, dtype=torch.uint8)
        for start in range(0, len(pages), self.bank.slots):
            piece = slice(start, start + self.bank.slots)
            out[piece] = self.memory[self._resident(pages[piece]), : self.layout.page_bytes]
        return out

    def located(self, pages: Tensor) -> Tensor | None:
        if len(pages) > self.bank.slots:
            return None
        return self._resident(pages) * self.layout.stride + self.memory.data_ptr()

    def free(self, pages: Tensor) -> None:
        self._arrive()
        self.bank.drop(pages)

    def prefetch(self, pages: Tensor) -> None:
        self._arrive()
        # what the present request uses stays
        absent = self.bank.absent(pages)[: self.bank.unused()]
        if not len(absent):
            return
        try:
            slots = self.bank.place(absent)
            request = self.file.begin(slots, absent, ahead=True)
            self._coming = request, absent
        except BaseException:
            self._forget(absent)
            raise
        self.prefetched += len(absent)

    def counters(self) -> dict[str, float]:
        file = self.file.counters()
        return {
            **file,
            "hits": self.hits,
            "misses": self.misses,
            "prefetched": self.prefetched,
            "bytes_moved": int(file["bytes_read"] + file["bytes_written"]),
        }

    def close(self) -> None:
        self._coming = None
        self.file.close()
        self.memory = torch.empty(0, self.layout.stride, dtype=torch.uint8)
        for tier in ("host", "disk"):
            for account in ("bank", "lists", "file"):
                self.meter.set(tier, account, 0)

    def _resident(self, pages: Tensor) -> Tensor:
        """Slots of distinct pages, read and verified where they were not here; at most as many as the bank holds."""
        self._arrive()
        slots = self.bank.find(pages)
        absent = (slots < 0).nonzero().flatten()
        self.hits += len(pages) - len(absent)
        self.misses += len(absent)
        if len(absent):
            missing = pages[absent]
            try:
                slots[absent] = self.bank.place(missing)
                self.file.end(self.file.begin(slots[absent], missing), missing)
            except BaseException:
                self._forget(missing)
                raise
        return slots

    def _arrive(self) -> None:
        """Wait for what was prefetched; if any of it failed, all of it counts as absent."""
        if self._coming is None:
            return
        request, pages = self._coming
        try:
            self._coming = None
            self.file.end(request, pages)
        except KVStoreError:
            self.bank.drop(pages)
        except BaseException:
            self._forget(pages)
            raise

    def _forget(self, pages: Tensor) -> None:
        """Pages whose transfers may still be on their way are absent, and their slots free, once these have ended."""
        self._coming = None
        self.file.drain()
        self.bank.drop(pages)

    def _account(self) -> None:
        self.meter.set("host", "lists", self.bank.nbytes + self.file.nbytes)
        self.meter.set("disk", "file", int(self.file.counters()["file_bytes"]))
