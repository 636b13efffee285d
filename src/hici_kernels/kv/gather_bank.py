"""A bank in device memory above pinned host memory that the device itself keeps.

Which pages a request needs, which of them are here, which leave and which are to be fetched is computed on the device;
one kernel fetches those that are missing from where they lie in host memory. The host asks nothing and waits for
nothing but to write to memory that a kernel may still read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import on_device
from .layout import Layout
from .lists import room
from .meter import Meter
from .on_device import upload
from .pool import Pool

#: when a slot was used that holds no page: before everything
UNUSED = -(1 << 40)
LATEST = torch.iinfo(torch.int64).max


class GatherBank:
    """Pages that were used lately, on the device; ``slots`` of them (0: every group is read in host memory).

    Of a request that does not fit the first misses are brought here and the others are read where they lie. Who leaves
    is as in :class:`~.bank.Bank`: the least recently used page, or, where even that was used within the last ``cycle``
    requests, the one used most recently before this request.
    """

    resident = False
    on_device = True

    def __init__(
        self, lower: Pool, slots: int, device: torch.device, layout: Layout, meter: Meter, cycle: int = 1
    ) -> None:
        self._lower, self.slots, self.device, self.layout, self.meter = lower, slots, device, layout, meter
        self.cycle = max(cycle, 1)
        self._readers: set[torch.cuda.Stream] = set()
        self._pages = 0  # that the lists know
        size = slots * (layout.page_bytes + 16)
        meter.require("device", size, f"a bank of {slots} pages")
        meter.set("device", "bank", size)
        self.memory = torch.empty(slots, layout.page_bytes, dtype=torch.uint8, device=device)
        # one more of each: what has no slot, or no page, is written there
        self.page = torch.full((slots + 1,), -1, dtype=torch.int64, device=device)
        self.used = torch.full((slots + 1,), UNUSED, dtype=torch.int64, device=device)
        self.slot = torch.full((1,), -1, dtype=torch.int32, device=device)
        self.now = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # hits, misses, those that got a slot

    def __del__(self) -> None:
        self._settle()  # a kernel may read what goes away with this

    @property
    def lower(self) -> Pool:
        """The records, when no kernel reads them any more."""
        self._settle()
        return self._lower

    def write(self, records: Tensor, pages: Tensor) -> None:
        self.lower.write(records, pages)

    def groups(self, pages: Tensor, group: Tensor) -> Tensor:
        at = self.addresses(upload(pages, self.device))
        return on_device.groups_at(at, upload(group, self.device), self.layout).transpose(0, 1)

    def pages(self, pages: Tensor) -> Tensor:
        return self._lower.pages(pages)

    def located(self, pages: Tensor) -> Tensor | None:
        return self._lower.located(pages)

    def addresses(self, pages: Tensor) -> Tensor:
        """int64 [n], readable on the device, of pages int64 [n] there; -1 = none, whose address is 0."""
        self._know(self._lower.room * self.layout.pages)
        ordered, order = pages.sort(stable=True)
        there = ordered >= 0
        at = torch.where(there, self._lower.addresses(ordered.clamp(min=0), self.device), 0)
        if self.slots and len(pages):
            self._bring(ordered, there, at)
            slot = self.slot[torch.where(there, ordered, self._pages)].long()
            here = self.memory.data_ptr() + slot * self.layout.page_bytes
            at = torch.where(slot >= 0, here, at)
        if self.device.type == "cuda":
            # what is fetched here, and the groups read after it
            self._readers.add(torch.cuda.current_stream(self.device))
        return torch.empty_like(at).scatter_(0, order, at)

    def free(self, pages: Tensor) -> None:
        """Forget pages; their slots are the next to be taken."""
        pages = upload(pages[pages < self._pages], self.device)
        if self.slots and len(pages):
            slot = self.slot[pages].long()
            slot = torch.where(slot < 0, self.slots, slot)
            self.page[slot] = -1
            self.used[slot] = UNUSED
            self.slot[pages] = -1
        self._lower.free(pages)

    def prefetch(self, pages: Tensor) -> None:
        """A layer's kernel reads when it runs; nothing is faster to begin."""

    def counters(self) -> dict[str, Any]:
        hits, misses, brought = self.counts.tolist()
        moved = brought * self.layout.page_bytes
        # seconds are the device's, and nobody waits for them
        return {"hits": hits, "misses": misses, "bytes_moved": moved, "busy_s": 0.0, "stall_s": 0.0}

    def close(self) -> None:
        self.lower.close()
        self.memory, self.slots = self.memory[:0].clone(), 0
        for name in ("bank", "bank lists"):
            self.meter.set("device", name, 0)

    def _settle(self) -> None:
        while self._readers:
            self._readers.pop().synchronize()

    def _know(self, pages: int) -> None:
        """Lists for pages [0, pages)."""
        if not self.slots or pages <= self._pages:
            return
        count = room(self._pages, pages)
        self.meter.require("device", 4 * (count + 1), f"the list of {count} pages of the bank")
        new = torch.full((count + 1,), -1, dtype=torch.int32, device=self.device)
        new[: self._pages] = self.slot[: self._pages]
        self.slot, self._pages = new, count
        self.meter.set("device", "bank lists", new.nbytes)

    def _bring(self, ordered: Tensor, there: Tensor, at: Tensor) -> None:
        """A request for rising pages ``ordered`` [n], those that are ``there``, at addresses ``at`` of host memory."""
        slots, nobody = self.slots, self._pages
        fresh = there.clone()
        fresh[1:] &= ordered[1:] != ordered[:-1]
        slot = self.slot[torch.where(fresh, ordered, nobody)].long()
        hit, miss = fresh & (slot >= 0), fresh & (slot < 0)
        self.now += 1
        self.used[torch.where(hit, slot, slots)] = self.now
        used = self.used[:slots]
        free = slots - (used == self.now).sum()
        # oldest first, then those of this cycle, newest first; what this request uses last
        turn = torch.where(used <= self.now - self.cycle, used, (LATEST - 1) - used)
        leaving = torch.where(used == self.now, LATEST, turn).sort(stable=True).indices
        rank = miss.cumsum(0) - 1
        brought = miss & (rank < free)
        victim = torch.where(brought, leaving[rank.clamp(0, slots - 1)], slots)
        gone = self.page[victim]
        self.slot[torch.where(gone >= 0, gone, nobody)] = -1
        page = torch.where(brought, ordered, -1)
        self.page[victim] = page
        self.used[victim] = self.now
        self.slot[torch.where(brought, ordered, nobody)] = torch.where(brought, victim, -1).int()
        self.counts += torch.stack((hit.sum(), miss.sum(), brought.sum()))
        aligned = self.layout.page_bytes % 16 == 0
        on_device.read(torch.where(brought, at, 0), self.layout.page_bytes, aligned, self.memory, victim)
