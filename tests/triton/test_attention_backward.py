"""attention's backward kernels under Triton's interpreter: gradients against float64, and what must not matter.

out and lse, which backward is given, come from the reference: these tests need no other kernel.
"""

import ast
import inspect
import random
from contextlib import contextmanager

import pytest
import torch
from attention_cases import NAMES, Case, dense, other_order, pointer, reserved, rounding, wide
from hici_cases import close
from hici_oracle import attention as loops
from hici_oracle import column_segments
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_op import case as random_case
from test_attention_op import run as run_loops

from hici_kernels.ops.attention import (
    reference,
    triton_backward,
    triton_backward_launch,
    triton_backward_slots,
    triton_backward_steps,
)
from hici_kernels.testing import assert_usually_within, assert_within_budget, budget, error
from hici_kernels.tuning.lookup import trial

__all__ = ["rounding"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CU = (0, 5, 5, 29, 40)


@contextmanager
def tiles(block_m=16, block_n=16, **more):
    """Query tiles and key tiles, of both kernels."""
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1, **more}
    with trial("attention_backward", config), trial("attention_backward_dq", config):
        yield


def arguments(tensors, options):
    """As the operation's schema up to ``scale``."""
    scale = tensors["q"].shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    lengths = (options["segment_len"] or 0, options["recurrence_len"])
    masks = [options[n] for n in ("prefix_mask", "attention_mask", "cu_seqlens")]
    q, k, v, *slots = (tensors.get(n) for n in NAMES)
    return (q, k, v, *lengths, *slots, *masks, options["causal"], scale)


def weights_for(tensors, seed=1):
    """(grad_out, grad_lse) in the dtypes of out and lse, numbers both have exactly."""
    b, t, h, d = tensors["q"].shape
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(b, t, h, d, generator=generator).to(tensors["q"].dtype)
    return grad_out, torch.randn(b, h, t, generator=generator)


def run(tensors, options, weights, blocks=(16, 16), results=None, **more):
    """Gradients by name; ``results``: (out, lse) if not those of the reference."""
    given = arguments(tensors, options)
    out, lse = reference.forward(*given) if results is None else results
    with tiles(*blocks, **more):
        found = triton_backward_launch.backward(*weights, out, lse, *given)
    return {n: g for n, g in zip(NAMES, found, strict=True) if n in tensors}


def truth(tensors, options, weights):
    tensors = wide(tensors)
    given = arguments(tensors, options)
    found = reference.backward(*(w.double() for w in weights), *reference.forward(*given), *given)
    return {n: g for n, g in zip(NAMES, found, strict=True) if n in tensors}


