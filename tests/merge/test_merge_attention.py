"""merge_attention against the softmax over the union of all keys."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hici_kernels
from hici_kernels import attention, merge_attention
from hici_kernels.testing import assert_within_budget


def parts(
    n: int, b: int = 2, s: int = 3, h: int = 4, d: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs = [torch.randn(b, s, h, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(n)]
    lses = [(5 * torch.randn(b, h, s, generator=g, dtype=torch.float64)).to(wide) for _ in range(n)]
    return outs, lses


def naive(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Row by row in float64, over the parts that have seen something."""
    out = torch.zeros(outs[0].shape, dtype=torch.float64)
    lse = torch.full(lses[0].shape, -torch.inf, dtype=torch.float64)
    for b, t, h in itertools.product(*(range(x) for x in out.shape[:3])):
        seen = [p for p in range(len(outs)) if lses[p][b, h, t] > -torch.inf]
        if seen:
            total = torch.logsumexp(torch.stack([lses[p][b, h, t].double() for p in seen]), 0)
            lse[b, h, t] = total
            out[b, t, h] = sum((lses[p][b, h, t].double() - total).exp() * outs[p][b, t, h].double() for p in seen)
    return out, lse


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5), seed=st.integers(0, 2**31), holes=st.floats(0, 1))
def test_equals_the_formula(n: int, seed: int, holes: float) -> None:
    outs, lses = parts(n, seed=seed)
    for lse in lses:
        lse[torch.rand(lse.shape, generator=torch.Generator().manual_seed(seed)) < holes] = -torch.inf
    out, lse = merge_attention(outs, lses)
    expected, expected_lse = naive(outs, lses)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_budget(dtype: torch.dtype) -> None:
    outs, lses = parts(3, s=64, seed=1, dtype=dtype)
    out, lse = merge_attention(outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected, expected_lse = naive(outs, lses)
    weights = torch.stack(lses).softmax(0).transpose(2, 3).unsqueeze(-1).to(dtype)
    plain = (weights * torch.stack(outs)).sum(0)
    assert_within_budget(expected, out, plain, "out")
    assert_within_budget(expected_lse, lse, torch.logsumexp(torch.stack(lses), 0), "lse")


def test_splitting_the_keys_changes_nothing() -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 9, heads, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    whole, whole_lse = attention(q, k, v, causal=False, return_lse=True)
    pieces = []
    for columns in (slice(0, 2), slice(2, 7), slice(7, 9)):
        # one query at a time over a part of the keys: its last key as the token, the others as slots before it
        rows = [
            attention(
                q[:, t : t + 1],
                k[:, columns][:, -1:],
                v[:, columns][:, -1:],
                global_k=k[:, columns][:, :-1],
                global_v=v[:, columns][:, :-1],
                return_lse=True,
            )
            for t in range(9)
        ]
        pieces.append((torch.cat([o for o, _ in rows], 1), torch.cat([x for _, x in rows], 2)))
    out, lse = merge_attention([o for o, _ in pieces], [x for _, x in pieces])
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-13)


def test_order_and_grouping_do_not_matter() -> None:
    outs, lses = parts(4, seed=5)
    out, lse = merge_attention(outs, lses)
    for order in itertools.permutations(range(4)):
        again, again_lse = merge_attention([outs[i] for i in order], [lses[i] for i in order])
        torch.testing.assert_close((again, again_lse), (out, lse), rtol=0, atol=1e-14)
    left, right = merge_attention(outs[:2], lses[:2]), merge_attention(outs[2:], lses[2:])
    nested = merge_attention([left[0], right[0]], [left[1], right[1]])
    torch.testing.assert_close(nested, (out, lse), rtol=0, atol=1e-14)


def test_an_unseen_part_is_neutral_whatever_it_holds() -> None:
    outs, lses = parts(2, seed=6)
    unseen = torch.full_like(lses[0], -torch.inf)
    leaves = [x.clone().requires_grad_() for x in (*outs, *lses)]
    out, lse = merge_attention([*leaves[:2], torch.full_like(outs[0], torch.nan)], [*leaves[2:], unseen])
    torch.testing.assert_close((out, lse), naive(outs, lses), rtol=0, atol=1e-13)
    (out.sum() + lse.sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


def test_a_row_nobody_has_seen() -> None:
    outs = [torch.full((1, 2, 3, 4), torch.nan, requires_grad=True) for _ in range(2)]
    lses = [torch.full((1, 3, 2), -torch.inf, requires_grad=True) for _ in range(2)]
    out, lse = merge_attention(outs, lses)
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, -torch.inf))
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (*outs, *lses))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_arrives_at_a_row_nobody_has_seen_reaches_no_part(impl: str, value: float) -> None:
    outs, lses = parts(2, dtype=torch.float32)
    for lse in lses:
        lse[:, :, 1] = -torch.inf
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    grad_out, grad_lse = torch.ones_like(outs[0]), torch.ones_like(lses[0])
    expected = torch.autograd.grad(merge_attention(outs, lses, impl=impl), leaves, (grad_out, grad_lse))
    grad_out[:, 1], grad_lse[:, :, 1] = value, value
    found = torch.autograd.grad(merge_attention(outs, lses, impl=impl), leaves, (grad_out, grad_lse))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_extreme_lse() -> None:
    outs, _ = parts(3, seed=7)
    lses = [torch.full((2, 4, 3), x, dtype=torch.float64) for x in (1e5, -1e5, 1e5)]
    out, lse = merge_attention(outs, lses)
    torch.testing.assert_close(out, (outs[0] + outs[2]) / 2, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, lses[0] + torch.log(torch.tensor(2.0, dtype=torch.float64)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    outs, lses = parts(2, b=shape[0], s=shape[1])
    out, lse = merge_attention(outs, lses)
    assert out.shape == (*shape, 4, 5) and lse.shape == (shape[0], 4, shape[1])


def test_gradcheck() -> None:
    outs, lses = parts(3, b=1, s=2, h=2, d=3, seed=8)
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    assert torch.autograd.gradcheck(lambda *x: merge_attention(x[:3], x[3:]), leaves)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(n: int, dtype: torch.dtype) -> None:
    outs, lses = parts(n, dtype=dtype)
    leaves = [[x.requires_grad_() for x in group] for group in (outs, lses)]
    torch.library.opcheck(torch.ops.hici.merge_attention.default, (*leaves, ""))
    detached = [[x.detach() for x in group] for group in (outs, lses)]
    grads = (torch.randn_like(detached[0][0]), torch.randn_like(detached[1][0]))
    torch.library.opcheck(torch.ops.hici.merge_attention_backward.default, (*grads, *detached, ""))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda outs, lses: merge_attention(outs, lses), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for s in (2, 5):
        outs, lses = parts(2, s=s)
        torch.testing.assert_close(compiled(outs, lses), merge_attention(outs, lses), rtol=0, atol=0)


def test_second_derivative_is_refused() -> None:
    outs, lses = parts(2)
    outs[0].requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(merge_attention(outs, lses)[0].sum(), outs[0], create_graph=True)


def test_named_implementation_that_is_missing_says_so() -> None:
    outs, lses = parts(2)
    with pytest.raises(hici_kernels.ImplError, match="impl='triton' cannot serve merge_attention"):
        merge_attention(outs, lses, impl="triton")
