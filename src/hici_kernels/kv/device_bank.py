"""A bank in device memory above the tiers "host" and "disk".

Pages come to it as the host gathers and copies them, or (``fetch="gather"``) as a kernel reads them where they lie in
pinned memory. That kernel runs when it runs: whatever may write to host memory waits for it first.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from .._dispatch import select
from .bank import Bank
from .layout import Layout
from .meter import Meter
from .tier import Tier


class DeviceBank:
    """Pages that were used lately, on the device; ``slots`` of them. A request for more is served without the bank."""

    resident = False
    on_device = False

    def __init__(
        self,
        lower: Tier,
        slots: int,
        device: torch.device,
        layout: Layout,
        meter: Meter,
        cycle: int = 1,
        fetch: str = "copy",
    ) -> None:
        self._lower, self.layout, self.meter, self.device, self.fetch = lower, layout, meter, device, fetch
        self._reading: torch.cuda.Event | None = None
        size = slots * layout.page_bytes
        meter.require("device", size, f"a bank of {slots} pages")
        self.bank = Bank(slots, cycle)
        meter.require("host", self.bank.nbytes, f"the list of a bank of {slots} pages")
        meter.set("device", "bank", size)
        self.memory = torch.empty(slots, layout.page_bytes, dtype=torch.uint8, device=device)
        self._enter_lists()
        self.hits = self.misses = self.moved = 0
        self.busy = 0.0

    def __del__(self) -> None:
        reading = getattr(self, "_reading", None)
        if reading is not None:
            reading.synchronize()  # a kernel may read the memory below, which goes away with this

    @property
    def lower(self) -> Tier:
        """The tier below, when no kernel reads its memory any more."""
        if self._reading is not None:
            self._reading.synchronize()
            self._reading = None
        return self._lower

    def write(self, records: Tensor, pages: Tensor) -> None:
        self.lower.write(records, pages)

    def groups(self, pages: Tensor, group: Tensor) -> Tensor:
        layout = self.layout
        wanted, where = pages.unique(return_inverse=True)
        found = self._find(wanted)
        if len(wanted) <= self.bank.slots:
            return layout.groups(self.memory, found[where].to(self.device), group.to(self.device))
        shape = (len(pages), 2, layout.group_size, layout.head_dim)
        out = torch.empty(shape, dtype=layout.dtype, device=self.device)
        here = found[where] >= 0
        at, away = here.nonzero().flatten(), (~here).nonzero().flatten()
        slots = found[where[at]].to(self.device)
        out[at.to(self.device)] = layout.groups(self.memory, slots, group[at].to(self.device))
        began = time.perf_counter()
        out[away.to(self.device)] = self.lower.groups(pages[away], group[away]).to(self.device)
        self.busy += time.perf_counter() - began
        return out

    def pages(self, pages: Tensor) -> Tensor:
        return self.lower.pages(pages)

    def located(self, pages: Tensor) -> Tensor | None:
        if len(pages) > self.bank.slots:
            return None
        return self._find(pages) * self.layout.page_bytes + self.memory.data_ptr()

    def free(self, pages: Tensor) -> None:
        self.bank.drop(pages)
        self.lower.free(pages)

    def prefetch(self, pages: Tensor) -> None:
        self._lower.prefetch(self.bank.absent(pages))

    def counters(self) -> dict[str, Any]:
        below = self.lower.counters()
        own = {"hits": self.hits, "misses": self.misses, "bytes_moved": self.moved + below["bytes_moved"]}
        return below | own | {"busy_s": self.busy + below["busy_s"], "stall_s": self.busy + below["stall_s"]}

    def close(self) -> None:
        self.memory = self.memory[:0].clone()
        self.meter.set("device", "bank", 0)
        self.meter.set("host", "device bank", 0)
        self.lower.close()

    def _enter_lists(self) -> None:
        self.meter.set("host", "device bank", self.bank.nbytes)

    def _find(self, wanted: Tensor) -> Tensor:
        """Slots of distinct pages, brought here if all of them fit together, else -1 for those that are not here."""
        if len(wanted):
            self.meter.require("host", self.bank.growth(int(wanted.max()) + 1), "the list of pages")
        found = self.bank.find(wanted)
        self._enter_lists()
        absent = (found < 0).nonzero().flatten()
        self.hits += len(wanted) - len(absent)
        self.misses += len(absent)
        self.moved += len(absent) * self.layout.page_bytes
        if len(wanted) <= self.bank.slots and len(absent):
            arrived = self._fetch(wanted[absent])
            found[absent] = self.bank.place(wanted[absent])
            self.memory[found[absent].to(self.device)] = arrived
        return found

    def _fetch(self, pages: Tensor) -> Tensor:
        began = time.perf_counter()
        at = self.lower.located(pages) if self.fetch == "gather" else None
        if at is None:
            arrived = self.lower.pages(pages).to(self.device)
        else:
            given = at, self.layout.page_bytes, self.device
            arrived = select("gather_rows", "triton", *given).forward(*given)
            if self.device.type == "cuda":
                self._reading = torch.cuda.Event()
                self._reading.record(torch.cuda.current_stream(self.device))
        self.busy += time.perf_counter() - began
        return arrived
