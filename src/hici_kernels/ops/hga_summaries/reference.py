"""hga_summaries: the formula in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rope import working_dtype

# Keys per pass, in numbers: bounds the scratch of one pass. Chunks are independent, so it only sets memory.
NUMBERS = 1 << 22


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over ``dim`` by halves, with elementwise additions only.

    torch.sum and matmul may associate differently for another shape; this order depends on the length of ``dim`` alone,
    so an element of the result has the same bits whatever else is in the tensor, on every device.
    """
    while (n := x.shape[dim]) > 1:
        half = n // 2
        pairs = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x = pairs if n % 2 == 0 else torch.cat((pairs, x.narrow(dim, n - 1, 1)), dim)
    return x.squeeze(dim)


def slow_pairs(inv_freq: Tensor, chunk_size: int) -> Tensor:
    """bool [half]: i >= cut, the pairs that turn by at most 0.5 rad over a chunk."""
    i = torch.arange(inv_freq.shape[0], device=inv_freq.device)
    fast = max(1, chunk_size - 1) * inv_freq.double() > 0.5
    cut = torch.where(fast, i + 1, 0).amax()
    return i >= cut


def summary(k: Tensor, position: Tensor, inv_freq: Tensor, slow: Tensor) -> Tensor:
    """K(T) [..., H, D] of the keys k [..., len(T), H, D] at ``position`` [..., len(T)]; k in the working dtype."""
    length, half = k.shape[-3], inv_freq.shape[0]
    anchor = position[..., (length - 1) // 2, None]
    angle = (anchor - position).to(k.dtype).unsqueeze(-1) * inv_freq.to(k.dtype)  # R(a_T - j)
    cos = torch.where(slow, angle.cos(), 1.0).unsqueeze(-2)
    sin = torch.where(slow, angle.sin(), 0.0).unsqueeze(-2)
    x, y = k[..., :half], k[..., half : 2 * half]
    turned = torch.cat((x * cos - y * sin, y * cos + x * sin), -1)
    mixed = torch.where(slow.repeat(2), turned, k[..., : 2 * half])
    return ordered_sum(torch.cat((mixed, k[..., 2 * half :]), -1), -3) / length


def forward(
    k: Tensor, inv_freq: Tensor, positions: Tensor | None, chunk_size: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """(chunk_keys [B, n, Hkv, D], group_keys [B, n, M, Hkv, D])."""
    b, s, hkv, d = k.shape
    n, m = s // chunk_size, chunk_size // group_size
    inv_freq = inv_freq.to(k.device)
    slow = slow_pairs(inv_freq, chunk_size)
    chunk_keys = k.new_empty(b, n, hkv, d)
    group_keys = k.new_empty(b, n, m, hkv, d)
    step = max(1, NUMBERS // max(1, b * chunk_size * hkv * d))
    at = torch.arange(chunk_size, device=k.device)
    with torch.no_grad():
        for c in range(0, n, step):
            columns = slice(c * chunk_size, min(c + step, n) * chunk_size)
            keys = k[:, columns].unflatten(1, (-1, chunk_size)).to(working_dtype(k.dtype))
            position = at if positions is None else positions[..., columns].unflatten(-1, (-1, chunk_size))
            chunk_keys[:, c : c + step] = summary(keys, position, inv_freq, slow)
            groups = position.unflatten(-1, (m, group_size))
            group_keys[:, c : c + step] = summary(keys.unflatten(2, (m, group_size)), groups, inv_freq, slow)
    return chunk_keys, group_keys
