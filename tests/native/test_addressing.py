"""Inputs of more than 2^31 elements are addressed correctly: memory is reserved, and only the few pages read exist."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch import Tensor

from hici_kernels import _native, attention, global_stats, local_slots
from hici_kernels.errors import ImplError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reserves memory the way Linux does")
PATHS = list(_native.paths())
each_path = pytest.mark.parametrize("path", PATHS)
FAR = 2**31


class Sparse:
    """A range of zeros that costs only the pages written to."""

    def __init__(self, dtype: torch.dtype, elements: int) -> None:
        size = elements * dtype.itemsize
        # not counted against the memory of the machine
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        try:
            self.memory = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            pytest.skip(f"{size} bytes of addresses are not to be had: {error}")
        self.tensor = torch.frombuffer(self.memory, dtype=dtype)

    def view(self, x: Tensor, strides: tuple[int, ...], offset: int = 0) -> Tensor:
        """The values of x at these strides. Written row by row: torch's own copies need not be trusted here."""
        far = self.tensor.as_strided(x.shape, strides, offset)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).tolist():
            begin = offset + sum(i * s for i, s in zip(at, strides, strict=False))
            self.tensor[begin : begin + x.shape[-1]] = x[tuple(at)]
        return far


def strides_of(name: str, heads: int, dim: int) -> tuple[int, int, int, int]:
    """Strides whose largest index times stride passes 2^31, in one dimension at a time."""
    return {
        "tokens": (1000, FAR // 8 + 3, dim + 5, 1),
        "heads": (9000, heads * dim, FAR // 2 + 7, 1),
        "batch": (FAR + 24, heads * dim + 1, dim, 1),
    }[name]


@each_path
@pytest.mark.parametrize("far", ["tokens", "heads", "batch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention(path: str, far: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    batch, s, hq, hkv, d = 2, 20, 8, 4, 24
    q, k, v = (torch.randn(batch, s, h, d, generator=g).to(dtype) for h in (hq, hkv, hkv))
    n, m = 3, 2
    local = torch.randn(batch, n, m, hkv, d, generator=g).to(dtype)
    options = {"segment_len": 8, "recurrence_len": 5, "return_lse": True, "impl": "cpu"}
    memory = [Sparse(dtype, 5 * FAR) for _ in range(4)]
    apart = [memory[i].view(x, strides_of(far, x.shape[2], d), offset=3 * i) for i, x in enumerate((q, k, v))]
    wide = {
        "tokens": (1000, FAR // 2 + 3, 5 * d, d, 1),
        "heads": (99 * d, 33 * d, d, FAR, 1),
        "batch": (FAR + 9, 1000, 200, d, 1),
    }
    # the last row of every tensor lies beyond 2^31 elements
    apart_local = memory[3].view(local, wide[far])
    assert all(sum((a - 1) * b for a, b in zip(x.shape, x.stride(), strict=True)) > FAR for x in (*apart, apart_local))

    def run(q: Tensor, k: Tensor, v: Tensor, local: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, local)]
        out, lse = attention(*leaves[:3], local_k=leaves[3], local_v=leaves[3], **options)
        arriving = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [out.detach(), lse.detach(), *gradients(out, lse, arriving, leaves)]

    with _native.path(path):
        for found, wanted in zip(run(*apart, apart_local), run(q, k, v, local), strict=True):
            assert torch.equal(found, wanted)


def gradients(out: Tensor, lse: Tensor, arriving: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Contiguous ones: torch would lay out the gradient of a leaf as the leaf."""
    return torch.autograd.grad((out, lse), leaves, (arriving, torch.ones_like(lse)))


@each_path
def test_attention_gradient_that_arrives_from_far(path: str) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v, arriving = (torch.randn(1, 6, 2, 16, generator=g) for _ in range(4))
    far = Sparse(torch.float32, 4 * FAR).view(arriving, (1, FAR // 2 + 1, FAR // 4, 1))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with _native.path(path):
        found = torch.autograd.grad(attention(*leaves, impl="cpu"), leaves, far)
        wanted = torch.autograd.grad(attention(*leaves, impl="cpu"), leaves, arriving)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@each_path
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_masks_with_far_strides(path: str, dim: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 2, 16, generator=g)
    mask, shown = torch.rand(2, 9, generator=g) < 0.6, torch.rand(2, 3, generator=g) < 0.5
    local = torch.randn(2, 3, 2, 2, 16, generator=g)
    options = {"segment_len": 3, "local_k": local, "local_v": local, "impl": "cpu"}
    strides = [(FAR + 5, 1), (11, FAR // 4 + 1), (FAR + 1, FAR // 8)][dim]
    far = [Sparse(torch.bool, 4 * FAR).tensor.as_strided(m.shape, strides) for m in (mask, shown)]
    for a, b in zip(far, (mask, shown), strict=True):
        for i in range(b.shape[0]):
            for j in range(b.shape[1]):
                a[i, j] = b[i, j]
    with _native.path(path):
        found = attention(x, x, x, attention_mask=far[0], prefix_mask=far[1], **options)
        assert torch.equal(found, attention(x, x, x, attention_mask=mask, prefix_mask=shown, **options))


@each_path
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("strides", [(FAR + 3, 9000, 65, 1), (7, FAR // 2 + 1, 1000, 1), (7, 64, FAR // 2 + 5, 1)])
def test_global_stats(path: str, causal: bool, strides: tuple[int, ...]) -> None:
    x = torch.randn(2, 4, 3, 60, generator=torch.Generator().manual_seed(0))
    far = Sparse(torch.float32, 4 * FAR).view(x + 0, strides) if strides[0] > FAR else None
    if far is None:  # rows of both batches must not overlap
        x = x[:1]
        far = Sparse(torch.float32, 4 * FAR).view(x, strides)
    with _native.path(path):
        for a, b in zip(_stats(far, causal), _stats(x, causal), strict=True):
            assert torch.equal(a, b)


def _stats(x: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = global_stats(leaf, causal=causal, impl="cpu")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    return out.detach(), gradient


@each_path
@pytest.mark.parametrize("strides", [(FAR + 3, 64, 1), (7, FAR // 2 + 5, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_local_slots(path: str, strides: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 48, generator=g).to(dtype)
    if strides[0] < FAR:
        hidden = hidden[:1]
    queries, wk, wv = (torch.randn(n, w, generator=g).to(dtype) for n, w in ((3, 16), (16, 48), (16, 48)))
    far = Sparse(dtype, 4 * FAR).view(hidden, strides)
    with _native.path(path):
        try:
            wanted = local_slots(hidden, queries, wk, wv, num_heads=2, segment_len=3, impl="cpu")
        except ImplError as error:
            pytest.skip(str(error))
        found = local_slots(far, queries, wk, wv, num_heads=2, segment_len=3, impl="cpu")
        assert torch.equal(found, wanted)
