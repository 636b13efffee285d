"""Which records exist, whose they are, and how many rows share them."""

from __future__ import annotations

import torch
from torch import Tensor

from .lists import added, enlarge

IDENTITY = 6  # csrc/io/page_file.h: store, layer, row, chunk, page of the record, generation


class Records:
    """Numbers of records, handed out lowest free first. A record never changes; rows that were copied share it."""

    def __init__(self, store: int, pages: int) -> None:
        self.store, self.pages = store, pages
        self.shares = torch.zeros(0, dtype=torch.int32)
        # layer, row, chunk, generation
        self.names = torch.zeros(0, 4, dtype=torch.int32)
        self.end = 0
        self._free: list[int] = []

    @property
    def nbytes(self) -> int:
        return self.shares.nbytes + self.names.nbytes

    def restore(self, other: Records) -> None:
        """The same records, under the name of this store."""
        self.shares, self.names, self.end = other.shares.clone(), other.names.clone(), other.end
        self._free = other._free.copy()

    def growth(self, count: int) -> int:
        """Bytes that taking ``count`` records may need."""
        end = self.end + max(0, count - len(self._free))
        return added(self.shares, end) + added(self.names, end)

    def take(self, layer: int, rows: Tensor, chunks: Tensor) -> Tensor:
        """New records [n] of ``chunks`` of ``rows`` of a layer, owned by one row each."""
        n = len(rows)
        self._free.sort(reverse=True)
        reused = [self._free.pop() for _ in range(min(n, len(self._free)))]
        fresh = range(self.end, self.end + n - len(reused))
        self.end = fresh.stop
        taken = torch.tensor([*reused, *fresh], dtype=torch.int64)
        self.shares, self.names = enlarge(self.shares, self.end), enlarge(self.names, self.end)
        self.shares[taken] = 1
        self.names[taken, 0] = layer
        self.names[taken, 1] = rows.int()
        self.names[taken, 2] = chunks.int()
        self.names[taken, 3] += 1
        return taken

    def share(self, records: Tensor) -> None:
        """One more owner for every entry."""
        self.shares.index_add_(0, records, torch.ones_like(records, dtype=torch.int32))

    def drop(self, records: Tensor) -> Tensor:
        """One owner less for every entry; returns the records that nobody owns any more."""
        if not len(records):
            return records
        self.shares.index_add_(0, records, torch.full_like(records, -1, dtype=torch.int32))
        gone = records.unique()
        gone = gone[self.shares[gone] == 0]
        self._free += gone.tolist()
        return gone

    def alive(self, pages: Tensor) -> Tensor:
        """bool [n]: pages of records that exist."""
        return self.shares[pages // self.pages] > 0

    def identity(self, pages: Tensor) -> Tensor:
        """int64 [n, 6] of pages, see :data:`IDENTITY`."""
        names = self.names[pages // self.pages].long()
        store = torch.full_like(pages, self.store)
        return torch.stack((store, names[:, 0], names[:, 1], names[:, 2], pages % self.pages, names[:, 3]), 1)

    def name(self, page: int) -> tuple[int, int, int]:
        """(layer, row it was written for, chunk) of a page."""
        layer, row, chunk, _ = self.names[page // self.pages].tolist()
        return layer, row, chunk

    def pages_of(self, records: Tensor) -> Tensor:
        """[n, pages] of records [n]."""
        return records[:, None] * self.pages + torch.arange(self.pages)
