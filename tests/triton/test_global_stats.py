"""global_stats' kernels under Triton's interpreter: results against float64, and what must not matter."""

import importlib.util
import mmap
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from far_programs import only_ends

from hici_kernels.errors import ImplError
from hici_kernels.ops.global_stats import global_stats
from hici_kernels.ops.global_stats import triton as launch
from hici_kernels.testing import assert_within_budget
from hici_kernels.tuning.lookup import trial

pytest.importorskip("triton.language")

# the definition that every other implementation is tested against; its file has this one's name
_spec = importlib.util.spec_from_file_location(
    "definition", Path(__file__).parents[1] / "stats" / "test_global_stats.py"
)
definition = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(definition)
oracle, sample, mask, cuts, gradient, check_drift = (
    getattr(definition, name) for name in ("oracle", "sample", "mask", "cuts", "gradient", "check_drift")
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
each_causal = pytest.mark.parametrize("causal", [False, True], ids=["shared", "causal"])
# The budget's floor, relative. Plain float32 loses the spread altogether where these tests use it.
TWO_EPS = 2 * torch.finfo(F32).eps
BLOCKS = {"BLOCK_H": 32, "BLOCK_R": 4, "num_warps": 4, "num_stages": 1}


@pytest.fixture(autouse=True)
def small_tiles():
    with trial("global_stats", BLOCKS), trial("global_stats_backward", BLOCKS):
        yield


def stats(x, causal=False, **more):
    return global_stats(x, causal=causal, impl="triton", **more)


def untied(x):
    """No two equal entries in a channel: the definition shares a maximum's gradient among equal ones."""
    flat = x.flatten(0, 2).double()
    order = torch.randperm(flat.shape[0], generator=torch.Generator().manual_seed(0)).double()[:, None]
    moved = order / 16 + (flat * 1000).round() % 8 / 256 - flat.shape[0] / 32
    return (0.37 * moved + 1.1).view(x.shape).to(x.dtype)


CALLS = {
    # 70 channels are two blocks and a part; 3 slots are not a whole tile; 37 segments are two pieces and many splits
    "plain": (2, 3, 3, 70, {}),
    "valid": (2, 5, 2, 9, {"valid": mask(2, 5)}),
    "packed": (1, 9, 2, 20, {"cu_segments": cuts(9, 1), "valid": mask(1, 9, 1)}),
    "many": (1, 37, 2, 5, {}),
    "many packed": (1, 37, 2, 5, {"cu_segments": cuts(37), "valid": mask(1, 37)}),
    "one": (1, 1, 1, 1, {}),
}


def check(call, causal, dtype):
    *shape, options = CALLS[call]
    x = untied(sample(tuple(shape), seed=3)).to(dtype)
    out = stats(x, causal, **options)
    exact, plain = oracle(x.double(), causal, **options), oracle(x, causal, **options)
    assert out.dtype == dtype and out.shape == exact.shape
    for row in range(5):
        assert_within_budget(exact[..., row, :], out[..., row, :], plain[..., row, :], f"row {row}")
    grad = sample(tuple(out.shape), seed=5, dtype=dtype)
    wanted = []
    for y in (x.double(), x):
        leaf = y.clone().requires_grad_()
        wanted += torch.autograd.grad(oracle(leaf, causal, **options), leaf, grad.to(y.dtype))
    assert_within_budget(wanted[0], gradient(x, grad, causal=causal, impl="triton", **options), wanted[1], "gradient")


@each_causal
@pytest.mark.parametrize("call", CALLS)
def test_float32(call, causal):
    check(call, causal, F32)


@each_causal
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("call", ["plain", "packed"])
def test_low_precision(call, causal, dtype):
    check(call, causal, dtype)


@pytest.mark.slow
@each_causal
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("call", ["valid", "many", "many packed", "one"])
def test_low_precision_of_the_rest(call, causal, dtype):
    check(call, causal, dtype)


def test_many_rows_are_cut():
    x = sample((1, 37, 2, 5), dtype=F32)
    assert launch.Problem("global_stats", x, True, None, None).pieces == 2
    assert launch.Problem("global_stats", x, False, None, None).splits == 2


@each_causal
def test_spread_far_from_zero(causal):
    # E[x^2] - E[x]^2 would leave nothing of a spread of 1e-2 around 1e4 in float32
    x = (1e4 + 1e-2 * sample((1, 9, 8, 33), offset=0)).float()
    out, exact = stats(x, causal).double(), oracle(x.double(), causal)
    torch.testing.assert_close(out[..., 3, :], exact[..., 3, :], rtol=TWO_EPS, atol=0)
    torch.testing.assert_close(out[..., 0, :], exact[..., 0, :], rtol=TWO_EPS / 2, atol=0)
    grad = torch.zeros_like(out)
    grad[..., 3, :] = 1
    leaf = x.double().requires_grad_()
    expected = torch.autograd.grad(oracle(leaf, causal), leaf, grad)[0]
    found = gradient(x, grad.float(), causal=causal, impl="triton").double()
    torch.testing.assert_close(found, expected, rtol=0, atol=TWO_EPS * float(expected.abs().max()))


@each_causal
@pytest.mark.parametrize("drift", ["first", "last"])
def test_segments_far_from_each_other_keep_the_budget(causal, drift):
    check_drift("triton", causal, 19 if causal else 37, drift, 9, slots=2)


@each_causal
def test_spread_after_an_outlier(causal):
    x = sample((1, 5, 8, 9), offset=0).float()
    x[:, 0, 0] = 3e6
    exact, found = oracle(x.double(), causal), stats(x, causal).double()
    torch.testing.assert_close(found[..., 3, :], exact[..., 3, :], rtol=TWO_EPS, atol=0)
    # what a sum that holds 3e6 can resolve in float32
    torch.testing.assert_close(found[..., 0, :], exact[..., 0, :], rtol=0, atol=3e6 * TWO_EPS)


def test_first_of_equal_entries():
    x = torch.tensor([1.0, 3, 3, 1, 3, 1]).view(1, 3, 2, 1)
    grad = torch.zeros(1, 5, 1)
    grad[0, 1], grad[0, 2] = 1, 10
    assert gradient(x, grad, impl="triton").flatten().tolist() == [10, 1, 0, 0, 0, 0]
    late = torch.tensor([[False, True, True]])
    assert gradient(x, grad, valid=late, impl="triton").flatten().tolist() == [0, 0, 1, 10, 0, 0]
    running = torch.zeros(1, 3, 5, 1)
    running[0, :, 1, 0] = torch.tensor([1.0, 2, 4])
    assert gradient(x, running, causal=True, impl="triton").flatten().tolist() == [0, 7, 0, 0, 0, 0]
    rising = torch.tensor([1.0, 3, 3, 1, 5, 5]).view(1, 3, 2, 1)
    assert gradient(rising, running, causal=True, impl="triton").flatten().tolist() == [0, 3, 0, 0, 4, 0]
    packed = torch.tensor([0, 1, 3], dtype=torch.int32)
    found = gradient(x, running, causal=True, cu_segments=packed, impl="triton")
    assert found.flatten().tolist() == [0, 1, 6, 0, 0, 0]
    # across the splits and pieces of many rows
    flat = torch.zeros(1, 40, 2, 1)
    assert gradient(flat, grad, impl="triton").flatten().nonzero().flatten().tolist() == [0]
    grads = torch.zeros(1, 40, 5, 1)
    grads[0, :, 1] = 1
    assert gradient(flat, grads, causal=True, impl="triton").flatten().tolist() == [40] + [0] * 79


@each_causal
def test_floors(causal):
    x = torch.full((1, 3, 2, 4), 1e-8)  # no spread, and a mean shorter than the norm's floor
    out = stats(x, causal)
    torch.testing.assert_close(out[..., 3, :], torch.full_like(out[..., 3, :], 1e-6))
    torch.testing.assert_close(out[..., 4, :], out[..., 0, :] / 1e-6)
    grad = torch.zeros_like(out)
    grad[..., 3, :] = 1
    assert not gradient(x, grad, causal=causal, impl="triton").any()
    shared = torch.zeros(1, 5, 4)
    shared[:, 4] = 1
    torch.testing.assert_close(gradient(x, shared, impl="triton"), torch.full_like(x, 1e6 / 6))


@each_causal
@pytest.mark.parametrize("poison", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.slow)])
def test_segments_left_out_and_scratch_may_hold_anything(causal, poison):
    x, valid = sample((2, 6, 3, 40), dtype=F32), torch.tensor([[0, 0, 1, 0, 1, 0], [0] * 6], dtype=torch.bool)
    dirty = x.masked_fill(~valid[..., None, None], poison)
    new_empty = torch.Tensor.new_empty

    def filled(*arguments, **options):
        x = new_empty(*arguments, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-1)

    grad = torch.ones_like(oracle(x, causal, valid))
    clean = stats(x, causal, valid=valid), gradient(x, grad, causal=causal, valid=valid, impl="triton")
    with mock.patch.object(torch.Tensor, "new_empty", filled):
        found = stats(dirty, causal, valid=valid), gradient(dirty, grad, causal=causal, valid=valid, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
    assert not found[0][1].any() and not found[1][~valid].any() and found[1][valid].any()


@each_causal
def test_nan_and_inf_of_counting_segments_show(causal):
    x = sample((1, 4, 2, 12), dtype=F32)
    x[0, 1, 1, 3], x[0, 1, 0, 4] = torch.nan, torch.inf
    rows = stats(x, causal)[0]
    last = rows[-1] if causal else rows
    assert last[:4, 3].isnan().all()
    assert not last[0, 4].isfinite() and last[1, 4] == torch.inf and last[2, 4].isfinite()
    clean = [c for c in range(12) if c not in (3, 4)]
    assert last[:4, clean].isfinite().all()
    if causal:
        assert rows[0].isfinite().all()


@each_causal
def test_same_bits_every_time_and_for_any_strides(causal):
    wide = sample((2, 3, 4, 40), dtype=BF16)
    for view in (wide[..., :17], wide[:1, :2].permute(2, 1, 0, 3)[:2], wide[:1, :2].expand(2, 2, 4, 40)):
        flat = view.contiguous()
        out = stats(flat, causal)
        assert torch.equal(out, stats(view, causal))
        grads = [torch.ops.hici.global_stats_backward(out, y, causal, None, None, "triton") for y in (flat, view)]
        assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((0, 3, 2, 4), {}, (0, 5, 4)),
        ((2, 0, 2, 4), {}, (2, 5, 4)),
        ((2, 0, 2, 4), {"causal": True}, (2, 0, 5, 4)),
        ((1, 0, 2, 4), {"cu_segments": torch.zeros(3, dtype=torch.int32)}, (2, 5, 4)),
        ((1, 0, 2, 4), {"cu_segments": torch.zeros(1, dtype=torch.int32)}, (0, 5, 4)),
        ((1, 2, 2, 4), {"cu_segments": torch.tensor([0, 0, 2, 2], dtype=torch.int32)}, (3, 5, 4)),
    ],
)
def test_empty(shape, options, expected):
    x = torch.ones(shape, requires_grad=True)
    out = stats(x, **options)
    assert out.shape == expected and (out.flatten(1).any(1).sum() == (x.numel() > 0))
    out.sum().backward()
    assert x.grad.shape == shape