def plain(tensors, options, weights):
    """The budget's plain computation, in the tensors' dtype."""
    if tensors["q"].dtype == F32:
        return formulas(tensors, options, weights)
    # autograd of the forward computation that rounds at every step
    leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
    out, lse = dense(leaves, options)
    seen = lse.isfinite()
    total = (out * weights[0]).sum().double() + (lse[seen].double() * weights[1][seen].double()).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def formulas(tensors, options, weights):
    """Gradients from out and lse as backward is given them: in float32 their rounding is most of the error.

    P = exp(scale q k - lse), dV = P^T dout, dS = P (dout v - delta), dQ = scale dS K, dK = scale dS^T Q.
    """
    out, lse = reference.forward(*arguments(tensors, options))
    leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
    q, k, v = (leaves[n] for n in "qkv")
    b, t, s, group = *q.shape[:2], k.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    delta = (out * weights[0]).sum(-1).transpose(1, 2) - weights[1]
    found = [torch.zeros_like(q)]
    given = []
    segments = column_segments(s, options["segment_len"], options["cu_seqlens"])
    for i, (columns, document) in enumerate(segments):
        keys, asked = list(columns), [c for c in columns if c >= s - t]
        rows = [c - (s - t) for c in asked]
        if i and segments[i - 1][1] == document and options["recurrence_len"]:
            keys = segments[i - 1][0][-options["recurrence_len"] :] + keys
        sides = []
        for side, tokens in (("k", k), ("v", v)):
            slots = [leaves[f"{n}_{side}"] for n in ("global", "local") if f"{n}_{side}" in leaves]
            sides.append(torch.cat([x if x.ndim == 4 else x[:, i] for x in slots] + [tokens[:, keys]], 1))
        wide_k, wide_v = (x.detach().repeat_interleave(group, 2) for x in sides)
        n = wide_k.shape[1] - len(keys)
        seen = torch.ones(b, len(asked), n + len(keys), dtype=torch.bool)
        if options["causal"]:
            seen[:, :, n:] &= torch.tensor(keys)[None, :] <= torch.tensor(asked, dtype=torch.int64)[:, None]
        if options["prefix_mask"] is not None:
            seen[:, :, :n] &= options["prefix_mask"][..., i].expand(b)[:, None, None]
        if options["attention_mask"] is not None:
            seen[:, :, n:] &= (options["attention_mask"][:, keys] != 0)[:, None]
            seen &= (options["attention_mask"][:, asked] != 0)[..., None]
        at = (q.detach()[:, rows], weights[0][:, rows])
        p = torch.exp(torch.einsum("bthd,bnhd->bhtn", at[0], wide_k) * scale - lse[:, :, rows, None])
        p = p.masked_fill(~seen[:, None], 0.0)
        ds = p * (torch.einsum("bthd,bnhd->bhtn", at[1], wide_v) - delta[:, :, rows, None]) * scale
        found[0][:, rows] = torch.einsum("bhtn,bnhd->bthd", ds, wide_k)
        for side, x, y in ((sides[0], ds, at[0]), (sides[1], p, at[1])):
            given.append((side, torch.einsum("bhtn,bthd->bnhd", x, y).unflatten(2, (-1, group)).sum(3)))
    torch.autograd.backward([x for x, _ in given], [g for _, g in given])
    rest = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
    return {**rest, "q": found[0].detach()}


def ratios(tensors, options, blocks, **more):
    """Error by name, as parts of the budget."""
    weights = weights_for(tensors)
    found, expected = run(tensors, options, weights, blocks, **more), truth(tensors, options, weights)
    rough = plain(tensors, options, weights)
    # The lse that backward is given is float32: its rounding changes every P by up to eps |lse| / 2. The plain
    # computation does not see that: its scores are rounded as those in the reference's lse were.
    lse = reference.forward(*arguments(tensors, options))[1]
    given = torch.finfo(F32).eps / 2 * float(lse[lse.isfinite()].abs().amax()) if lse.isfinite().any() else 0.0
    parts = {}
    for name, g in found.items():
        assert g.dtype == tensors[name].dtype and g.shape == tensors[name].shape
        if g.numel():
            allowed, wrong = budget(expected[name], rough[name], g.dtype), error(expected[name], g)
            allowed += given * float(expected[name].abs().max())
            parts[name] = wrong / allowed if allowed else float(wrong > 0)
    return parts


def check(tensors, options, blocks=(16, 16), **more):
    """Within the budget in the usual draw."""

    def draw(i):
        if i == 0:
            return ratios(tensors, options, blocks, **more)
        torch.manual_seed(i - 1)
        again = {name: torch.randn(x.shape).to(x.dtype) for name, x in tensors.items()}
        return ratios(again, options, blocks, **more)

    assert_usually_within(draw, f"gradients {options}")


def each_dtype(name, **fields):
    return [Case(f"{name} {str(d).removeprefix('torch.')}", dtype=d, **fields) for d in (F32, BF16, F16)]


