"""Caches of HiCIAttention for prefill and decode."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _checks
from .._inference import keeps
from ..config import HiCIConfig


class _Layer(Protocol):
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    config: HiCIConfig


class HiCICache(ABC):
    """History of ``batch`` rows in one layer.

    Rows are independent and may have different lengths. A cache is made by :meth:`HiCIAttention.new_cache`, and takes
    dtype and device from the first call. Copies of it share nothing but tensors that are never written in place. What
    was filled under torch.inference_mode() can be continued outside it.
    """

    @keeps
    def __init__(self, config: HiCIConfig, batch: int) -> None:
        self.config = config
        self._lengths = torch.zeros(batch, dtype=torch.int64)
        self._columns = torch.zeros(batch, dtype=torch.int64)

    @keeps
    def __deepcopy__(self, memo: dict[int, Any]) -> HiCICache:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    @property
    def lengths(self) -> Tensor:
        """int64 [B] on the CPU: tokens per row, padding not counted."""
        return self._lengths.clone()

    @property
    def batch(self) -> int:
        return self._lengths.shape[0]

    @property
    def empty(self) -> bool:
        """Whether no row holds a token."""
        return not bool(self._lengths.any())

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def check(self, batch: int, layer: _Layer) -> None:
        """Whether this cache fits a call of ``layer`` with ``batch`` rows."""
        if batch != self.batch:
            raise ValueError(f"cache holds {self.batch} rows, expected {batch} like hidden")
        if layer.config != self.config:
            raise ValueError("cache was made for another config than that of this layer")
        held, wanted = self._sizes(), (layer.hidden_size, layer.num_kv_heads, layer.head_dim)
        if any(x is not None and x != y for x, y in zip(held, wanted, strict=True)):
            raise ValueError(
                f"cache was filled by another layer: hidden_size, num_kv_heads, head_dim must be {wanted}, got {held}"
            )

    def check_keys(self, k: Tensor) -> None:
        """Whether keys like ``k`` can be kept beside those held."""
        held = self._keys()
        if held is not None and held.dtype != k.dtype:
            raise TypeError(
                f"cache holds {held.dtype}, expected {k.dtype} like this call's keys (is autocast the same?)"
            )
        if held is not None and held.device != k.device:
            raise ValueError(f"cache is on {held.device}, expected {k.device} like hidden")

    @abstractmethod
    def _keys(self) -> Tensor | None:
        """The buffer of keys, if there is one."""

    @abstractmethod
    def _sizes(self) -> tuple[int | None, int | None, int | None]:
        """hidden_size, num_kv_heads, head_dim of the buffers, as far as they exist."""

    def next_columns(self, device: torch.device) -> Tensor:
        """int64 [B] on ``device``: the column index that follows what each row has been given."""
        return self._columns.to(device)

    def reset(self, row: int | None = None) -> None:
        """Forget one row, or all of them.

        Raises:
            TypeError, ValueError: row out of range; nothing has changed then.
        """
        self._reset(self._rows(row))

    def rewind(self, length: int, row: int | None = None) -> None:
        """Keep the first ``length`` tokens of one row, or of every row; later ones are as if never given.

        The next default position follows the last token kept; a rewind to the present length changes nothing.
        decode="segment" can rewind within the open segment only, decode="slots" not into the prompt (its slots have
        read all of it).

        Raises:
            TypeError, ValueError: length beyond what is held or can be restored; nothing has changed then.
        """
        _checks.integer("length", length, 0)
        rows = self._rows(row)
        for b in rows:
            held = int(self._lengths[b])
            if length > held:
                raise ValueError(f"length must be at most the {held} tokens of row {b}, got {length}")
            low = self._rewind_limit(b)
            if length < low:
                raise ValueError(
                    f"length must be at least {low} for row {b} with decode={self.config.decode!r}, got {length}"
                )
        for b in rows:
            self._rewind(b, length)

    @keeps
    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was (beam search); the batch becomes len(rows).

        Raises:
            TypeError, ValueError: an index out of range; nothing has changed then.
        """
        chosen = _checks.row_indices("rows", rows, self.batch)
        index = torch.tensor(chosen, dtype=torch.int64)
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                setattr(self, name, x.index_select(0, index.to(x.device)))

    def _rows(self, row: int | None) -> list[int]:
        if row is None:
            return list(range(self.batch))
        _checks.integer("row", row, 0, self.batch - 1)
        return [row]

    @abstractmethod
    def _reset(self, rows: list[int]) -> None: ...

    def _rewind_limit(self, row: int) -> int:
        return 0

    @abstractmethod
    def _rewind(self, row: int, length: int) -> None: ...


