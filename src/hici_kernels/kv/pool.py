"""Records that stay in memory: the tiers "device" and "host"."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _native
from . import on_device
from .layout import Layout
from .meter import Meter
from .on_device import upload

LARGEST = 64 << 20  # bytes of a slab


class Pool:
    """Slabs of records, each as large as all before it up to :data:`LARGEST`, or what the limit still allows."""

    resident = True

    def __init__(self, where: str, device: torch.device, layout: Layout, meter: Meter, *, pinned: bool = False) -> None:
        self.where, self.device, self.layout, self.meter, self.pinned = where, device, layout, meter, pinned
        self.record_bytes = layout.pages * layout.page_bytes
        self.slabs: list[Tensor] = []  # uint8 [records, pages, page_bytes]
        self.starts = torch.zeros(0, dtype=torch.int64)
        self.first_pages = self.starts.numpy()  # of every slab
        self.origins = torch.zeros(0, dtype=torch.int64)  # address of record 0, were it in the slab
        self.room = 0
        self._tables: tuple[Tensor, Tensor] | None = None
        self.on_device = where == "device" and on_device.refusal(device, layout) is None

    def write(self, records: Tensor, pages: Tensor) -> None:
        if not len(records):
            return
        self._grow(int(records.max()) + 1)
        for slab, there, index in self._located(records):
            slab[upload(index, self.device)] = pages[upload(there, pages.device)].to(self.device)

    def groups(self, pages: Tensor, group: Tensor) -> Tensor:
        layout = self.layout
        shape = (len(pages), 2, layout.group_size, layout.head_dim)
        out = torch.empty(shape, dtype=layout.dtype, device=self.device)
        record, page = pages // layout.pages, pages % layout.pages
        for slab, there, index in self._located(record):
            at = (index * layout.pages + page[there]).to(self.device)
            out[there.to(self.device)] = layout.groups(slab.flatten(0, 1), at, group[there].to(self.device))
        return out

    def pages(self, pages: Tensor) -> Tensor:
        out = torch.empty(len(pages), self.layout.page_bytes, dtype=torch.uint8, device=self.device)
        record, page = pages // self.layout.pages, pages % self.layout.pages
        for slab, there, index in self._located(record):
            out[there.to(self.device)] = slab[index.to(self.device), page[there].to(self.device)]
        return out

    def located(self, pages: Tensor) -> Tensor | None:
        # numpy: PyTorch's search wakes threads for a few hundred numbers
        slab = np.searchsorted(self.first_pages, pages.numpy(), side="right") - 1
        return self.origins[torch.from_numpy(slab)] + pages * self.layout.page_bytes

    def addresses(self, pages: Tensor, device: torch.device | None = None) -> Tensor:
        """int64 [n] of pages int64 [n] on ``device`` (None = that of the records), which must be able to read them."""
        if not self.slabs:
            return torch.zeros_like(pages)
        if self._tables is None:
            where = self.device if device is None else device
            self._tables = upload(torch.from_numpy(self.first_pages), where), upload(self.origins, where)
        first, origins = self._tables
        slab = torch.searchsorted(first, pages.clamp(min=0), right=True) - 1
        return torch.where(pages < 0, 0, origins[slab] + pages * self.layout.page_bytes)

    def free(self, pages: Tensor) -> None:
        """Slabs stay for later records."""

    def prefetch(self, pages: Tensor) -> None:
        """Everything is here."""

    def counters(self) -> dict[str, Any]:
        return {"hits": 0, "misses": 0, "bytes_moved": 0, "busy_s": 0.0, "stall_s": 0.0}

    def close(self) -> None:
        self._tables = None
        self.slabs, self.starts, self.origins, self.room = [], self.starts[:0], self.origins[:0], 0
        self.meter.set(self.where, "records", 0)

    def _located(self, records: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(slab, positions in ``records``, rows of the slab) of every slab that holds some of them."""
        slab = torch.bucketize(records, self.starts, right=True) - 1
        found = []
        for i in slab.unique().tolist():
            there = (slab == i).nonzero().flatten()
            found.append((self.slabs[i], there, records[there] - self.starts[i]))
        return found

    def _grow(self, needed: int) -> None:
        while self.room < needed:
            missing = needed - self.room
            fill = max(1, LARGEST // self.record_bytes)
            count = max(missing, min(max(self.room, 8), fill))
            if not self.meter.fits(self.where, count * self.record_bytes):
                count = missing
            size = count * self.record_bytes
            self.meter.require(self.where, size, f"a history of {needed} records of {self.record_bytes} bytes")
            shape = (count, self.layout.pages, self.layout.page_bytes)
            slab = torch.empty(shape, dtype=torch.uint8, device=self.device, pin_memory=self.pinned)
            if slab.is_cpu and not self.pinned and _native.status() is None:
                _native.library().hga_large_pages(slab)
            self.slabs.append(slab)
            self.starts = torch.cat((self.starts, torch.tensor([self.room])))
            self.first_pages = (self.starts * self.layout.pages).numpy()
            origin = self.slabs[-1].data_ptr() - self.room * self.record_bytes
            self.origins = torch.cat((self.origins, torch.tensor([origin])))
            self.room += count
            self._tables = None
            self.meter.set(self.where, "records", self.room * self.record_bytes)