@each_causal
def test_offsets_beyond_32_bits(causal):
    stride = 2**29
    # Linux's MAP_NORESERVE, which Python names from 3.13 on: pages that are not touched cost nothing
    memory = mmap.mmap(-1, 12 * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    far = torch.from_numpy(np.frombuffer(memory, dtype=np.float16)).as_strided((1, 6, 2, 8), (0, 2 * stride, stride, 1))
    near = sample((1, 6, 2, 8), dtype=F16)
    far.copy_(near)
    out = stats(near, causal)
    assert torch.equal(out, stats(far, causal))
    grads = [torch.ops.hici.global_stats_backward(out, y, causal, None, None, "triton") for y in (near, far)]
    assert torch.equal(*grads)


@pytest.mark.slow
def test_results_beyond_32_bits():
    """The last of 2^22 documents of one segment each."""
    near = sample((1, 1, 8, 128), dtype=F16)
    n = 2**22
    far = torch.empty(1, n, 8, 128, dtype=F16)
    far[:, -1:] = near
    cu = torch.arange(n + 1, dtype=torch.int32)
    grad = torch.empty(n, 5, 128, dtype=F16)
    grad[-1:] = sample((1, 5, 128), seed=5, dtype=F16)
    assert min(far.numel(), grad.numel()) > 2**31
    one = torch.tensor([0, 1], dtype=torch.int32)
    out, dx = launch.forward(near, False, None, one), launch.backward(grad[-1:], near, False, None, one)
    with only_ends():
        far_out = launch.forward(far, False, None, cu)
        far_dx = launch.backward(grad, far, False, None, cu)
    assert torch.equal(far_out[-1:], out) and out.any()
    assert torch.equal(far_dx[:, -1:], dx) and dx.any()


def test_what_it_does_not_serve_it_says():
    with pytest.raises(ImplError, match=r"local is torch\.float64"):
        stats(torch.zeros(1, 2, 3, 4, dtype=torch.float64))
