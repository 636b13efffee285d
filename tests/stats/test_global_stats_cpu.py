"""The native global_stats: every path, every way a call is cut, against the definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_global_stats import DRIFTS, check_drift
from torch import Tensor

from hici_kernels import _native
from hici_kernels.ops.global_stats import global_stats
from hici_kernels.testing import assert_within_budget

pytestmark = pytest.mark.skipif(not _native.paths(), reason="the native library is not built")
PATHS = list(_native.paths())
each_path = pytest.mark.parametrize("path", PATHS)
each_causal = pytest.mark.parametrize("causal", [False, True], ids=["shared", "causal"])


def of_rows(rows: Tensor) -> Tensor:
    """[5, H] of rows [R, H], extremes by position so that their gradient goes to the first of equal entries."""
    if rows.shape[0] == 0:
        return rows.new_zeros(5, rows.shape[1])
    mean = rows.mean(0)
    variance = (rows - mean).square().mean(0)
    flat = variance <= 1e-12
    std = torch.where(flat, 1e-6, variance.where(~flat, 1).sqrt())
    top, low = (rows.gather(0, at.unsqueeze(0))[0] for at in (rows.argmax(0), rows.argmin(0)))
    return torch.stack([mean, top, low, std, mean / mean.norm().clamp(min=1e-6)])


def definition(x: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> Tensor:
    b, n, _, h = x.shape
    keep = torch.ones(b, n, dtype=torch.bool) if valid is None else valid
    edges = [0, n] if cu_segments is None else cu_segments.tolist()
    found = []
    for row in range(b):
        for start, stop in itertools.pairwise(edges):
            for end in range(start + 1, stop + 1) if causal else [stop]:
                chosen = torch.arange(start, end)[keep[row, start:end]]
                found.append(of_rows(x[row, chosen].reshape(-1, h)))
    flat = torch.stack(found) if found else x.new_zeros(0, 5, h)
    return flat.view(b, n, 5, h) if causal else flat.view(b if cu_segments is None else len(edges) - 1, 5, h)


def distinct(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Values without ties in any channel, exact in every dtype."""
    b, n, m, h = shape
    g = torch.Generator().manual_seed(seed)
    rows = torch.argsort(torch.rand(b, n * m, h, generator=g), 1).double() / 16 + 0.5
    return rows.view(shape).to(dtype)


