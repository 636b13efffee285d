"""gather_rows: out[i] = the row_bytes bytes at addresses[i], zeros where that is 0.

Not for users: an address is believed. KVStore calls it with those of its own pages.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def forward(
    addresses: Tensor,
    row_bytes: int,
    device: torch.device,
    aligned: bool | None = None,
    memory: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """uint8 [n, row_bytes] on ``device`` from addresses int64 [n] of CPU memory, one copy a row.

    memory, places: uint8 [m, row_bytes] on the CPU and int64 [n]: row i becomes memory[places[i]] instead, unless its
    address is 0.
    """
    out = torch.zeros(len(addresses), row_bytes, dtype=torch.uint8) if memory is None else memory
    where = range(len(addresses)) if places is None else places.tolist()
    for address, place in zip(addresses.tolist(), where, strict=True):
        if address:
            ctypes.memmove(out.data_ptr() + place * row_bytes, address, row_bytes)
    return out.to(device)
