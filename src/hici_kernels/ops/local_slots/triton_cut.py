"""local_slots in Triton: how tokens are cut into segments, tiles and splits, without reading anything from a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import segments, tuning


@dataclass
class Cut:
    """How tokens are cut into segments, tiles and splits. Without ``cu_seqlens`` it is arithmetic, with it tables."""

    tokens: int
    segments: int
    segment_len: int
    block: int
    tiles_in_split: int
    tiles: int
    tiles_per_segment: int
    splits: int
    splits_per_segment: int
    tile_table: Tensor | None = None  # int32 [tiles, 3]: segment, start, stop
    split_table: Tensor | None = None  # int32 [splits, 4]: segment, start, stop, first tile
    first_tile: Tensor | None = None  # int32 [N + 1]
    first_split: Tensor | None = None  # int32 [N + 1]
    start: Tensor | None = None  # int32 [N]
    stop: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.tile_table is not None

    @property
    def split_tokens(self) -> int:
        return self.block * self.tiles_in_split

    @property
    def shape(self) -> dict[str, int]:
        """Kernel arguments that every kernel takes."""
        return {"tokens": self.tokens, "segments": self.segments, "segment_len": self.segment_len}


def cut_evenly(tokens: int, total: int, segment_len: int, block: int, tiles_in_split: int) -> Cut:
    segment_len = min(segment_len or tokens, tokens)
    tiles = -(-segment_len // block)
    splits = -(-tiles // tiles_in_split)
    return Cut(tokens, total, segment_len, block, tiles_in_split, total * tiles, tiles, total * splits, splits)


def cut_packed(cu: Tensor, tokens: int, total: int, segment_len: int, block: int, tiles_in_split: int) -> Cut:
    """By tensor operations alone: contents of ``cu`` are not read here, and wrong ones reach no other memory."""
    segment_len = min(segment_len or tokens, tokens)
    cu = cu.clamp(0, tokens)
    before = segments.cu_segments(cu, segment_len)
    document = segments.document_of(before, total)
    number = torch.arange(total, device=cu.device, dtype=torch.int32)
    stop = cu[document + 1]
    start = torch.minimum(cu[document] + (number - before[document]) * segment_len, stop)
    stop = torch.minimum(start + segment_len, stop)
    size = block * tiles_in_split
    first_tile, tile_segment, tile_start, tile_stop = _parts(start, stop, block, tokens // block + total)
    first_split, split_segment, split_start, split_stop = _parts(start, stop, size, tokens // size + total)
    tile = first_tile[split_segment] + (split_start - start[split_segment]) // block
    found = Cut(tokens, total, segment_len, block, tiles_in_split, len(tile_start), 0, len(split_start), 0)
    found.tile_table = torch.stack((tile_segment, tile_start, tile_stop), 1).to(torch.int32)
    found.split_table = torch.stack((split_segment, split_start, split_stop, tile), 1).to(torch.int32)
    found.first_tile, found.first_split, found.start, found.stop = first_tile, first_split, start, stop
    return found


def _parts(start: Tensor, stop: Tensor, size: int, bound: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segments cut into parts of ``size``: first part of each segment [N + 1]; segment, start and stop of each part.

    There are at most ``bound`` parts; those that do not exist are empty.
    """
    count = (stop - start + size - 1) // size
    first = F.pad(count.cumsum(0), (1, 0)).to(torch.int32)
    part = torch.arange(bound, device=start.device, dtype=torch.int32)
    segment = torch.searchsorted(first, part, right=True).sub(1).clamp(0, len(start) - 1).to(torch.int32)
    begin = torch.minimum(start[segment] + (part - first[segment]) * size, stop[segment])
    return first, segment, begin, torch.minimum(begin + size, stop[segment])


def tiles_in_split(tokens: int, programs_per_split: int, block: int, device: torch.device) -> int:
    """Tiles per split, a power of two from 8 to 64: about one program per multiprocessor keeps partial sums few."""
    wanted = tokens * programs_per_split // (tuning.multiprocessors(device) * block)
    return 1 << max(min(max(wanted, 1).bit_length() - 1, 6), 3)
