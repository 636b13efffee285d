"""Bank: which pages are in a fast memory of fixed size; the least recently used one leaves first."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from .lists import added, enlarge

#: When a slot was used that is free: before every request and every cycle.
_FREE = -(1 << 40)


class Bank:
    """Book-keeping for ``slots`` places of one page each, asked by ``cycle`` users in turn (the layers of a model).

    The least recently used page leaves, unless even that one was used within the last cycle: then the pages of a
    cycle do not fit, and the oldest one is exactly what is asked for next. The page used most recently before this
    request leaves instead, since its turn is furthest away, and as much of a cycle stays as fits.

    Old victims come from a list of the oldest slots, sorted once for many evictions: a slot that was used since it was
    listed is passed over, and one that is not listed is younger than all that are, so the order is that of a full sort.
    """

    def __init__(self, slots: int, cycle: int = 1) -> None:
        self.slots, self.cycle = slots, cycle
        self.page = torch.full((slots,), -1, dtype=torch.int64)  # of every slot, -1 = none
        self.used = torch.zeros(slots, dtype=torch.int64)  # when
        self.slot = torch.full((0,), -1, dtype=torch.int32)  # of every page
        self.now = 0
        self._empty = slots  # slots [slots - empty, slots) were never filled
        self._oldest = torch.zeros(0, dtype=torch.int64)
        self._listed = torch.zeros(0, dtype=torch.int64)  # when they had been used
        self._sort_at = 0  # before then nothing is old enough
        self._recent: deque[tuple[int, Tensor]] = deque()  # slots used within a cycle, newest last

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.page, self.used, self.slot))

    def growth(self, pages: int) -> int:
        """Bytes that knowing pages [0, pages) may need."""
        return added(self.slot, pages)

    def know(self, pages: int) -> None:
        """Make room for pages [0, pages)."""
        self.slot = enlarge(self.slot, pages, -1)

    def absent(self, pages: Tensor) -> Tensor:
        """Those of pages [n] that are not here; nothing counts as used."""
        known = pages < len(self.slot)
        return pages[~known | (self.slot[torch.where(known, pages, 0)] < 0)] if len(self.slot) else pages

    def find(self, pages: Tensor) -> Tensor:
        """Slots [n] of pages [n], -1 where one is not here; those that are count as used now. A new request."""
        self.know(int(pages.max()) + 1 if len(pages) else 0)
        found = self.slot[pages].long()
        self.now += 1
        self._use(found[found >= 0])
        return found

    def place(self, pages: Tensor) -> Tensor:
        """Slots for pages [n] that are not here, n at most the slots that the present request does not use."""
        n = len(pages)
        fresh = min(n, self._empty)
        taken = torch.arange(self.slots - self._empty, self.slots - self._empty + fresh)
        self._empty -= fresh
        if fresh < n:
            taken = torch.cat((taken, self._evict(n - fresh, taken)))
        self.page[taken] = pages
        self.slot[pages] = taken.int()
        self._use(taken)
        return taken

    def unused(self) -> int:
        """Slots that the present request does not use."""
        return self.slots - int((self.used == self.now).sum()) if self.now else self.slots

    def drop(self, pages: Tensor) -> None:
        """Pages that are here leave; their slots are the next to be taken."""
        pages = pages[pages < len(self.slot)]
        slots = self.slot[pages].long()
        slots = slots[slots >= 0]
        self.slot[pages] = -1
        self.page[slots] = -1
        self.used[slots] = _FREE
        # what is listed first must be the oldest
        self._oldest = torch.cat((slots, self._oldest))
        self._listed = torch.cat((torch.full_like(slots, _FREE), self._listed))

    def _use(self, slots: Tensor) -> None:
        self.used[slots] = self.now
        if len(slots):
            self._recent.append((self.now, slots))
        while self._recent and self._recent[0][0] <= self.now - max(self.cycle, 1):
            self._recent.popleft()

    def _evict(self, count: int, busy: Tensor) -> Tensor:
        self.used[busy] = self.now
        taken = self._old(count)
        if len(taken) < count:
            taken = torch.cat((taken, self._young(count - len(taken))))
        gone = self.page[taken]
        self.slot[gone[gone >= 0]] = -1
        return taken

    def _old(self, count: int) -> Tensor:
        """Up to ``count`` slots not used within a cycle, oldest first."""
        parts, missing, limit = [self._oldest[:0]], count, self.now - max(self.cycle, 1)
        while True:
            fits = (self.used[self._oldest] == self._listed) & (self._listed <= limit)
            at = fits.nonzero().flatten()[:missing]
            if len(at):
                parts.append(self._oldest[at])
                self.used[parts[-1]] = self.now
                missing -= len(at)
                self._oldest, self._listed = self._oldest[int(at[-1]) + 1 :], self._listed[int(at[-1]) + 1 :]
            if not missing or self.now < self._sort_at:
                return torch.cat(parts)
            self._oldest = torch.argsort(self.used, stable=True)[: max(count, self.slots // 4)]
            self._listed = self.used[self._oldest]
            if int(self._listed[0]) > limit:
                self._sort_at = int(self._listed[0]) + max(self.cycle, 1)

    def _young(self, count: int) -> Tensor:
        """``count`` slots used within the last cycle, most recent first, but none of the present request."""
        parts, missing = [], count
        for when, slots in reversed(self._recent):
            free = slots[self.used[slots] == when] if when < self.now else slots[:0]
            if len(free):
                parts.append(free[:missing])
                self.used[parts[-1]] = self.now
                missing -= len(parts[-1])
            if not missing:
                break
        return torch.cat(parts)
