"""Byte limits of the tiers: every buffer is entered here before it exists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

TIERS = ("device", "host", "disk")


class Meter:
    """Bytes per tier and account, their peak, and the limits of device and host."""

    def __init__(self, device_bytes: int | None, host_bytes: int | None) -> None:
        self.limits: dict[str, int | None] = {"device": device_bytes, "host": host_bytes, "disk": None}
        self.peak = dict.fromkeys(TIERS, 0)
        self._held: dict[tuple[str, str], int] = {}
        self._total = dict.fromkeys(TIERS, 0)

    def held(self, tier: str) -> int:
        return self._total[tier]

    def left(self, tier: str) -> int | None:
        """Bytes that may still be taken; None = no limit."""
        limit = self.limits[tier]
        return None if limit is None else limit - self.held(tier)

    def fits(self, tier: str, extra: int) -> bool:
        left = self.left(tier)
        return left is None or extra <= left

    def require(self, tier: str, extra: int, what: str) -> None:
        """
        Raises:
            ValueError: ``extra`` more bytes would exceed the limit of the tier.
        """
        if not self.fits(tier, extra):
            needed = self.held(tier) + extra
            raise ValueError(f"{tier}_bytes is {self.limits[tier]}, but {what} needs {needed} bytes")

    def set(self, tier: str, account: str, size: int) -> None:
        self._total[tier] += size - self._held.get((tier, account), 0)
        self._held[tier, account] = size
        self.peak[tier] = max(self.peak[tier], self._total[tier])

    def get(self, tier: str, account: str) -> int:
        return self._held.get((tier, account), 0)

    @contextlib.contextmanager
    def scratch(self, tier: str, size: int, what: str) -> Iterator[None]:
        """Memory that lives for the block only."""
        if not size:
            yield
            return
        self.require(tier, size, what)
        self.set(tier, "scratch", self.get(tier, "scratch") + size)
        try:
            yield
        finally:
            self.set(tier, "scratch", self.get(tier, "scratch") - size)

    def clear(self) -> None:
        self._held.clear()
        self._total = dict.fromkeys(TIERS, 0)
