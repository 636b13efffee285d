"""Which rank holds which segments of a sequence."""

from __future__ import annotations

import bisect
import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks, segments
from ..segments import Span


@dataclass(frozen=True)
class ShardPlan:
    """Segments of one sequence (or of packed documents) over ranks, contiguous and in order.

    A cut between two ranks is the segment boundary nearest to an even share of the tokens; while segments last, every
    rank gets one. All segments cost the same whatever their position, so no reordering is needed to balance the work.

    Args:
        length: S, tokens of the whole sequence.
        segment_len: tokens per segment; the last one of a document may be short.
        ranks: number of processes.
        cu_seqlens: offsets of packed documents, 0 .. length; None = one document.
    """

    length: int
    segment_len: int
    ranks: int
    cu_seqlens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _checks.integer("length", self.length, 0)
        _checks.integer("segment_len", self.segment_len, 1)
        _checks.integer("ranks", self.ranks, 1)
        if self.cu_seqlens is not None:
            offsets = tuple(int(x) for x in self.cu_seqlens)
            object.__setattr__(self, "cu_seqlens", offsets)
            if offsets[:1] != (0,) or offsets[-1] != self.length or any(a > b for a, b in itertools.pairwise(offsets)):
                raise ValueError(f"cu_seqlens must ascend from 0 to length {self.length}, got {offsets}")

    @functools.cached_property
    def spans(self) -> list[Span]:
        """All N segments in order."""
        cu = None if self.cu_seqlens is None else torch.tensor(self.cu_seqlens)
        return segments.spans(self.length, self.segment_len, cu)

    @functools.cached_property
    def _cuts(self) -> list[int]:
        n, starts = len(self.spans), [s.start for s in self.spans] + [self.length]
        cuts = [0]
        for rank in range(1, self.ranks):
            share = self.length * rank / self.ranks
            at = bisect.bisect_left(starts, share)
            if at > 0 and share - starts[at - 1] < starts[at] - share:
                at -= 1
            # the ranks after this one get one segment each as long as there are enough
            at = min(max(at, cuts[-1] + 1), max(n - (self.ranks - rank), cuts[-1] + 1), n)
            cuts.append(at)
        return [*cuts, n]

    def segments(self, rank: int) -> slice:
        """Segment numbers of a rank."""
        _checks.integer("rank", rank, 0, self.ranks - 1)
        return slice(self._cuts[rank], self._cuts[rank + 1])

    @functools.cached_property
    def counts(self) -> list[int]:
        """Number of segments of every rank."""
        return [b - a for a, b in itertools.pairwise(self._cuts)]

    def columns(self, rank: int) -> slice:
        """Tokens of a rank."""
        own = self.spans[self.segments(rank)]
        return slice(own[0].start, own[-1].stop) if own else slice(self.length, self.length)

    def continues(self, rank: int) -> bool:
        """Whether a rank's first segment has a segment before it in its document, on the rank before."""
        own = self.spans[self.segments(rank)]
        return bool(own) and not own[0].first

    def local_cu_seqlens(self, rank: int) -> tuple[int, ...] | None:
        """Offsets of the (pieces of) documents a rank holds, within its tokens."""
        if self.cu_seqlens is None:
            return None
        mine = self.columns(rank)
        inside = [x - mine.start for x in self.cu_seqlens if mine.start < x < mine.stop]
        return (0, *inside, mine.stop - mine.start)

    def positions(self, rank: int) -> Tensor:
        """int64 [S of the rank]: position of every token in its document."""
        mine = self.columns(rank)
        at = torch.arange(mine.start, mine.stop)
        if self.cu_seqlens is None:
            return at
        offsets = torch.tensor(self.cu_seqlens)
        return at - offsets[torch.searchsorted(offsets, at, right=True) - 1]