CASES = [
    # shapes of tiles, segments and heads
    *each_dtype("segments", segment_len=16, tokens=38),
    Case("full attention", causal=False),
    Case("ragged last segment, full attention", segment_len=13, causal=False, dtype=BF16),
    Case("one token", tokens=1),
    Case("segments of one token", tokens=5, segment_len=1, shared=2),
    Case("segment longer than the sequence", tokens=11, segment_len=64),
    Case("whole tiles beside those on the diagonal", tokens=100, segment_len=50, heads=(1, 1)),
    Case("query tile taller than key tile", tokens=70, blocks=(32, 16), heads=(1, 1), segment_len=64),
    Case("key tile wider than query tile", tokens=70, blocks=(16, 32), heads=(1, 1), segment_len=64),
    Case("query tile of several parts at the diagonal", tokens=140, blocks=(64, 16), heads=(1, 1)),
    Case("key tile wider than the segment", tokens=30, blocks=(16, 64), segment_len=9, recurrence_len=3),
    Case("one kv head per query head", heads=(3, 3), batch=2, tokens=20),
    Case("three query heads per kv head", heads=(6, 2), tokens=20, shared=1, segment_len=12),
    Case("heads first in memory", layout="bhsd", heads=(4, 2), batch=2, tokens=20),
    Case("q, k, v in one tensor", layout="fused", heads=(4, 2), batch=2, tokens=20, segment_len=12),
    # head dimensions
    *[Case(f"head_dim {d}", head_dim=d, tokens=20, shared=1, local=2, dtype=BF16) for d in (64, 80, 96, 128, 256)],
    *[Case(f"head_dim {d}", head_dim=d, tokens=20, local=3, segment_len=13) for d in (1, 3, 17, 24, 72, 160)],
    # slots
    *each_dtype("shared global slots and local slots", segment_len=16, shared=4, local=8),
    Case("global slots per segment and local slots", segment_len=16, each=4, local=8, batch=2, tokens=33, dtype=BF16),
    Case("global slots alone", shared=5, segment_len=20, batch=2),
    Case("global slots per segment alone", each=5, segment_len=20),
    Case("local slots alone", local=5, segment_len=20, heads=(4, 2)),
    Case("17 slots", shared=9, local=8, segment_len=20, dtype=BF16),
    Case("40 slots, a tile of both kinds", shared=20, local=20, segment_len=20),
    Case("no slots in tensors of slots", shared=0, local=0, segment_len=20),
    Case("local slots beside none global", each=0, local=3, segment_len=20),
    Case("shared slots, more segments than one step adds", shared=1, tokens=34, segment_len=1, heads=(1, 1)),
    Case("prefix_mask [N]", shared=2, local=2, segment_len=9, prefix_mask=1),
    Case("prefix_mask [B, N]", each=2, local=1, segment_len=10, prefix_mask=2, batch=2, dtype=F16),
    # recurrence
    Case("recurrence", segment_len=16, recurrence_len=5, shared=2, tokens=44),
    Case("recurrence of a whole segment", segment_len=13, recurrence_len=13, dtype=BF16),
    Case("recurrence, full attention", segment_len=13, recurrence_len=7, causal=False, local=2),
    Case("recurrence across several tiles", segment_len=48, recurrence_len=24, tokens=110, heads=(2, 1)),
    # masks over tokens
    *[Case(f"mask {kind}", mask=kind, batch=2, shared=2, segment_len=18) for kind in ("left", "right", "holes", "gap")],
    Case("mask, slots, row without tokens", mask="empty_row", batch=2, segment_len=18, local=2, dtype=BF16),
    Case(
        "mask, recurrence, prefix_mask", mask="mixed", batch=3, segment_len=9, recurrence_len=4, local=2, prefix_mask=2
    ),
    Case("mask, full attention", mask="holes", batch=2, segment_len=18, causal=False),
    Case("bool mask", mask="holes", mask_dtype=torch.bool),
    # packed documents
    *each_dtype("documents", cu=CU, segment_len=8, shared=2, local=3),
    Case("documents of one segment each", cu=CU, shared=2, heads=(4, 2)),
    Case("documents, recurrence, full attention", cu=CU, segment_len=8, recurrence_len=8, causal=False),
    Case("documents, masks", cu=CU, segment_len=6, each=2, mask="holes", prefix_mask=1, recurrence_len=2, dtype=BF16),
    # fewer queries than keys
    *each_dtype("one query", queries=1, heads=(8, 2), local=3),
    Case("one query, last segment", queries=1, segment_len=16, recurrence_len=5, shared=3),
    Case("last queries across segments", queries=19, segment_len=16, recurrence_len=3, each=2, local=2, batch=2),
    Case("last queries, full attention", queries=9, segment_len=16, causal=False),
    Case("last queries, mask", queries=9, mask="right", batch=2, segment_len=25, local=1),
    # scale
    Case("scale 0", scale=0.0, local=2, mask="left"),
    Case("negative scale", scale=-0.6, local=2, dtype=BF16, head_dim=48),
]


