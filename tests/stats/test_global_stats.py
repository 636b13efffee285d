"""global_stats: every implementation against statistics computed set by set in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hici_kernels import _dispatch
from hici_kernels.ops.global_stats import global_stats
from hici_kernels.testing import assert_within_budget

IMPLS = [name for name, reason in _dispatch.explain("global_stats").items() if reason is None and name != "triton"]
LOW = [torch.float32, torch.bfloat16, torch.float16]
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_causal = pytest.mark.parametrize("causal", [False, True], ids=["shared", "causal"])


def of_rows(rows: Tensor) -> Tensor:
    """[5, H] of rows [R, H]."""
    if rows.shape[0] == 0:
        return rows.new_zeros(5, rows.shape[1])
    mean = rows.mean(0)
    variance = (rows - mean).square().mean(0)
    flat = variance <= 1e-12
    std = torch.where(flat, 1e-6, variance.where(~flat, 1).sqrt())
    return torch.stack([mean, rows.amax(0), rows.amin(0), std, mean / mean.norm().clamp(min=1e-6)])


def oracle(
    local: Tensor, causal: bool = False, valid: Tensor | None = None, cu_segments: Tensor | None = None
) -> Tensor:
    """The definition: collect each set of rows, then compute its statistics in the dtype of ``local``."""
    b, n, _, h = local.shape
    keep = torch.ones(b, n, dtype=torch.bool) if valid is None else valid
    edges = [0, n] if cu_segments is None else cu_segments.tolist()
    found = []
    for row in range(b):
        for start, stop in itertools.pairwise(edges):
            ends = range(start + 1, stop + 1) if causal else [stop]
            for end in ends:
                chosen = torch.arange(start, end)[keep[row, start:end]]
                found.append(of_rows(local[row, chosen].reshape(-1, h)))
    flat = torch.stack(found) if found else local.new_zeros(0, 5, h)
    if causal:
        return flat.view(b, n, 5, h)
    return flat.view(b if cu_segments is None else len(edges) - 1, 5, h)


def sample(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64, offset: float = 0.5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) + offset).to(dtype)


def mask(b: int, n: int, seed: int = 0) -> Tensor:
    return torch.rand(b, n, generator=torch.Generator().manual_seed(seed)) < 0.6


def cuts(n: int, seed: int = 0) -> Tensor:
    inner = torch.randint(0, n + 1, (3,), generator=torch.Generator().manual_seed(seed)).sort().values
    return torch.cat([torch.tensor([0]), inner, torch.tensor([n])]).to(torch.int32)


def gradient(local: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
    leaf = local.detach().clone().requires_grad_()
    global_stats(leaf, **kwargs).backward(grad)
    assert leaf.grad is not None
    return leaf.grad


CALLS = {
    "plain": (2, 5, 3, 7, {}),
    "wide": (1, 4, 8, 1100, {}),
    "one": (1, 1, 1, 1, {}),
    "valid": (3, 6, 2, 9, {"valid": mask(3, 6)}),
    "packed": (1, 9, 2, 20, {"cu_segments": cuts(9)}),
    "packed-valid": (1, 9, 2, 20, {"cu_segments": cuts(9, 1), "valid": mask(1, 9, 1)}),
}
each_call = pytest.mark.parametrize("call", CALLS)


@each_impl
@each_causal
@each_call
def test_equals_the_definition(impl: str, causal: bool, call: str) -> None:
    *shape, kwargs = CALLS[call]
    x = sample(tuple(shape))
    out = global_stats(x, causal=causal, impl=impl, **kwargs)
    torch.testing.assert_close(out, oracle(x, causal, **kwargs), rtol=0, atol=1e-13)


@each_impl
@each_causal
@each_call
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_budget(impl: str, causal: bool, call: str, dtype: torch.dtype) -> None:
    *shape, kwargs = CALLS[call]
    x = sample(tuple(shape), seed=3, dtype=dtype)
    out = global_stats(x, causal=causal, impl=impl, **kwargs)
    assert out.dtype == dtype
    exact, plain = oracle(x.double(), causal, **kwargs), oracle(x, causal, **kwargs)
    for row in range(5):
        name = f"row {row}"
        assert_within_budget(exact[..., row, :], out[..., row, :], plain[..., row, :], name)


@each_impl
@each_causal
@each_call
def test_gradient_equals_the_definition(impl: str, causal: bool, call: str) -> None:
    *shape, kwargs = CALLS[call]
    x = sample(tuple(shape), seed=5)
    leaf = x.clone().requires_grad_()
    expected = oracle(leaf, causal, **kwargs)
    grad = sample(tuple(expected.shape), seed=6)
    exact = torch.autograd.grad(expected, leaf, grad)[0]
    torch.testing.assert_close(gradient(x, grad, causal=causal, impl=impl, **kwargs), exact, rtol=0, atol=1e-12)


@each_impl
@each_causal
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_gradient_budget(impl: str, causal: bool, dtype: torch.dtype) -> None:
    # distinct values: with ties, plain torch sends the gradient of an extreme to all of them
    x = (torch.randperm(5 * 3 * 7, generator=torch.Generator().manual_seed(1)).view(1, 5, 3, 7) / 16 + 1).to(dtype)
    grad = sample((1, 5, 5, 7) if causal else (1, 5, 7), seed=8, dtype=dtype)
    exact_leaf, plain_leaf = x.double().requires_grad_(), x.clone().requires_grad_()
    exact = torch.autograd.grad(oracle(exact_leaf, causal), exact_leaf, grad.double(), allow_unused=True)[0]
    plain = torch.autograd.grad(oracle(plain_leaf, causal), plain_leaf, grad)[0]
    assert_within_budget(exact, gradient(x, grad, causal=causal, impl=impl), plain, "grad local")


@each_impl
@each_causal
@each_call
def test_gradcheck(impl: str, causal: bool, call: str) -> None:
    *shape, kwargs = CALLS[call]
    shape[-1] = min(shape[-1], 3)
    x = sample(tuple(shape), seed=9).requires_grad_()
    # fast mode: one random direction; every single entry is compared with the definition above
    assert torch.autograd.gradcheck(lambda t: global_stats(t, causal=causal, impl=impl, **kwargs), x, fast_mode=True)


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 3), n=st.integers(1, 6), m=st.integers(1, 4), h=st.integers(1, 19), seed=st.integers(0, 2**31),
    causal=st.booleans(), impl=st.sampled_from(IMPLS),
)  # fmt: skip
def test_leaving_out_equals_removing(b: int, n: int, m: int, h: int, seed: int, causal: bool, impl: str) -> None:
    x, valid = sample((b, n, m, h), seed), mask(b, n, seed)
    out = global_stats(x, causal=causal, valid=valid, impl=impl)
    for row in range(b):
        kept = x[row : row + 1, valid[row]]
        alone = global_stats(kept, causal=causal, impl=impl)
        if causal:
            torch.testing.assert_close(out[row][valid[row]], alone[0], rtol=0, atol=1e-13)
        else:
            torch.testing.assert_close(out[row], alone[0], rtol=0, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 12), m=st.integers(1, 3), h=st.integers(1, 19), seed=st.integers(0, 2**31), causal=st.booleans(),
    impl=st.sampled_from(IMPLS),
)  # fmt: skip
def test_packed_equals_each_document_alone(n: int, m: int, h: int, seed: int, causal: bool, impl: str) -> None:
    # documents of very different size: nothing of one may show in another
    x, cu = sample((1, n, m, h), seed), cuts(n, seed)
    for d, (start, stop) in enumerate(itertools.pairwise(cu.tolist())):
        x[:, start:stop] *= 10.0 ** (3 * d)
    valid = mask(1, n, seed)
    out = global_stats(x, causal=causal, cu_segments=cu, valid=valid, impl=impl)
    for d, (start, stop) in enumerate(itertools.pairwise(cu.tolist())):
        alone = global_stats(x[:, start:stop], causal=causal, valid=valid[:, start:stop], impl=impl)[0]
        own = out[0, start:stop] if causal else out[d]
        torch.testing.assert_close(own, alone, rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 7), m=st.integers(1, 4), seed=st.integers(0, 2**31), impl=st.sampled_from(IMPLS))
def test_causal_ends_in_shared_and_slot_order_does_not_matter(n: int, m: int, seed: int, impl: str) -> None:
    x, valid = sample((2, n, m, 5), seed), mask(2, n, seed)
    shared = global_stats(x, valid=valid, impl=impl)
    running = global_stats(x, causal=True, valid=valid, impl=impl)
    torch.testing.assert_close(running[:, -1], shared, rtol=0, atol=1e-13)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    shuffled = global_stats(x[:, :, order], causal=True, valid=valid, impl=impl)
    torch.testing.assert_close(shuffled, running, rtol=0, atol=1e-13)
    later = x.clone()
    later[:, n // 2 :] += 100
    torch.testing.assert_close(
        global_stats(later, causal=True, valid=valid, impl=impl)[:, : n // 2], running[:, : n // 2], rtol=0, atol=0
    )


@each_impl
@each_causal
def test_spread_far_from_zero(impl: str, causal: bool) -> None:
    # E[x^2] - E[x]^2 would leave nothing of a spread of 1e-2 around 1e4 in float32
    x = (1e4 + 1e-2 * sample((1, 64, 8, 33), offset=0)).float()
    out = global_stats(x, causal=causal, impl=impl).double()
    exact = oracle(x.double(), causal)
    torch.testing.assert_close(out[..., 3, :], exact[..., 3, :], rtol=2e-6, atol=0)
    torch.testing.assert_close(out[..., 0, :], exact[..., 0, :], rtol=1e-7, atol=0)
    grad = torch.zeros_like(out)
    grad[..., 3, :] = 1
    leaf = x.double().requires_grad_()
    expected = torch.autograd.grad(oracle(leaf, causal), leaf, grad)[0]
    found = gradient(x, grad.float(), causal=causal, impl=impl).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@each_impl
@each_causal
def test_spread_after_an_outlier(impl: str, causal: bool) -> None:
    # the first row is no good origin for the rest
    x = sample((1, 16, 8, 9), offset=0).float()
    x[:, 0, 0] = 3e6
    exact, found = oracle(x.double(), causal), global_stats(x, causal=causal, impl=impl).double()
    torch.testing.assert_close(found[..., 3, :], exact[..., 3, :], rtol=2e-6, atol=0)
    # what a sum that holds 3e6 can resolve in float32
    torch.testing.assert_close(found[..., 0, :], exact[..., 0, :], rtol=0, atol=3e6 * 2**-22)


@each_impl
def test_first_of_equal_entries(impl: str) -> None:
    x = torch.tensor([1.0, 3, 3, 1, 3, 1]).view(1, 3, 2, 1)
    grad = torch.zeros(1, 5, 1)
    grad[0, 1], grad[0, 2] = 1, 10
    assert gradient(x, grad, impl=impl).flatten().tolist() == [10, 1, 0, 0, 0, 0]
    late = torch.tensor([[False, True, True]])
    assert gradient(x, grad, valid=late, impl=impl).flatten().tolist() == [0, 0, 1, 10, 0, 0]
    running = torch.zeros(1, 3, 5, 1)
    running[0, :, 1, 0] = torch.tensor([1.0, 2, 4])
    assert gradient(x, running, causal=True, impl=impl).flatten().tolist() == [0, 7, 0, 0, 0, 0]
    rising = torch.tensor([1.0, 3, 3, 1, 5, 5]).view(1, 3, 2, 1)
    assert gradient(rising, running, causal=True, impl=impl).flatten().tolist() == [0, 3, 0, 0, 4, 0]
    packed = torch.tensor([0, 1, 3], dtype=torch.int32)
    found = gradient(x, running, causal=True, cu_segments=packed, impl=impl)
    assert found.flatten().tolist() == [0, 1, 6, 0, 0, 0]


@each_impl
@each_causal
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_floors(impl: str, causal: bool, dtype: torch.dtype) -> None:
    x = torch.full((1, 3, 2, 4), 1e-8, dtype=dtype)  # no spread, and a mean shorter than the norm's floor
    out = global_stats(x, causal=causal, impl=impl)
    torch.testing.assert_close(out[..., 3, :], torch.full_like(out[..., 3, :], 1e-6))
    torch.testing.assert_close(out[..., 4, :], out[..., 0, :] / 1e-6)
    grad = torch.zeros_like(out)
    grad[..., 3, :] = 1
    assert not gradient(x, grad, causal=causal, impl=impl).any()
    shared = torch.zeros(1, 5, 4, dtype=dtype)
    shared[:, 4] = 1
    torch.testing.assert_close(gradient(x, shared, impl=impl), torch.full_like(x, 1e6 / 6))


@each_impl
@each_causal
def test_segments_left_out_may_hold_anything(impl: str, causal: bool) -> None:
    x, valid = sample((2, 6, 3, 10)), torch.tensor([[0, 0, 1, 0, 1, 0], [0] * 6], dtype=torch.bool)
    for poison in (torch.nan, torch.inf):
        dirty = x.clone()
        dirty[~valid] = poison
        out = global_stats(dirty, causal=causal, valid=valid, impl=impl)
        torch.testing.assert_close(out, oracle(x, causal, valid), rtol=0, atol=1e-13)
        assert not out[1].any()
        grad = gradient(dirty, torch.ones_like(out), causal=causal, valid=valid, impl=impl)
        assert grad.isfinite().all() and not grad[~valid].any() and grad[valid].any()


@each_impl
@each_causal
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("slots", [2, 8])
def test_nan_and_inf_of_counting_segments_show(impl: str, causal: bool, dtype: torch.dtype, slots: int) -> None:
    x = sample((1, 4, slots, 12), dtype=dtype)
    x[0, 1, 1, 3], x[0, 1, 0, 4] = torch.nan, torch.inf
    rows = global_stats(x, causal=causal, impl=impl)[0]
    last = rows[-1] if causal else rows
    assert last[:4, 3].isnan().all()
    assert not last[0, 4].isfinite() and last[1, 4] == torch.inf and last[2, 4].isfinite() and last[3, 4].isnan()
    clean = [c for c in range(12) if c not in (3, 4)]
    assert last[:4, clean].isfinite().all()
    if causal:
        assert rows[0].isfinite().all()


# what long texts do: the first token of many models has activations a thousand times the others'
DRIFTS = {
    "first": lambda i, n: 1000.0 * (i == 0),
    "last": lambda i, n: 1000.0 * (i == n - 1),
    "one-in-eight": lambda i, n: 100.0 * (i % 8 == 0),
    "there-and-back": lambda i, n: 50.0 if i < n // 3 else -10.0,  # no set of which has a mean near 0
}


def check_drift(impl: str, causal: bool, n: int, drift: str, h: int, slots: int = 8) -> None:
    """Every set by itself: one with a large result would hide the others."""
    moved = torch.tensor([DRIFTS[drift](i, n) for i in range(n)]).view(1, n, 1, 1)
    x = sample((1, n, slots, h), seed=n, dtype=torch.float32, offset=0) + moved
    exact, rough = oracle(x.double(), causal), oracle(x, causal)
    out = global_stats(x, causal=causal, impl=impl)
    for i in range(n) if causal else [slice(None)]:
        for row in range(5):
            truth, found, near = (t[0, i][..., row, :] if causal else t[0, row] for t in (exact, out, rough))
            assert_within_budget(truth, found, near, f"set {i} row {row}")


@pytest.mark.parametrize("drift", DRIFTS)
@each_impl
@each_causal
def test_segments_far_from_each_other_keep_the_budget(impl: str, causal: bool, drift: str) -> None:
    check_drift(impl, causal, 20 if causal else 70, drift, 24)


@each_impl
@each_causal
def test_subnormal_extremes_are_kept(impl: str, causal: bool) -> None:
    x = torch.full((1, 4, 8, 40), -1.0, dtype=torch.bfloat16)
    tiny = torch.tensor([0x0010], dtype=torch.int16).view(torch.bfloat16)
    x[0, 1, 3] = tiny
    out = global_stats(x, causal=causal, impl=impl)
    last = out[:, -1] if causal else out
    assert torch.equal(last[0, 1], tiny.expand(40))
    grad = torch.zeros_like(out)
    (grad[:, -1] if causal else grad)[:, 1] = 1
    found = gradient(x, grad, causal=causal, impl=impl)
    assert torch.equal(found[0, 1, 3], torch.ones(40, dtype=torch.bfloat16)) and found.float().sum() == 40


@each_impl
@each_causal
def test_a_variance_beyond_the_range_is_infinite(impl: str, causal: bool) -> None:
    x = (6e18 * sample((1, 4, 8, 40), dtype=torch.float32)).bfloat16()
    assert not global_stats(x, causal=causal, impl=impl).isnan().any()


@each_impl
@each_causal
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_any_strides(impl: str, causal: bool, dtype: torch.dtype) -> None:
    wide = sample((3, 4, 6, 40), dtype=dtype)
    views = [wide.permute(2, 1, 0, 3), wide[:, ::2], wide[..., 5:22], wide[:1].expand(3, 4, 6, 40)]
    for view in views:
        grad = torch.ones_like(global_stats(view.contiguous(), causal=causal, impl=impl))
        same = {"rtol": 0, "atol": 0}
        flat = view.contiguous()
        torch.testing.assert_close(
            global_stats(view, causal=causal, impl=impl), global_stats(flat, causal=causal, impl=impl), **same
        )
        found = _backward(impl, grad, view, causal)
        torch.testing.assert_close(found, _backward(impl, grad, flat, causal), **same)


def _backward(impl: str, grad: Tensor, local: Tensor, causal: bool) -> Tensor:
    return torch.ops.hici.global_stats_backward(grad, local, causal, None, None, impl)


@each_impl
@pytest.mark.parametrize(
    ("shape", "kwargs", "expected"),
    [
        ((0, 3, 2, 4), {}, (0, 5, 4)),
        ((2, 0, 2, 4), {}, (2, 5, 4)),
        ((0, 3, 2, 4), {"causal": True}, (0, 3, 5, 4)),
        ((2, 0, 2, 4), {"causal": True}, (2, 0, 5, 4)),
        ((1, 0, 2, 4), {"cu_segments": torch.zeros(3, dtype=torch.int32)}, (2, 5, 4)),
        ((1, 0, 2, 4), {"cu_segments": torch.zeros(1, dtype=torch.int32)}, (0, 5, 4)),
        ((1, 0, 2, 4), {"cu_segments": torch.zeros(2, dtype=torch.int32), "causal": True}, (1, 0, 5, 4)),
    ],
)
def test_empty(impl: str, shape: tuple[int, ...], kwargs: dict[str, Any], expected: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    out = global_stats(x, impl=impl, **kwargs)
    assert out.shape == expected and not out.any()
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == shape


@each_impl
@each_causal
def test_same_bits_every_time_and_for_any_number_of_threads(impl: str, causal: bool) -> None:
    x = sample((2, 5, 4, 1500), dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, before):
            torch.set_num_threads(threads)
            for _ in range(3):
                out = global_stats(x, causal=causal, impl=impl)
                results.append((out, gradient(x, torch.ones_like(out), causal=causal, impl=impl)))
    finally:
        torch.set_num_threads(before)
    first = results[0]
    if impl == "reference":  # torch promises this for its own kernels only at a fixed number of threads
        first, results = results[0], results[:3]
    assert all(torch.equal(out, first[0]) and torch.equal(grad, first[1]) for out, grad in results)


@each_impl
@each_causal
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(impl: str, causal: bool, dtype: torch.dtype) -> None:
    for b, valid, cu in ((2, mask(2, 5), None), (1, None, cuts(5))):
        x = sample((b, 5, 2, 9), dtype=dtype).requires_grad_()
        out = global_stats(x, causal=causal, valid=valid, cu_segments=cu, impl=impl)
        torch.library.opcheck(torch.ops.hici.global_stats.default, (x, causal, valid, cu, impl))
        grad = torch.ones_like(out.detach())
        torch.library.opcheck(torch.ops.hici.global_stats_backward.default, (grad, x.detach(), causal, valid, cu, impl))


@each_impl
@each_causal
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_whole(impl: str, causal: bool, dynamic: bool) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor, valid: Tensor) -> Tensor:
        return global_stats(x * 2, causal=causal, valid=valid, impl=impl).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (3, 6):
        leaves = [sample((2, n, 2, 5), seed=n).requires_grad_() for _ in range(2)]
        valid = mask(2, n, n)
        values = [f(x, valid) for f, x in zip((compiled, loss), leaves, strict=True)]
        for value in values:
            value.backward()
        torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=1e-12)


@each_impl
def test_compiles_whole_when_packed(impl: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, cu: global_stats(x, cu_segments=cu, impl=impl), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (4, 9):
        x, cu = sample((1, n, 2, 5)), cuts(n, n)
        torch.testing.assert_close(compiled(x, cu), oracle(x, cu_segments=cu), rtol=0, atol=1e-13)


def test_second_derivative_is_refused() -> None:
    x = sample((1, 2, 2, 3)).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(global_stats(x).sum(), x, create_graph=True)


@pytest.mark.skipif("cpu" not in IMPLS, reason="the native library is not built")
def test_the_native_kernel_is_the_default_on_the_cpu() -> None:
    x = sample((1, 2, 2, 3))
    assert _dispatch.select("global_stats", "", x, False, None, None).__name__.endswith("global_stats.cpu")
    assert _dispatch.select("global_stats", "", x.to("meta"), False, None, None).__name__.endswith(
        "global_stats.reference"
    )


@pytest.mark.skipif("cpu" not in IMPLS, reason="the native library is not built")
def test_the_binding_guards_memory_by_itself() -> None:
    from hici_kernels import _native

    run = _native.library().global_stats_forward
    x, out = torch.zeros(1, 2, 3, 4), torch.zeros(1, 5, 4)
    bad = torch.tensor([0, 5], dtype=torch.int32)
    wrong: list[tuple[type[Exception], tuple[Any, ...], str]] = [
        (ValueError, (x[0], False, None, None, out), "local must have 4 dimensions"),
        (ValueError, (x, True, None, None, out), "out has shape"),
        (ValueError, (x, False, None, None, torch.zeros(1, 4, 5).mT), "out must be contiguous"),
        (TypeError, (x, False, None, None, out.double()), "out has a wrong dtype"),
        (TypeError, (x.int(), False, None, None, out.int()), "local must be float32"),
        (TypeError, (x, False, torch.ones(1, 2), None, out), "valid has a wrong dtype"),
        (ValueError, (x, False, torch.ones(1, 3, dtype=torch.bool), None, out), "valid has shape"),
        (ValueError, (x, False, None, bad, out), "cu_segments must run from 0 to 2"),
        (ValueError, (x.mT.contiguous().mT, False, None, None, out), "contiguous in its last dimension"),
    ]
    for kind, arguments, text in wrong:
        with pytest.raises(kind, match=text):
            run(*arguments, -1, 1)
