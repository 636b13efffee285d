"""The native merge_attention: every path, dtype and layout, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hici_kernels import _dispatch, _native, merge_attention
from hici_kernels.testing import assert_usually_within, excess

pytestmark = pytest.mark.skipif(not _native.paths(), reason="the native library is not built")
PATHS = list(_native.paths())
each_path = pytest.mark.parametrize("path", PATHS)


def formula(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Plain PyTorch in the dtype of ``outs``; unseen parts are replaced before they can be multiplied."""
    stacked = torch.stack(lses)
    seen = stacked > -torch.inf
    some = seen.any(0)
    safe = torch.where(seen, stacked, torch.where(some, -torch.inf, 0.0))
    weight = torch.where(seen, safe.softmax(0), 0.0).transpose(2, 3).unsqueeze(-1)
    values = torch.where(weight > 0, torch.stack(outs), 0.0)
    lse = torch.where(some, safe.logsumexp(0), -torch.inf)
    return (weight.to(values.dtype) * values).sum(0), lse


def drawn(parts: int, b: int, s: int, h: int, d: int, dtype: torch.dtype, seed: int, holes: float) -> Any:
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs = [torch.randn(b, s, h, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(parts)]
    lses = [(3 * torch.randn(b, h, s, generator=g, dtype=torch.float64)).to(wide) for _ in range(parts)]
    for lse in lses:
        lse[torch.rand(lse.shape, generator=g) < holes] = -torch.inf
    grads = (torch.randn(b, s, h, d, generator=g).to(dtype), torch.randn(b, h, s, generator=g).to(wide))
    grads[1][torch.stack(lses).amax(0) == -torch.inf] = 0  # -inf has no slope
    return outs, lses, grads


def poisoned(outs: list[Tensor], lses: list[Tensor]) -> list[Tensor]:
    """The same parts holding NaN where they saw nothing."""
    return [
        torch.where((lse == -torch.inf).transpose(1, 2).unsqueeze(-1), torch.nan, out)
        for out, lse in zip(outs, lses, strict=True)
    ]


def strided(x: Tensor) -> Tensor:
    """Equal values in memory ordered otherwise, last dimension still contiguous."""
    wide = x.new_empty((x.shape[2], x.shape[0], x.shape[1], x.shape[3] + 3))
    view = wide.permute(1, 2, 0, 3)[..., : x.shape[3]]
    view.copy_(x)
    return view


def backward(outs: list[Tensor], lses: list[Tensor], grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    result: list[Tensor] = torch.ops.hici.merge_attention_backward(*grads, outs, lses, "cpu")
    return result


def ratios(
    parts: int, b: int, s: int, h: int, d: int, dtype: torch.dtype, holes: float, layout: bool, path: str, seed: int
) -> dict[str, float]:
    """Error / budget of out, lse and every gradient in one draw."""
    outs, lses, grads = drawn(parts, b, s, h, d, dtype, seed, holes)
    given_outs, given_lses = poisoned(outs, lses), lses
    if layout:
        given_outs = [strided(x) for x in given_outs]
        given_lses = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in lses]
    with _native.path(path):
        out, lse = merge_attention(given_outs, given_lses, impl="cpu")
        found = backward(given_outs, given_lses, grads)
    wide, plain = ([x.to(t).requires_grad_() for x in (*outs, *lses)] for t in (torch.float64, None))
    exact, rough = formula(wide[:parts], wide[parts:]), formula(plain[:parts], plain[parts:])
    truth = torch.autograd.grad(exact, wide, [g.double() for g in grads])
    near = torch.autograd.grad(rough, plain, [g.to(r.dtype) for g, r in zip(grads, rough, strict=True)])
    triples = zip((*exact, *truth), (*rough, *near), (out, lse, *found), strict=True)
    return {f"result {i}": excess(t.detach(), n.detach(), f) for i, (t, n, f) in enumerate(triples)}


@settings(max_examples=200, deadline=None)
@given(
    parts=st.integers(1, 6), b=st.integers(1, 2), s=st.integers(1, 35), h=st.integers(1, 5), d=st.integers(1, 150),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    holes=st.sampled_from([0.0, 0.3, 0.9]),
    layout=st.booleans(),
    path=st.sampled_from(PATHS),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes_keep_the_budget(
    parts: int, b: int, s: int, h: int, d: int, dtype: torch.dtype, holes: float, layout: bool, path: str, seed: int
) -> None:
    case = (parts, b, s, h, d, dtype, holes, layout, path)
    assert_usually_within(lambda i: ratios(*case, seed + i), str(case))


def with_threads(threads: int, call: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@each_path
@pytest.mark.parametrize(
    ("parts", "b", "s", "h", "d", "dtype"),
    [
        (3, 2, 300, 8, 96, torch.float32),
        (2, 1, 700, 32, 128, torch.bfloat16),
        (9, 1, 130, 30, 64, torch.float16),
        (2, 1, 2100, 32, 128, torch.float32),  # stores past the caches
    ],
)
def test_any_number_of_threads_gives_the_same_bits(
    path: str, parts: int, b: int, s: int, h: int, d: int, dtype: torch.dtype
) -> None:
    outs, lses, grads = drawn(parts, b, s, h, d, dtype, 1, 0.2)
    dirty = poisoned(outs, lses)
    with _native.path(path):
        results = [
            with_threads(t, lambda: [*merge_attention(dirty, lses, impl="cpu"), *backward(dirty, lses, grads)])
            for t in (1, 2, 3, 7)
        ]
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))
    out, lse = formula([x.double() for x in outs], [x.double() for x in lses])
    eps = torch.finfo(dtype).eps
    assert float((results[0][0].double() - out).abs().max()) <= 2 * eps * float(out.abs().max())
    seen = lse > -torch.inf
    assert torch.equal(results[0][1] > -torch.inf, seen)
    assert float((results[0][1].double() - lse)[seen].abs().max()) <= 2**-22 * float(lse[seen].abs().max())


@each_path
@pytest.mark.parametrize("d", [1, 8, 67])
def test_float64(path: str, d: int) -> None:
    outs, lses, grads = drawn(3, 2, 18, 3, d, torch.float64, 6, 0.3)
    with _native.path(path):
        found = [*merge_attention(poisoned(outs, lses), lses, impl="cpu"), *backward(outs, lses, grads)]
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    exact = formula(leaves[:3], leaves[3:])
    truth = [*(x.detach() for x in exact), *torch.autograd.grad(exact, leaves, grads)]
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-13)