def slow_in_half_precision(case):
    """Of cases in several dtypes the 16-bit ones stay for shared slots alone in the fast tests."""
    some = case.dtype != F32 and case.name.endswith("16") and not case.name.startswith("shared")
    return pytest.param(case, marks=pytest.mark.slow if some else (), id=case.name)


@pytest.mark.parametrize("case", [slow_in_half_precision(c) for c in CASES])
def test_within_the_budget_of_float64(case):
    check(*case.make(), case.blocks)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_loops(seed):
    """The truth of the other tests is the reference; here it is the oracle that shares nothing with it."""
    tensors, options = random_case(seed + 40, F32)
    weights = weights_for(tensors)
    _, expected = run_loops(loops, wide(tensors), options, tuple(w.double() for w in weights))
    found = run(tensors, options, weights)
    for name, g in found.items():
        close(g, expected[name], 2e-6, f"gradient of {name} {options}")


def fuzz(seed):
    rng = random.Random(seed)
    dtype = rng.choice([F32, BF16, F16])
    tensors, options = random_case(seed, dtype, big=rng.random() < 0.2)
    if not tensors["q"].numel():
        return
    blocks = rng.choice([(16, 16), (32, 16), (16, 32), (64, 16)])
    check(tensors, options, blocks)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_fuzz(seed):
    fuzz(seed)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_fuzz_at_length(seed):
    fuzz(seed)


