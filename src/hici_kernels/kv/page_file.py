"""The file of the tier "disk": csrc/io/page_file.cpp behind checks and KVStoreError."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..errors import ImplError, KVStoreError
from .lists import added, enlarge
from .records import Records

OK, ERROR, TRUNCATED, CHECKSUM, FORKED, CLOSED = range(6)


def require_native() -> None:
    """
    Raises:
        ImplError: no native library, which makes the file.
    """
    reason = _native.status()
    if reason is not None:
        raise ImplError(f"tier='disk' needs the native library: {reason}")


class PageFile:
    """Pages of ``bank`` [slots, stride] written to and read from a nameless file in ``directory``.

    Reads are verified: a page carries a checksum over its contents, store, layer, row, chunk, part and generation,
    kept in memory, so that a page which was changed, misplaced, left over or never written is not taken for another.

    Args:
        directory: must exist.
        bank: uint8 [slots, stride], see :func:`~.layout.aligned`.
        page_bytes: of every slot that are used.
        records: whose the pages are.
        depth: transfers in flight.
        backend: "auto" = "uring" (io_uring) where the kernel allows it, else "threads".
        direct: ask for direct transfers (past the page cache); file systems without them get buffered ones, dropped
            from the cache afterwards.

    Raises:
        ImplError: no native library. KVStoreError: the file cannot be made.
    """

    def __init__(
        self,
        directory: str,
        bank: Tensor,
        page_bytes: int,
        records: Records,
        *,
        depth: int,
        backend: str = "auto",
        direct: bool = True,
    ) -> None:
        require_native()
        self.records, self.directory = records, directory
        self.sums = torch.zeros(0, dtype=torch.int64)
        outcome = torch.zeros(3, dtype=torch.int64)
        opened = _native.library().page_file_open(directory, bank, page_bytes, depth, backend, direct, outcome)
        if outcome[0]:
            number = int(outcome[2])
            raise KVStoreError(f"path {directory!r}: no file can be made there: {_reason(number)}", file=directory)
        self._call: dict[str, Callable[..., Any]] = {str(k): opened[k] for k in opened}
        self.name, self.backend = str(opened["name"]), str(opened["backend"])
        self.direct = bool(opened["direct"])
        self.depth, self.descriptor = depth, int(opened["descriptor"])

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes

    def growth(self, pages: int) -> int:
        """Bytes that knowing pages [0, pages) may need."""
        return added(self.sums, pages)

    def know(self, pages: int) -> None:
        """Make room for the checksums of pages [0, pages)."""
        self.sums = enlarge(self.sums, pages)

    def write(self, slots: Tensor, pages: Tensor) -> None:
        """Write the pages in ``slots``, and wait."""
        last = int(pages.max()) + 1
        outcome = torch.zeros(3, dtype=torch.int64)
        self._call["reserve"](last, outcome)
        self._check(outcome, pages[:1], "writing")
        self.know(last)
        sums = torch.zeros(len(pages), dtype=torch.int64)
        try:
            request = self._call["write"](slots, pages, self.records.identity(pages))
            self._call["wait"](request, sums, outcome)
        except BaseException:
            self.drain()
            raise
        self._check(outcome, pages, "writing")
        self.sums[pages] = sums

    def begin(self, slots: Tensor, pages: Tensor, *, ahead: bool = False) -> int:
        """Begin to read pages into slots; returns the request. ahead: a thread of the file carries it on meanwhile."""
        return int(self._call["read"](slots, pages, self.records.identity(pages), self.sums[pages], ahead))

    def end(self, request: int, pages: Tensor) -> None:
        """Wait for a request of these pages, each of which is then verified."""
        outcome = torch.zeros(3, dtype=torch.int64)
        self._call["wait"](request, torch.zeros(0, dtype=torch.int64), outcome)
        self._check(outcome, pages, "reading")

    def drain(self) -> None:
        """Wait for all transfers: what an interrupt cut off from its request must not move into slots given away."""
        self._call["drain"]()

    def counters(self) -> dict[str, float]:
        return {str(k): float(v) for k, v in self._call["counters"]().items()}

    def inject(self, write: bool, kind: str, value: int, skip: int = 0, times: int = 1) -> None:
        """Faults for tests: "error" (value: errno), "short" (bytes that do move), "flip" (bit), of reads or writes."""
        self._call["inject"](write, kind, value, skip, times)

    def clear_faults(self) -> None:
        self._call["clear_faults"]()

    def close(self) -> None:
        self._call["close"]()

    def _check(self, outcome: Tensor, pages: Tensor, doing: str) -> None:
        code, item, number = outcome.tolist()
        if code == OK:
            return
        if code == FORKED:
            raise KVStoreError(f"{self.name} belongs to the process that made it, not to a fork of it", file=self.name)
        if code == CLOSED:
            raise ValueError("this KVStore is closed, expected an open one")
        what = {
            ERROR: _reason(number),
            TRUNCATED: "the file ends before it",
            CHECKSUM: "its bytes are not those that were written",
        }.get(code, f"outcome {code}")
        layer, row, chunk = self.records.name(int(pages[max(item, 0)]))
        raise KVStoreError(
            f"{doing} chunk {chunk} of row {row} in layer {layer} failed: {what} (file {self.name})",
            layer=layer,
            row=row,
            chunk=chunk,
            file=self.name,
        )


def _reason(number: int) -> str:
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