@each_path
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)])
def test_empty(path: str, shape: tuple[int, int, int, int]) -> None:
    outs, lses, grads = drawn(2, *shape, torch.float32, 0, 0.0)
    with _native.path(path):
        out, lse = merge_attention(outs, lses, impl="cpu")
        found = backward(outs, lses, grads)
    assert out.shape == shape and lse.shape == lses[0].shape
    assert [x.shape for x in found] == [x.shape for x in (*outs, *lses)]


@each_path
def test_one_part_is_returned_as_it_is(path: str) -> None:
    outs, lses, grads = drawn(1, 2, 9, 3, 40, torch.float32, 4, 0.0)
    with _native.path(path):
        out, lse = merge_attention(outs, lses, impl="cpu")
        found = backward(outs, lses, grads)
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])
    assert torch.equal(found[0], grads[0]) and torch.equal(found[1], grads[1])


def test_a_last_dimension_of_any_stride() -> None:
    outs, lses, grads = drawn(2, 2, 5, 3, 16, torch.float32, 5, 0.0)
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in outs]
    assert torch.equal(merge_attention(turned, lses, impl="cpu")[0], merge_attention(outs, lses, impl="cpu")[0])
    constant = (torch.ones(1).expand(grads[0].shape), grads[1])
    solid = (constant[0].contiguous(), grads[1])
    assert all(map(torch.equal, backward(turned, lses, constant), backward(outs, lses, solid)))


def test_the_native_kernel_is_the_default_on_the_cpu() -> None:
    outs, lses, _ = drawn(2, 1, 2, 2, 4, torch.float32, 0, 0.0)
    assert _dispatch.select("merge_attention", "", outs, lses).__name__.endswith(".cpu")
    meta = [x.to("meta") for x in outs]
    assert _dispatch.select("merge_attention", "", meta, lses).__name__.endswith(".reference")


def test_the_binding_guards_memory_by_itself() -> None:
    run, back = _native.library().merge_attention_forward, _native.library().merge_attention_backward
    outs, lses, grads = drawn(2, 1, 3, 2, 4, torch.float32, 0, 0.0)
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    wrong: list[tuple[type[Exception], tuple[Any, ...], str]] = [
        (TypeError, (-1, 1), "at least 4 arguments"),
        (TypeError, (-1, 1, out, lse, *outs, lses[0]), "equally many"),
        (ValueError, (99, 1, out, lse, *outs, *lses), "path must be"),
        (ValueError, (-1, 0, out, lse, *outs, *lses), "threads must be"),
        (ValueError, (-1, 1, out[:, :2], lse, *outs, *lses), "lse has shape"),
        (ValueError, (-1, 1, out, lse, outs[0], outs[1][:, :2], *lses), "outs has shape"),
        (TypeError, (-1, 1, out, lse, outs[0], outs[1].double(), *lses), "outs has a wrong dtype"),
        (ValueError, (-1, 1, out, lse, outs[0], outs[1].mT.contiguous().mT, *lses), "contiguous in its last"),
        (TypeError, (-1, 1, out, lse, *outs, lses[0], lses[1].double()), "lses has a wrong dtype"),
    ]
    for kind, arguments, text in wrong:
        with pytest.raises(kind, match=text):
            run(*arguments)
    with pytest.raises(ValueError, match="gradients of outs has shape"):
        back(-1, 1, *grads, *outs, *lses, outs[0], outs[1][:, :2], *lses)