@pytest.mark.parametrize("batch, t, s", [(0, 5, 5), (2, 0, 0), (2, 0, 5)])
def test_empty_inputs(batch, t, s):
    q, k, v = (torch.randn(batch, n, h, 4) for n, h in ((t, 4), (s, 2), (s, 2)))
    local = torch.randn(batch, -(-s // 2), 3, 2, 4)
    tensors = {"q": q, "k": k, "v": v, "local_k": local, "local_v": local}
    _, options = Case("", segment_len=2).make()
    found = run(tensors, options, weights_for(tensors))
    assert all(torch.equal(g, torch.zeros_like(tensors[n])) for n, g in found.items())


# ---- what must not matter


def test_an_absent_lse_gradient_is_a_gradient_of_zero():
    tensors, options = Case("", segment_len=12, shared=2, mask="holes").make()
    grad_out, grad_lse = weights_for(tensors)
    found = run(tensors, options, (grad_out, grad_lse.new_empty(0)))
    expected = run(tensors, options, (grad_out, torch.zeros_like(grad_lse)))
    other = run(tensors, options, (grad_out, grad_lse))
    assert all(torch.equal(found[n], expected[n]) for n in tensors)
    assert not torch.equal(found["q"], other["q"])


def poisoned(case, seed, value):
    """The case's tensors, and those with ``value`` wherever nothing may be read into a gradient, and where that is."""
    tensors, options = case.make(seed)
    mask, shown = options["attention_mask"], options["prefix_mask"]
    where = {name: torch.zeros(x.shape, dtype=torch.bool) for name, x in tensors.items()}
    first = case.tokens - tensors["q"].shape[1]
    if mask is not None:
        where["k"][mask == 0] = where["v"][mask == 0] = True
        where["q"][(mask == 0)[:, first:]] = True
    if shown is not None:
        for name in NAMES[3:]:
            if name in where and where[name].ndim == 5:
                where[name][~shown.expand(case.batch, -1)] = True
    if case.causal and case.segment_len is not None and case.cu is None:
        # keys that no query reads: those before the first query's segment, but for what recurs
        begin = first // case.segment_len * case.segment_len
        for name in "kv":
            where[name][:, : max(begin - case.recurrence_len, 0)] = True
    dirty = {name: x.masked_fill(where[name], value) for name, x in tensors.items()}
    return tensors, dirty, where, options


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [
        Case("masks", mask="mixed", batch=2, segment_len=18, local=2, each=1, prefix_mask=2),
        Case("all masked", mask="empty_row", batch=2, segment_len=18, prefix_mask=2, each=2),
        Case("documents", cu=CU, segment_len=7, recurrence_len=4, mask="holes", local=2, prefix_mask=1, dtype=BF16),
        Case("full", mask="gap", batch=2, segment_len=18, causal=False, head_dim=24),
        Case("decoding", queries=5, segment_len=12, recurrence_len=3, local=2, prefix_mask=1),
    ],
    ids=lambda c: c.name,
)
def test_memory_that_is_not_seen_may_hold_anything(case, value):
    tensors, dirty, where, options = poisoned(case, 3, value)
    assert any(at.any() for at in where.values())
    results = reference.forward(*arguments(tensors, options))
    grad_out, grad_lse = weights_for(tensors)
    expected = run(tensors, options, (grad_out, grad_lse), results=results)
    blind = results[1] == -torch.inf
    weights = (grad_out.masked_fill(blind.transpose(1, 2)[..., None], value), grad_lse.masked_fill(blind, value))
    found = run(dirty, options, weights, results=results)
    for name, g in found.items():
        assert torch.equal(g, expected[name]), name
        assert not g[where[name]].any(), name
    assert not found["q"][blind.transpose(1, 2)].any()


def test_rows_between_the_given_ones_are_not_read():
    """Views into a larger tensor of NaN: beyond the last token, between rows, beyond the last column."""
    case = Case("", tokens=37, segment_len=16, recurrence_len=3, local=3, shared=2, heads=(4, 2), head_dim=20)
    tensors, options = case.make()
    weights = weights_for(tensors)
    results = reference.forward(*arguments(tensors, options))

    def view(x):
        space = torch.full([n + 3 for n in x.shape], float("nan"), dtype=x.dtype)
        inner = space[tuple(slice(2, 2 + n) for n in x.shape)]
        return inner.copy_(x)

    views = {name: view(x) for name, x in tensors.items()}
    found = run(views, options, [view(w) for w in weights], results=[view(x) for x in results])
    expected = run(tensors, options, weights, results=results)
    assert all(torch.equal(found[n], expected[n]) for n in tensors)


def test_a_gradient_that_autograd_broadcasts_is_served():
    tensors, options = Case("", segment_len=16, local=2).make()
    grad_out, grad_lse = weights_for(tensors)
    one = torch.ones(1, 1, 1, 1).expand(grad_out.shape)
    found = run(tensors, options, (one, grad_lse[:1, :1, :1].expand(grad_lse.shape)))
    expected = run(tensors, options, (one.contiguous(), grad_lse[:1, :1, :1].expand(grad_lse.shape).contiguous()))
    assert all(torch.equal(found[n], expected[n]) for n in tensors)


def test_results_are_views_of_no_input_and_contiguous():
    tensors, options = Case("", layout="bhsd", segment_len=16, local=2, each=1).make()
    for name, g in run(tensors, options, weights_for(tensors)).items():
        assert g.is_contiguous() and g.untyped_storage().data_ptr() != tensors[name].untyped_storage().data_ptr()


def test_every_visible_token_gets_a_gradient_and_no_other():
    case = Case("", tokens=36, segment_len=12, recurrence_len=5, batch=1, heads=(1, 1))
    tensors, options = case.make()
    for t in range(0, 36, 5):
        grad_out, grad_lse = torch.zeros_like(tensors["q"]), torch.zeros(1, 1, 36)
        grad_out[:, t] = 1.0
        found = run(tensors, options, (grad_out, grad_lse))
        own = t // 12 * 12
        expected = [max(own - 5, 0) <= c <= t for c in range(36)]
        assert found["v"].abs().amax((0, 2, 3)).gt(0).tolist() == expected, t
        assert found["q"].abs().amax((0, 2, 3)).gt(0).tolist() == [c == t for c in range(36)], t


def test_large_scores_stay_finite():
    q, k, v = (1e10 * torch.randn(1, 20, 2, 8) for _ in range(3))
    tensors, options = {"q": q, "k": k, "v": v}, Case("", segment_len=8).make()[1]
    assert all(g.isfinite().all() for g in run(tensors, options, weights_for(tensors)).values())


# ---- descriptors


@pytest.mark.parametrize(
    "case",
    [
        Case("segments", tokens=60, segment_len=33, recurrence_len=16, shared=2, heads=(2, 1), batch=2),
        Case("heads first in memory", tokens=40, layout="bhsd", heads=(2, 2), batch=2, dtype=BF16, causal=False),
        Case("q, k, v in one tensor", tokens=40, layout="fused", heads=(4, 2), batch=2, queries=35),
        Case("documents", tokens=60, cu=(0, 3, 40, 60), segment_len=34, local=2, heads=(2, 1)),
    ],
    ids=lambda c: c.name,
)
def test_descriptors_change_no_bit(case, monkeypatch):
    tensors, options = case.make()
    weights = weights_for(tensors)
    expected = run(tensors, options, weights)
    original = triton_backward_launch.descriptors
    made = []
    monkeypatch.setattr(triton_backward_launch, "descriptors", lambda *a: made.append(original(*a)) or made[-1])
    found = run(tensors, options, weights, TMA=1)
    assert len(made) == 2 and None not in made
    assert all(torch.equal(found[n], expected[n]) for n in tensors)


@pytest.mark.parametrize(
    "case",
    [
        Case("mask", tokens=60, mask="holes", segment_len=40),
        Case("columns that are not there", tokens=60, head_dim=24),
        Case("rows that are not aligned", tokens=60, head_dim=1),
    ],
    ids=lambda c: c.name,
)
def test_where_descriptors_do_not_fit_pointers_serve(case):
    check(*case.make(), (32, 16), TMA=1)


# ---- repeatable


REPEATED = [
    Case("segments, slots, recurrence", tokens=30, segment_len=13, recurrence_len=4, shared=2, local=1, heads=(4, 2)),
    Case("documents, masks", cu=CU, segment_len=6, each=2, local=1, mask="holes", prefix_mask=1, dtype=BF16),
    Case("last queries", queries=19, segment_len=16, shared=2, dtype=F16),
]


@pytest.mark.parametrize("case", REPEATED, ids=lambda c: c.name)
def test_the_order_of_programs_does_not_matter(case):
    """Bits are the same whichever program runs first: none reads what another of its launch wrote or adds to."""
    tensors, options = case.make()
    weights = weights_for(tensors)
    expected = run(tensors, options, weights)
    with other_order() as order:
        found = run(tensors, options, weights)
    assert any(a != b for a, b in order)
    assert all(torch.equal(found[n], expected[n]) for n in tensors)


@pytest.mark.parametrize("case", REPEATED, ids=lambda c: c.name)
def test_what_new_memory_holds_does_not_matter(case, monkeypatch):
    """Every buffer and every result starts as NaN: all that is read has been written, and all results are."""
    tensors, options = case.make()
    weights = weights_for(tensors)
    results = reference.forward(*arguments(tensors, options))
    expected = run(tensors, options, weights, results=results)
    made = []

    def dirty(x):
        made.append(x)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(0)

    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **b: dirty(new_empty(*a, **b)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **b: dirty(empty_like(*a, **b)))
    found = run(tensors, options, weights, results=results)
    assert len(made) > 4
    assert all(torch.equal(found[n], expected[n]) for n in tensors)


@pytest.mark.parametrize("module", [triton_backward, triton_backward_slots, triton_backward_steps])
def test_kernels_have_no_atomics(module):
    names = {n.attr for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Attribute)}
    assert "load" in names
    assert not [n for n in names if n.startswith("atomic")]


