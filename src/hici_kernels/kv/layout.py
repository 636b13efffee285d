"""Records and pages: how a closed chunk lies in memory and on disk.

A record is one chunk of one row and layer: a page for every kv head, then (routing="prefix") a page for every two query
heads. A page is what is fetched together: [2, C, D], the C keys and then the C values of one kv head, so that every
group is two contiguous runs of group_size rows. In 8 bits it is [2, C, D] int8 followed by [2, C] float32, one scale a
token: x = scale * int8, scale = max|x| / 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 512  # of direct transfers: csrc/io/page_file.h


class Layout:
    """Shapes and bytes; ``cold_dtype`` None = the bits of the tokens, torch.int8 = 8 bits."""

    def __init__(
        self,
        chunk_size: int,
        group_size: int,
        kv_heads: int,
        query_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        cold_dtype: torch.dtype | None,
    ) -> None:
        self.chunk_size, self.group_size, self.head_dim = chunk_size, group_size, head_dim
        self.kv_heads, self.query_heads = kv_heads, query_heads
        self.dtype, self.cold = dtype, cold_dtype is not None
        self.pages = kv_heads + -(-query_heads // 2)
        numbers = 2 * chunk_size * head_dim
        self.data_bytes = numbers if self.cold else numbers * dtype.itemsize
        self.scales_at = -(-self.data_bytes // 4) * 4
        self.page_bytes = self.scales_at + 2 * chunk_size * 4 if self.cold else self.data_bytes
        self.stride = -(-self.page_bytes // ALIGNMENT) * ALIGNMENT

    def encode(self, chunks: dict[str, Tensor]) -> Tensor:
        """k, v [n, C, kv_heads, D] (and q [n, C, query_heads, D]) -> uint8 [n, pages, page_bytes]."""
        x = torch.stack((chunks["k"], chunks["v"]), 1).permute(0, 3, 1, 2, 4)
        if self.query_heads:
            q = chunks["q"].transpose(1, 2)
            if self.query_heads % 2:
                q = torch.cat((q, torch.zeros_like(q[:, :1])), 1)
            x = torch.cat((x, q.unflatten(1, (-1, 2))), 1)
        x = x.contiguous()
        if not self.cold:
            return x.flatten(2).view(torch.uint8)
        wide = x.float()
        scale = wide.abs().amax(-1) / 127
        small = (wide / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().to(torch.int8)
        data = torch.nn.functional.pad(small.flatten(2).view(torch.uint8), (0, self.scales_at - self.data_bytes))
        return torch.cat((data, scale.flatten(2).view(torch.uint8)), -1)

    def decode(self, pages: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`encode`."""
        n = pages.shape[0]
        flat = pages.reshape(-1, self.page_bytes)
        every = torch.arange(flat.shape[0], device=flat.device)
        groups = self.chunk_size // self.group_size
        pieces = [self.groups(flat, every, torch.full_like(every, m)) for m in range(groups)]
        x = torch.cat(pieces, 2).unflatten(0, (n, self.pages))  # [n, pages, 2, C, D]
        kv = x[:, : self.kv_heads]
        found = {"k": kv[:, :, 0].transpose(1, 2), "v": kv[:, :, 1].transpose(1, 2)}
        if self.query_heads:
            found["q"] = x[:, self.kv_heads :].flatten(1, 2)[:, : self.query_heads].transpose(1, 2)
        return found

    def groups(self, memory: Tensor, at: Tensor, group: Tensor) -> Tensor:
        """Keys and values [n, 2, group_size, D] of ``group[i]`` of the page ``memory[at[i]]``."""
        shape = (2, self.chunk_size // self.group_size, self.group_size)
        data = memory[:, : self.data_bytes]
        if not self.cold:
            return data.view(self.dtype).unflatten(1, (*shape, -1))[at, :, group]
        scale = memory[:, self.scales_at : self.page_bytes].view(torch.float32).unflatten(1, shape)[at, :, group]
        small = data.view(torch.int8).unflatten(1, (*shape, -1))[at, :, group]
        return (small.float() * scale.unsqueeze(-1)).to(self.dtype)


def aligned(slots: int, stride: int, pinned: bool = False) -> Tensor:
    """Uninitialised uint8 [slots, stride] in host memory that direct transfers may use; committed when touched."""
    raw = torch.empty(slots * stride + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
    skip = -raw.data_ptr() % ALIGNMENT
    return raw[skip : skip + slots * stride].view(slots, stride)
