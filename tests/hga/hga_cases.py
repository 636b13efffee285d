"""Inputs and comparisons shared by the tests of this folder."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hici_kernels import HGAConfig, Rope
from hici_kernels.kv.page_file import PageFile
from hici_kernels.kv.store import KVStore
from hici_kernels.ops.hga_attention.api import HGAResult, hga_attention


def tensors(
    s: int,
    *,
    t: int | None = None,
    b: int = 1,
    hq: int = 4,
    hkv: int = 2,
    d: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Roped-looking random q, k, v."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((b, s if t is None else t, hq, d), (b, s, hkv, d), (b, s, hkv, d))
    q, k, v = (torch.randn(x, generator=g, dtype=torch.float64).to(dtype) for x in sizes)
    return q, k, v


def rope(d: int = 16, theta: float = 1e4) -> Rope:
    return Rope.from_theta(theta, d)


def small(**changes: object) -> HGAConfig:
    """16-token chunks, and budgets that a few chunks exceed."""
    fields = {
        "chunk_size": 16,
        "group_size": 4,
        "keep_first": 1,
        "keep_last": 1,
        "topk_chunks": 2,
        "topk_groups": 3,
        "route_block": 8,
    }
    return HGAConfig(**{**fields, **changes})  # type: ignore[arg-type]


def full(q: Tensor, k: Tensor, v: Tensor, config: HGAConfig, **rest: object) -> HGAResult:
    """out, lse and routes."""
    arguments = {"rope": rope(q.shape[-1]), **rest}
    return hga_attention(q, k, v, config, return_lse=True, return_routes=True, **arguments)  # type: ignore[arg-type]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T tokens by PyTorch."""
    t, s = q.shape[1], k.shape[1]
    mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    r = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(r, 2), v.repeat_interleave(r, 2)))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def store(config: HGAConfig, k: Tensor, **changes: object) -> KVStore:
    b, _, hkv, d = k.shape
    fields = {"rope": rope(d), "layers": 1, "kv_heads": hkv, "head_dim": d, "batch": b, "dtype": k.dtype}
    return KVStore(config, **{**fields, "device": "cpu", **changes})  # type: ignore[arg-type]


def feed(target: KVStore, q: Tensor, k: Tensor, v: Tensor, cuts: list[int], *, impl: str | None = None) -> Tensor:
    """Outputs of calls that end at ``cuts`` and at the end."""
    ends = sorted({*(c for c in cuts if 0 < c < k.shape[1]), k.shape[1]})
    outs, start = [], 0
    for end in ends:
        columns = slice(start, end)
        outs.append(target.attend(0, q[:, columns], k[:, columns], v[:, columns], impl=impl))
        start = end
    return torch.cat(outs, 1)


def play(target: KVStore, seed: int, layers: int, calls: int = 14, impl: str | None = None) -> list[Tensor]:
    """Outputs of one seeded sequence of calls of every kind, ragged rows included."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    outs = []
    for _ in range(calls):
        kind, b = draw(0, 10), target.batch
        if kind < 7:
            t = draw(1, 4) if kind < 3 else draw(1, 70)
            q, k, v = tensors(t, b=b, seed=draw(0, 1 << 30), dtype=target.dtype)
            mask = torch.rand(b, t, generator=g) < 0.8 if kind % 2 else None
            outs += [target.attend(n, q, k + n, v, attention_mask=mask, impl=impl) for n in range(layers)]
        elif kind == 7:
            row = draw(0, b)
            target.rewind(draw(0, int(target.lengths[row]) + 1), row)
        elif kind == 8:
            target.reorder([draw(0, b) for _ in range(draw(1, 4))])
        elif draw(0, 3) == 0:
            target.reset(draw(0, b))
        outs.append(target.lengths)
    return outs


def close(actual: Tensor, expected: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def ids(routes: Tensor) -> list[int]:
    """The used entries of one route."""
    return [x for x in routes.tolist() if x >= 0]


def path_of(file: PageFile) -> str:
    """The nameless file, through the descriptor that this process holds."""
    for fd in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{fd}"
        try:
            if os.readlink(link).split(" (deleted)")[0] == file.name:
                return link
        except OSError:
            continue
    raise AssertionError("the file is not open")
