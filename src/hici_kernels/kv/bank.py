"""Bank: which pages are in a fast memory of fixed size; the least recently used one leaves first."""

from __future__ import annotations

import torch
from torch import Tensor

from .lists import added, enlarge


class Bank:
    """Book-keeping for ``slots`` places of one page each.

    Victims come from a list of the oldest slots, sorted once for many evictions: a slot that was used since it was
    listed is passed over, and one that is not listed is younger than all that are, so the order is that of a full sort.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.page = torch.full((slots,), -1, dtype=torch.int64)  # of every slot, -1 = none
        self.used = torch.zeros(slots, dtype=torch.int64)  # when
        self.slot = torch.full((0,), -1, dtype=torch.int32)  # of every page
        self.now = 0
        self._empty = slots  # slots [slots - empty, slots) were never filled
        self._oldest = torch.zeros(0, dtype=torch.int64)
        self._listed = torch.zeros(0, dtype=torch.int64)  # when they had been used

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.page, self.used, self.slot))

    def growth(self, pages: int) -> int:
        """Bytes that knowing pages [0, pages) may need."""
        return added(self.slot, pages)

    def absent(self, pages: Tensor) -> Tensor:
        """Those of pages [n] that are not here; nothing counts as used."""
        known = pages < len(self.slot)
        return pages[~known | (self.slot[torch.where(known, pages, 0)] < 0)] if len(self.slot) else pages

    def find(self, pages: Tensor) -> Tensor:
        """Slots [n] of pages [n], -1 where one is not here; those that are count as used now."""
        self.slot = enlarge(self.slot, int(pages.max()) + 1 if len(pages) else 0, -1)
        found = self.slot[pages].long()
        self.now += 1
        self.used[found[found >= 0]] = self.now
        return found

    def place(self, pages: Tensor) -> Tensor:
        """Slots for pages [n] that are not here, n at most the slots not used by the last :meth:`find`."""
        n = len(pages)
        fresh = min(n, self._empty)
        taken = torch.arange(self.slots - self._empty, self.slots - self._empty + fresh)
        self._empty -= fresh
        if fresh < n:
            taken = torch.cat((taken, self._evict(n - fresh, taken)))
        self.page[taken] = pages
        self.slot[pages] = taken.int()
        self.used[taken] = self.now
        return taken

    def drop(self, pages: Tensor) -> None:
        """Pages that are here leave; their slots are the next to be taken."""
        pages = pages[pages < len(self.slot)]
        slots = self.slot[pages].long()
        slots = slots[slots >= 0]
        self.slot[pages] = -1
        self.page[slots] = -1
        self.used[slots] = 0
        # what is listed first must be the oldest
        self._oldest = torch.cat((slots, self._oldest))
        self._listed = torch.cat((torch.zeros_like(slots), self._listed))

    def _evict(self, count: int, busy: Tensor) -> Tensor:
        self.used[busy] = self.now
        parts, missing = [], count
        while missing:
            fits = (self.used[self._oldest] == self._listed) & (self._listed < self.now)
            at = fits.nonzero().flatten()[:missing]
            if len(at):
                parts.append(self._oldest[at])
                self.used[parts[-1]] = self.now
                missing -= len(at)
            if missing:
                self._oldest = torch.argsort(self.used, stable=True)[: max(count, self.slots // 4)]
                self._listed = self.used[self._oldest]
            else:
                self._oldest, self._listed = self._oldest[int(at[-1]) + 1 :], self._listed[int(at[-1]) + 1 :]
        taken = torch.cat(parts)
        gone = self.page[taken]
        self.slot[gone[gone >= 0]] = -1
        return taken