class TokenCache(HiCICache):
    """decode="full" and "slots": keys and values of all tokens, in the columns in which they came; prompt slots before.

    Buffers [B, capacity, ...] grow by doubling; ``_seen`` marks the columns that hold a token (or a slot) of a row.
    """

    @keeps
    def __init__(self, config: HiCIConfig, batch: int) -> None:
        super().__init__(config, batch)
        self._prompt = torch.zeros(batch, dtype=torch.int64)
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._seen: Tensor | None = None
        self._column: Tensor | None = None  # int64, index of the column among those the row was given, -1 for slots
        self._used = 0
        self._slots = 0
        self._holes = False

    @keeps
    def start(self, slot_k: Tensor | None, slot_v: Tensor | None, seen: Tensor | None) -> None:
        """Begin a prompt: drop what is left of earlier ones and put its slots first."""
        self._used = self._slots = 0
        self._holes = False
        if slot_k is not None and slot_v is not None and seen is not None:
            self._slots = slot_k.shape[1]
            self._write(slot_k, slot_v, seen, torch.full(slot_k.shape[:2], -1, device=slot_k.device))
            self._used, self._holes = self._slots, True
        self._prompt = torch.full_like(self._prompt, -1)

    def stage(
        self, k: Tensor, v: Tensor, mask: Tensor | None, recorded: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write the tokens of a call behind those held, without counting them yet.

        k, v [B, T, Hkv, D]; masked columns are kept but never seen. Returns keys, values [B, n + T, Hkv, D] and seen
        [B, n + T] (None = all) of everything with them: views of the buffers, or copies where autograd records what is
        done with them (``recorded``).
        """
        at = self._columns.to(k.device)[:, None] + torch.arange(k.shape[1], device=k.device)
        self._write(k, v, mask, at)
        n = self._used + k.shape[1]
        assert self._k is not None and self._v is not None and self._seen is not None
        seen = self._seen[:, :n] if self._holes or mask is not None else None
        if recorded:
            # copies: later calls write into the buffers, which would invalidate what autograd saved of this one
            keys, values = torch.cat((self._k[:, : self._used], k), 1), torch.cat((self._v[:, : self._used], v), 1)
            return keys, values, None if seen is None else seen.clone()
        return self._k[:, :n], self._v[:, :n], seen

    @keeps
    def commit(self, columns: int, mask: Tensor | None) -> None:
        """Count the ``columns`` staged last."""
        counts = torch.full_like(self._lengths, columns) if mask is None else mask.sum(1).cpu()
        self._lengths = self._lengths + counts
        self._columns = self._columns + columns
        self._prompt = torch.where(self._prompt < 0, self._lengths, self._prompt)
        self._used += columns
        self._holes = self._holes or mask is not None

    def _keys(self) -> Tensor | None:
        return self._k

    def _sizes(self) -> tuple[int | None, int | None, int | None]:
        return (None, None, None) if self._k is None else (None, *self._k.shape[2:])

    @keeps
    def _write(self, k: Tensor, v: Tensor, mask: Tensor | None, column: Tensor) -> None:
        n, t = self._used, k.shape[1]
        self._reserve(k, v, n + t)
        assert self._k is not None and self._v is not None and self._seen is not None and self._column is not None
        self._k[:, n : n + t] = k.detach()
        self._v[:, n : n + t] = v.detach()
        self._seen[:, n : n + t] = True if mask is None else mask
        self._column[:, n : n + t] = column

    def _reserve(self, k: Tensor, v: Tensor, needed: int) -> None:
        old = (self._k, self._v, self._seen, self._column)
        capacity = 0 if self._k is None else self._k.shape[1]
        if self._k is not None and needed <= capacity:
            return
        size = max(needed, 2 * capacity)
        shape = (self.batch, size, *k.shape[2:])
        new = (
            k.new_empty(shape),
            v.new_empty(shape),
            torch.zeros(shape[:2], dtype=torch.bool, device=k.device),
            torch.zeros(shape[:2], dtype=torch.int64, device=k.device),
        )
        for before, after in zip(old, new, strict=True):
            if before is not None:
                after[:, : self._used] = before[:, : self._used]
        self._k, self._v, self._seen, self._column = new

    def _reset(self, rows: list[int]) -> None:
        if self._seen is not None:
            self._seen[rows] = False
        self._holes = True
        for x in (self._lengths, self._columns, self._prompt):
            x[rows] = 0
        if self.empty:
            self._used = self._slots = 0

    def _rewind_limit(self, row: int) -> int:
        return int(self._prompt[row]) if self.config.decode == "slots" else 0

    def _rewind(self, row: int, length: int) -> None:
        if self._seen is None or self._column is None or length == int(self._lengths[row]):
            return
        tokens = self._seen[row, self._slots : self._used]
        tokens &= tokens.cumsum(0) <= length
        kept = self._column[row, self._slots : self._used][tokens]
        self._columns[row] = int(kept[-1]) + 1 if length else 0
        self._lengths[row] = length
        self._holes = True
        held = self._seen[:, : self._used].any(0).nonzero()
        self._used = max(int(held[-1]) + 1 if len(held) else 0, self._slots)

    def __repr__(self) -> str:
        return f"TokenCache(decode={self.config.decode!r}, lengths={self._lengths.tolist()})"


class SegmentCache(HiCICache):
    """decode="segment": the open segment, the last recurrence_len tokens before it, and its slots. Bounded.

    Per row: hidden, keys and values of the open segment (its slots are built from them when it fills), keys and values
    of the recurrence, keys and values of the slots its tokens see, running statistics of all slots so far.
    """

    @keeps
    def __init__(self, config: HiCIConfig, batch: int) -> None:
        super().__init__(config, batch)
        assert config.segment_len is not None
        self.filled = torch.zeros(batch, dtype=torch.int64)  # columns of the open segment
        self.has_history = torch.zeros(batch, dtype=torch.bool)  # a segment has been closed: slots, recurrence
        self.ragged = False  # rows may differ in phase or hold masked columns: masks are needed
        self.allocated = False
        # buffers, by allocate()
        self.hidden: Tensor  # [B, L, H]
        self.k: Tensor  # [B, L, Hkv, D]
        self.v: Tensor
        self.seen: Tensor  # bool [B, L], the column holds a token
        self.column: Tensor  # int64 [B, L], its index among the columns the row was given
        self.closed: Tensor  # int64 [B], index of the column after the last token of closed segments
        self.recurrence_k: Tensor  # [B, R, Hkv, D]
        self.recurrence_v: Tensor
        self.recurrence_seen: Tensor  # bool [B, R]
        self.slot_k: Tensor  # [B, slots, Hkv, D], those that tokens see
        self.slot_v: Tensor
        self.count: Tensor  # [B], slot vectors in the statistics
        self.mean: Tensor  # [B, H]
        self.squares: Tensor  # [B, H], sum of squared deviations from the mean
        self.largest: Tensor
        self.smallest: Tensor

    @keeps
    def allocate(self, hidden: Tensor, k: Tensor, slots: int, statistics: torch.dtype) -> None:
        """Make the buffers, on the first call."""
        if self.allocated:
            return
        self.allocated = True
        b, length = self.batch, self.config.segment_len
        assert length is not None
        h, kv = hidden.shape[2], k.shape[2:]
        device = hidden.device
        self.hidden = hidden.new_zeros(b, length, h)
        self.k, self.v = k.new_zeros(b, length, *kv), k.new_zeros(b, length, *kv)
        self.seen = torch.zeros(b, length, dtype=torch.bool, device=device)
        self.column = torch.zeros(b, length, dtype=torch.int64, device=device)
        self.closed = torch.zeros(b, dtype=torch.int64, device=device)
        r = self.config.recurrence_len
        self.recurrence_k, self.recurrence_v = k.new_zeros(b, r, *kv), k.new_zeros(b, r, *kv)
        self.recurrence_seen = torch.zeros(b, r, dtype=torch.bool, device=device)
        self.slot_k, self.slot_v = k.new_zeros(b, slots, *kv), k.new_zeros(b, slots, *kv)
        self.count = torch.zeros(b, dtype=statistics, device=device)
        self.mean, self.squares, self.largest, self.smallest = (
            torch.zeros(b, h, dtype=statistics, device=device) for _ in range(4)
        )

    @property
    def fresh(self) -> bool:
        """Whether nothing has been entered since the beginning or a reset, masked columns included."""
        return not bool(self.filled.any() or self.has_history.any())

    def _keys(self) -> Tensor | None:
        return self.k if self.allocated else None

    def _sizes(self) -> tuple[int | None, int | None, int | None]:
        return (self.hidden.shape[2], *self.k.shape[2:]) if self.allocated else (None, None, None)

    @keeps
    def snapshot(self, closes: bool) -> dict[str, Any]:
        """What :meth:`restore` needs to undo a call; ``closes`` = the call fills a segment.

        Until a segment is closed, buffers are only written behind the filled part, where nobody reads.
        """
        small = ("_lengths", "_columns", "filled", "has_history")
        return {
            name: x.clone() if isinstance(x, Tensor) and (closes or name in small) else x
            for name, x in vars(self).items()
        }

    def restore(self, saved: dict[str, Any]) -> None:
        vars(self).clear()
        vars(self).update(saved)
        if self.allocated:
            at = torch.arange(self.seen.shape[1], device="cpu")
            self.seen &= (at < self.filled[:, None]).to(self.seen.device)

    @keeps
    def advance(self, tokens: Tensor, columns: int) -> None:
        """Count what a call has entered: ``tokens`` int64 [B], and ``columns`` for every row."""
        self._lengths = self._lengths + tokens
        self._columns = self._columns + columns

    def _reset(self, rows: list[int]) -> None:
        for x in vars(self).values():
            if isinstance(x, Tensor):
                x[rows] = False if x.dtype == torch.bool else 0
        self.ragged = not self.empty

    def _rewind_limit(self, row: int) -> int:
        inside = int(self.seen[row, : int(self.filled[row])].sum()) if self.allocated else 0
        return int(self._lengths[row]) - inside

    def _rewind(self, row: int, length: int) -> None:
        if length == int(self._lengths[row]):
            return
        keep = length - self._rewind_limit(row)
        tokens = self.seen[row, : int(self.filled[row])].nonzero()[:, 0]
        filled = int(tokens[keep - 1]) + 1 if keep else 0
        self._columns[row] = int(self.column[row, filled - 1]) + 1 if filled else int(self.closed[row])
        self.seen[row, filled:] = False
        self.filled[row] = filled
        self._lengths[row] = length
        self.ragged = True

    def __repr__(self) -> str:
        return f"SegmentCache(lengths={self._lengths.tolist()}, filled={self.filled.tolist()}, nbytes={self.nbytes})"
