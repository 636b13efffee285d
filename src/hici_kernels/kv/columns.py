"""The column every stored token of a row stood in: its default RoPE position, padding counted."""

from __future__ import annotations

import bisect

from torch import Tensor


class Columns:
    """Runs of consecutive columns: a row without padding needs one run, whatever its length."""

    def __init__(self) -> None:
        self.following = 0
        self._starts: list[int] = []
        self._shifts: list[int] = []

    def copy(self) -> Columns:
        new = Columns()
        new.following, new._starts, new._shifts = self.following, self._starts.copy(), self._shifts.copy()
        return new

    def append(self, length: int, count: int, mask: Tensor | None) -> None:
        """``count`` columns follow, of which ``mask`` [count] (None = all) are tokens; the row holds ``length``."""
        if mask is None:
            if count:
                self._run(length, self.following - length)
        else:
            at = mask.nonzero().flatten()
            shifts = at + (self.following - length)
            shifts -= shifts.new_tensor(range(len(at)))
            previous = None
            for i, shift in enumerate(shifts.tolist()):
                if shift != previous:
                    self._run(length + i, shift)
                    previous = shift
        self.following += count

    def _run(self, start: int, shift: int) -> None:
        if not self._shifts or self._shifts[-1] != shift:
            self._starts.append(start)
            self._shifts.append(shift)

    def of(self, index: int) -> int:
        return index + self._shifts[bisect.bisect_right(self._starts, index) - 1]

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens; the next column follows the last of them."""
        self.following = self.of(length - 1) + 1 if length else 0
        keep = bisect.bisect_left(self._starts, length)
        del self._starts[keep:], self._shifts[keep:]

    @property
    def runs(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._shifts, strict=True))

    @classmethod
    def of_runs(cls, runs: list[tuple[int, int]], following: int) -> Columns:
        new = cls()
        new.following = following
        new._starts, new._shifts = [s for s, _ in runs], [x for _, x in runs]
        return new