# ---- addresses


def test_offsets_are_64_bit():
    """The last 20 of 512K positions with 64 heads of 128, in memory that is reserved and never filled."""
    tokens, heads, d, n = 2**19, 64, 128, 20
    width = heads * d
    assert tokens * width > 2**31
    names = ("q", "k", "v", "grad_out", "dq", "dk", "dv")
    memory = {name: reserved(tokens * width) for name in names}
    view = {name: x.view(1, tokens, heads, d)[:, -n:] for name, x in memory.items()}
    torch.manual_seed(0)
    for name in names[:4]:
        view[name].copy_(torch.randn(1, n, heads, d))
    # the last head alone
    tensors = {name: view[name][:, :, -1:].clone() for name in "qkv"}
    options = Case("").make()[1]
    weights = (view["grad_out"][:, :, -1:].clone(), torch.zeros(1, 1, n))
    out, lse = reference.forward(*arguments(tensors, options))
    # beyond the last 20 rows of each head nothing is read; those of other heads hold 0
    level, delta = (reserved(heads * tokens, F32).view(1, heads, tokens) for _ in range(2))
    level[:, -1:, -n:] = lse * triton_backward.LOG2E.value
    delta[:, -1:, -n:] = (out.float() * weights[0].float()).sum(-1).transpose(1, 2)
    table = torch.tensor([[0, tokens - n, tokens - n, tokens, 0, tokens, 0, 0]], dtype=torch.int32)
    given = {name: pointer(x) for name, x in memory.items()} | {
        **{"level": level, "delta": delta, "tile_table": table, "tiles_per_segment": 1, "count": 1},
        **{"first_segment": 0, "first_query": 0, "segment_len": n, "recurrence_len": 0, "tokens": tokens},
        **{"heads": heads, "kv_heads": heads, "group": 1, "queries": tokens, "shift": 0, "scale": d**-0.5},
        **{"global_slots": 0, "local_slots": 0, "q_descriptor": None, "k_descriptor": None, "v_descriptor": None},
        **{"HEAD_DIM": d, "BLOCK_D": d, "BLOCK_M": 32, "BLOCK_N": 32, "SLOTS": 16, "PACKED": True, "CAUSAL": True},
        **{"do_descriptor": None, "FUSED": True, "RECURRENT": False, "HAS_MASK": False, "HAS_PREFIX": False},
        **{"HAS_GLOBAL": False, "HAS_LOCAL": False},
    }
    for x in ("q", "k", "v", "do"):
        given |= {f"{x}_b": 0, f"{x}_t": width, f"{x}_s": width, f"{x}_h": d}
    for kernel in (triton_backward.grad_keys, triton_backward.grad_queries):
        # what is absent has no address, and strides and places of nothing
        absent = ("keep", "prefix", "parts", "global_k", "global_v", "local_k", "local_v")
        rest = {x: table if x in absent else 0 for x in kernel.arg_names if x not in given}
        kernel[(heads,)](**{x: given.get(x, rest.get(x)) for x in kernel.arg_names})
    expected, rough = truth(tensors, options, weights), plain(tensors, options, weights)
    for name in "qkv":
        found = view[f"d{name}"][:, :, -1:]
        assert_within_budget(expected[name], found, rough[name], f"gradient of {name}")
