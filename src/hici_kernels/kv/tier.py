"""What a tier of the history does: it keeps records and hands out groups of their pages."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Tier(Protocol):
    """Pages and records are numbered by :class:`~.records.Records`. Nothing here is differentiable."""

    #: everything is always at hand: :meth:`prefetch` does nothing
    resident: bool
    #: it is a :class:`Finder`
    on_device: bool

    def write(self, records: Tensor, pages: Tensor) -> None:
        """Store new records [n] of uint8 [n, pages, page_bytes].

        Raises:
            ValueError: a byte limit; KVStoreError: the storage failed. None of the records is stored then.
        """

    def groups(self, pages: Tensor, group: Tensor) -> Tensor:
        """[n, 2, group_size, D] on the tier's fastest memory: group ``group[i]`` of page ``pages[i]``.

        Raises:
            KVStoreError: a page is missing or fails its check.
        """

    def pages(self, pages: Tensor) -> Tensor:
        """uint8 [n, page_bytes]: whole pages. Raises as :meth:`groups`."""

    def located(self, pages: Tensor) -> Tensor | None:
        """int64 [n], addresses in CPU memory of distinct pages, valid until the next call of the tier but for
        :meth:`prefetch`; None where they cannot all be at hand together. Raises as :meth:`groups`."""

    def free(self, pages: Tensor) -> None:
        """Forget pages [n]."""

    def prefetch(self, pages: Tensor) -> None:
        """Begin to bring pages nearer, without waiting; failures show when they are used."""

    def counters(self) -> dict[str, Any]:
        """hits, misses, bytes_moved, busy_s, stall_s, and what else the tier counts."""

    def close(self) -> None:
        """Let go of memory and files."""


class Finder(Tier, Protocol):
    """A tier whose pages the device finds without the host."""

    def addresses(self, pages: Tensor) -> Tensor:
        """int64 [n] on the device of pages int64 [n] there, for kernels to read until the next call of the tier; -1 =
        none, whose address is 0. Waits for nothing."""