def both(x: Tensor, grad: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = global_stats(leaf, impl="cpu", **kwargs)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def with_threads(threads: int, call: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def check(x: Tensor, causal: bool, valid: Tensor | None, cu: Tensor | None, seed: int) -> None:
    # rows that do not count hold NaN where the native code runs, and something harmless in the definition
    clean, dirty = x, x.clone()
    if valid is not None:
        dirty[~valid] = torch.nan
    wide, plain = clean.double().requires_grad_(), clean.clone().requires_grad_()
    exact, rough = definition(wide, causal, valid, cu), definition(plain, causal, valid, cu)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    out, found = both(dirty, grad, causal=causal, valid=valid, cu_segments=cu)
    for row in range(5):
        assert_within_budget(exact[..., row, :].detach(), out[..., row, :], rough[..., row, :].detach(), f"row {row}")
    if exact.requires_grad:
        truth = torch.autograd.grad(exact, wide, grad.double())[0]
        near = torch.autograd.grad(rough, plain, grad)[0]
        assert_within_budget(truth, found, near, "grad local")
    else:
        assert not found.any()
    if valid is not None:
        assert not found[~valid].any()


@settings(max_examples=200, deadline=None)
@given(
    b=st.integers(1, 3), n=st.integers(1, 7), m=st.sampled_from([1, 2, 3, 7, 8, 9, 16, 19]), h=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), causal=st.booleans(),
    masked=st.booleans(), packed=st.booleans(), path=st.sampled_from(PATHS), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes_keep_the_budget(
    b: int, n: int, m: int, h: int, dtype: torch.dtype, causal: bool, masked: bool, packed: bool, path: str, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    b = 1 if packed else b
    valid = torch.rand(b, n, generator=g) < 0.7 if masked else None
    inner = torch.randint(0, n + 1, (2,), generator=g).sort().values
    cu = torch.cat([torch.tensor([0]), inner, torch.tensor([n])]).to(torch.int32) if packed else None
    with _native.path(path):
        check(distinct((b, n, m, h), seed, dtype), causal, valid, cu, seed)


# large enough to be cut: narrow blocks, chunks of segments, waves, stores past the caches
CUTS = {
    "blocks": (1, 4, 8, 4096, torch.float32),
    "chunks": (1, 150, 8, 300, torch.float32),
    "many-chunks": (1, 2100, 2, 70, torch.float32),
    "waves": (1, 600, 8, 520, torch.bfloat16),
    "rows": (70, 5, 4, 300, torch.float32),
    "streamed": (1, 420, 2, 2048, torch.float32),
}


@each_path
@each_causal
@pytest.mark.parametrize("case", CUTS)
def test_any_number_of_threads_gives_the_same_bits(path: str, causal: bool, case: str) -> None:
    *shape, dtype = CUTS[case]
    b, n, _, h = shape
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g).to(dtype)
    valid = torch.rand(b, n, generator=g) < 0.8
    x[~valid] = torch.nan
    grad = torch.randn((b, n, 5, h) if causal else (b, 5, h), generator=g).to(dtype)
    with _native.path(path):
        results = [with_threads(t, lambda: both(x, grad, causal=causal, valid=valid)) for t in (1, 2, 3, 7)]
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    assert all(x.isfinite().all() for x in results[0])


@each_path
@pytest.mark.parametrize("case", CUTS)
def test_cut_calls_equal_the_formula(path: str, case: str) -> None:
    *shape, dtype = CUTS[case]
    b, n, _, h = shape
    g = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=g).to(dtype)
    grad = torch.randn((b, 5, h), generator=g).to(dtype)
    running = torch.zeros(b, n, 5, h, dtype=dtype)
    running[:, -1] = grad
    exact, truth = by_torch(x.double(), grad.double())
    rough, near = by_torch(x, grad)
    with _native.path(path):
        shared, last = both(x, grad), both(x, running, causal=True)
    for out, found in (shared, (last[0][:, -1], last[1])):
        for row in range(5):
            assert_within_budget(exact[:, row], out[:, row], rough[:, row], f"row {row}")
        assert_within_budget(truth, found, near, "grad local")


def by_torch(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 5, H] and the gradient, by torch's own reductions over all rows."""
    leaf = x.clone().requires_grad_()
    flat = leaf.flatten(1, 2)
    mean, std = flat.mean(1), flat.std(1, correction=0)
    top, low = (flat.gather(1, at)[:, 0] for at in (flat.argmax(1, keepdim=True), flat.argmin(1, keepdim=True)))
    out = torch.stack((mean, top, low, std, mean / mean.norm(dim=-1, keepdim=True)), 1)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


@each_path
@each_causal
def test_of_equal_extremes_the_first_takes_the_gradient(path: str, causal: bool) -> None:
    x = torch.ones(1, 300, 8, 130)  # cut in chunks; every entry is an extreme
    x[0, 100, 2, 6], x[0, 220, 4, 6], x[0, 100, 5, 6] = 3, 3, 3
    grad = torch.zeros(1, 300, 5, 130) if causal else torch.zeros(1, 5, 130)
    last = grad[:, -1] if causal else grad
    last[:, 1], last[:, 2] = 1, 10
    with _native.path(path):
        found = both(x, grad, causal=causal)[1][0]
    assert found[..., 6].nonzero().tolist() == [[0, 0], [100, 2]]
    assert found[0, 0, 6] == 10 and found[100, 2, 6] == 1
    assert found[..., 7].nonzero().tolist() == [[0, 0]] and found[0, 0, 7] == 11


@each_path
@each_causal
def test_nan_stays_in_its_channel_and_after_its_segment(path: str, causal: bool) -> None:
    x = torch.ones(1, 300, 8, 130)
    x[0, 200, 3, 5] = torch.nan
    with _native.path(path):
        out = global_stats(x, causal=causal, impl="cpu")[0]
    last = out[-1] if causal else out
    others = [c for c in range(130) if c != 5]
    assert last[:, 5].isnan().all() and last[:4, others].isfinite().all()
    if causal:
        assert out[:200].isfinite().all()


@each_path
@each_causal
def test_a_large_offset_costs_no_digits(path: str, causal: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x = (1e4 + 1e-2 * torch.randn(1, 500, 8, 140, generator=g, dtype=torch.float64)).float()
    truth = x.double().reshape(-1, 140).std(0, correction=0)
    with _native.path(path):
        out = global_stats(x, causal=causal, impl="cpu")
    last = out[0, -1] if causal else out[0]
    torch.testing.assert_close(last[3].double(), truth, rtol=2e-6, atol=0)


@each_path
@each_causal
@pytest.mark.parametrize("n", [6, 70, 1100])  # 1100: many chunks, each with a first segment of its own
@pytest.mark.parametrize("drift", DRIFTS)
def test_segments_far_from_each_other_keep_the_budget(path: str, causal: bool, n: int, drift: str) -> None:
    with _native.path(path):
        check_drift("cpu", causal, n if n < 1100 or not causal else 20, drift, 24)
