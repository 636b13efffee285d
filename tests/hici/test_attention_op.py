"""attention against the loop oracle: values, log-sum-exps and gradients through both."""

import random

import pytest
import torch
import torch._dynamo.testing
from hici_cases import close, random_mask, random_offsets
from hici_oracle import attention as oracle
from hici_oracle import column_segments
from hypothesis import given, settings
from hypothesis import strategies as st

from hici_kernels import attention
from hici_kernels.testing import assert_within_budget

LOW = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "k", "v", "global_k", "global_v", "local_k", "local_v")


def case(seed, dtype=torch.float64, big=False):
    """(tensors by name, options) of one call, over everything the op documents."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hkv, d = rng.randint(1, 2), rng.choice([1, 2, 3, 8])
    hq = hkv * rng.randint(1, 3)
    packed = rng.random() < 0.35
    batch, s = 1 if packed else rng.randint(1, 3), rng.randint(0, 12)
    if big:
        d, s = 16, 40
    t = s if packed or rng.random() < 0.7 else rng.randint(0, s)
    segment_len = rng.choice([None, 13]) if big else rng.choice([None, 1, 2, 3, 5, 20])
    cu = random_offsets(rng, s, rng.randint(1, 4)) if packed else None
    n = len(column_segments(s, segment_len, cu))

    def make(b, length, heads):
        if rng.random() < 0.3:
            return torch.randn(b, heads, length, d, dtype=torch.float64).transpose(1, 2)
        return torch.randn(b, length, heads, d, dtype=torch.float64)

    tensors = {"q": make(batch, t, hq), "k": make(batch, s, hkv), "v": make(batch, s, hkv)}
    slots = rng.choice(["none", "shared", "each"])
    if slots != "none":
        shape = (batch, rng.randint(0, 3), hkv, d) if slots == "shared" else (batch, n, rng.randint(0, 3), hkv, d)
        tensors |= {name: torch.randn(shape, dtype=torch.float64) for name in ("global_k", "global_v")}
    if rng.random() < 0.6:
        shape = (batch, n, rng.randint(0, 3), hkv, d)
        tensors |= {name: torch.randn(shape, dtype=torch.float64) for name in ("local_k", "local_v")}
    shown = rng.choice([None, (n,), (batch, n)])
    options = {
        "segment_len": segment_len,
        "recurrence_len": rng.randint(0, segment_len) if segment_len else 0,
        "prefix_mask": None if shown is None else torch.rand(shown) < 0.6,
        "attention_mask": random_mask(rng, batch, s),
        "cu_seqlens": cu,
        "causal": rng.random() < 0.7,
        "scale": rng.choice([None, None, 0.3, 1.7]),
    }
    return {name: x.to(dtype) for name, x in tensors.items()}, options


def run(function, tensors, options, weights=None):
    """(out, lse), gradients of sum(w * out) + sum(w' * lse over rows that see something) by name."""
    leaves = {
        name: x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for name, x in tensors.items()
    }
    extra = {"return_lse": True} if function is attention else {}
    out, lse = function(**leaves, **options, **extra)
    if weights is None:
        return (out, lse), {}
    finite = lse.isfinite()
    total = (out * weights[0].to(out.dtype)).sum() + (lse[finite] * weights[1].to(lse.dtype)[finite]).sum()
    total = total + sum(0.0 * x.sum() for x in leaves.values())
    grads = torch.autograd.grad(total, list(leaves.values()))
    return (out.detach(), lse.detach()), dict(zip(leaves, grads, strict=True))


def weights_for(tensors):
    b, t, h, d = tensors["q"].shape
    return torch.randn(b, t, h, d, dtype=torch.float64), torch.randn(b, h, t, dtype=torch.float64)


def check(seed):
    tensors, options = case(seed)
    weights = weights_for(tensors)
    (out, lse), grads = run(attention, tensors, options, weights)
    (expected, expected_lse), wanted = run(oracle, tensors, options, weights)
    close(out, expected, 1e-10, f"out {options}")
    close(lse, expected_lse, 1e-10, f"lse {options}")
    unseen = (expected_lse == -torch.inf).transpose(1, 2)
    assert not out[unseen].any() and not grads["q"][unseen].any()
    for name, g in grads.items():
        close(g, wanted[name], 1e-10, f"gradient of {name} {options}")
    assert torch.equal(attention(**tensors, **options), out)


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_equals_the_oracle(seed):
    check(seed)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_equals_the_oracle_at_length(seed):
    check(seed)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("seed", range(8))
def test_low_precision_budget(dtype, seed):
    tensors, options = case(seed, dtype, big=True)
    wide = {name: x.double() for name, x in tensors.items()}
    weights = tuple(x.to(dtype) for x in weights_for(tensors))
    (out, lse), grads = run(attention, tensors, options, weights)
    assert out.dtype == dtype and lse.dtype == torch.float32
    (expected, expected_lse), wanted = run(oracle, wide, options, weights)
    (plain, plain_lse), plain_grads = run(oracle, tensors, options, weights)
    assert_within_budget(expected, out, plain, f"out {options}")
    assert_within_budget(expected_lse, lse, plain_lse, f"lse {options}")
    for name, g in grads.items():
        assert g.dtype == dtype
        if g.numel():
            assert_within_budget(wanted[name], g, plain_grads[name], f"gradient of {name} {options}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("seed", range(25))
def test_what_is_not_seen_may_hold_anything(seed, value):
    """Masked tokens, slots of segments that no query reads; their gradients are finite and zero."""
    tensors, options = case(600 + seed)
    s, mask = tensors["k"].shape[1], options["attention_mask"]
    segments = column_segments(s, options["segment_len"], options["cu_seqlens"])
    weights = weights_for(tensors)
    (clean, clean_lse), wanted = run(attention, tensors, options, weights)
    dirty = {name: x.clone() for name, x in tensors.items()}
    poisoned = {name: torch.zeros(x.shape, dtype=torch.bool) for name, x in tensors.items()}
    t = tensors["q"].shape[1]
    for b in range(tensors["q"].shape[0]):
        for c in range(s):
            if mask is not None and not mask[b, c]:
                poisoned["k"][b, c] = poisoned["v"][b, c] = True
                if c >= s - t:
                    poisoned["q"][b, c - (s - t)] = True
        for i in range(len(segments)):
            p = options["prefix_mask"]
            if p is not None and not (p[i] if p.dim() == 1 else p[b, i]):
                for name in NAMES[3:]:
                    if name in dirty and dirty[name].dim() == 5:
                        poisoned[name][b, i] = True
    for name, at in poisoned.items():
        dirty[name][at] = value
    (out, lse), _grads = run(attention, dirty, options)
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)
    leaves = {name: x.requires_grad_() for name, x in dirty.items()}
    out, lse = attention(**leaves, **options, return_lse=True)
    seen = lse.isfinite()
    ((out * weights[0]).sum() + (lse[seen] * weights[1][seen]).sum()).backward()
    for name, x in leaves.items():
        close(x.grad, wanted[name], 1e-12, name)
        assert not x.grad[poisoned[name]].any(), name


@pytest.mark.parametrize("seed", range(6))
def test_gradient_arriving_at_unseen_rows_is_ignored(seed):
    tensors, options = case(80 + seed)
    b, s = tensors["k"].shape[:2]
    options |= {"attention_mask": torch.zeros(b, s), "prefix_mask": None}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out, lse = attention(**leaves, **options, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
    torch.autograd.backward([out, lse], [torch.ones_like(out), torch.ones_like(lse)])
    assert all(x.grad is None or not x.grad.any() for x in leaves.values())


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("seed", range(4))
def test_what_arrives_at_rows_that_see_nothing_reaches_no_key(seed, value, impl):
    tensors, options = case(140 + seed, torch.float32)
    b, s = tensors["k"].shape[:2]
    mask = (torch.arange(s) % 3 != seed % 3).expand(b, s)
    options |= {"attention_mask": mask}
    blind = ~mask[:, s - tensors["q"].shape[1] :]
    given = weights_for(tensors)
    dirty = (given[0].masked_fill(blind[:, :, None, None], value), given[1].masked_fill(blind[:, None], value))
    results = []
    for weights in (given, dirty):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
        torch.autograd.backward(attention(**leaves, **options, return_lse=True, impl=impl), weights)
        results.append({name: x.grad for name, x in leaves.items()})
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_large_scores_stay_finite():
    for dtype, size in ((torch.float32, 1e10), (torch.float16, 200.0), (torch.bfloat16, 1e8)):
        q, k, v = ((size * torch.randn(1, 9, 2, 4)).to(dtype).requires_grad_() for _ in range(3))
        out, lse = attention(q, k, v, segment_len=4, return_lse=True)
        out.sum().backward()
        assert out.isfinite().all() and lse.isfinite().all()
        assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("batch, t, s", [(0, 5, 5), (2, 0, 0), (2, 0, 5), (0, 0, 0)])
@pytest.mark.parametrize("segment_len", [None, 2])
def test_empty_inputs(batch, t, s, segment_len):
    q, k, v = (torch.randn(batch, n, h, 4, requires_grad=True) for n, h in ((t, 4), (s, 2), (s, 2)))
    n = len(column_segments(s, segment_len))
    local = torch.randn(batch, n, 3, 2, 4, requires_grad=True)
    out, lse = attention(q, k, v, segment_len=segment_len, local_k=local, local_v=local, return_lse=True)
    assert out.shape == (batch, t, 4, 4) and lse.shape == (batch, 4, t)
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v, local))
    if batch == 2 and t == s == 0:
        cu = torch.tensor([0, 0, 0], dtype=torch.int32)
        assert attention(q[:1], k[:1], v[:1], cu_seqlens=cu).shape == (1, 0, 4, 4)


@pytest.mark.parametrize("seed", range(8))
def test_strides_do_not_matter(seed):
    torch.manual_seed(seed)
    base = torch.randn(2, 9, 3, 4, 6, dtype=torch.float64)
    q, k, v = base.unbind(2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expanded = torch.randn(1, 9, 1, 6, dtype=torch.float64).expand(2, 9, 4, 6)
    want = attention(*(x.contiguous() for x in (q, k, v)), segment_len=4, recurrence_len=2)
    assert torch.equal(attention(q, k, v, segment_len=4, recurrence_len=2), want)
    assert torch.equal(attention(*heads_first, segment_len=4, recurrence_len=2), want)
    close(attention(q, expanded, v), attention(q, expanded.contiguous(), v), 1e-14)
    with pytest.raises(ValueError, match="contiguous in its last"):
        attention(q.transpose(1, 3).contiguous().transpose(1, 3), k, v)


def test_queries_are_the_last_positions():
    _tensors, _ = case(11, big=True)
    q, k, v = (torch.randn(2, 10, h, 4, dtype=torch.float64) for h in (4, 2, 2))
    local = torch.randn(2, 4, 2, 2, 4, dtype=torch.float64)
    mask = torch.ones(2, 10)
    mask[0, :4] = 0
    options = {"segment_len": 3, "recurrence_len": 2, "local_k": local, "local_v": local, "attention_mask": mask}
    whole, lse = attention(q, k, v, **options, return_lse=True)
    for t in range(11):
        part, part_lse = attention(q[:, 10 - t :], k, v, **options, return_lse=True)
        close(part, whole[:, 10 - t :], 1e-13)
        close(part_lse, lse[:, :, 10 - t :], 1e-13)


@pytest.mark.parametrize("seed", range(10))
def test_gradcheck(seed):
    tensors, options = case(200 + seed)
    names = list(tensors)
    leaves = [tensors[name].detach().clone().requires_grad_() for name in names]

    def f(*x):
        out, lse = attention(**dict(zip(names, x, strict=True)), **options, return_lse=True)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(f, leaves)


def raw(seed):
    tensors, o = case(seed, torch.float32)
    slots = [tensors.get(name) for name in NAMES[3:]]
    scale = o["scale"] or tensors["q"].shape[-1] ** -0.5
    return (
        *(tensors[name].contiguous() for name in NAMES[:3]),
        *(o["segment_len"] or 0, o["recurrence_len"], *slots),
        *(o["prefix_mask"], o["attention_mask"], o["cu_seqlens"], o["causal"], scale, ""),
    )


@pytest.mark.parametrize("seed", range(8))
def test_opcheck(seed):
    arguments = raw(300 + seed)
    tracked = tuple(
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments
    )
    torch.library.opcheck(torch.ops.hici.attention.default, tracked)
    out, lse = torch.ops.hici.attention.default(*arguments)
    given = (torch.randn_like(out), torch.randn_like(lse), out, lse, *arguments)
    torch.library.opcheck(torch.ops.hici.attention_backward.default, given)


def test_second_derivative_is_refused():
    q, k, v = (torch.randn(1, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with pytest.raises((RuntimeError, NotImplementedError)):
        (g,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
        torch.autograd.grad(g.square().sum(), k)


def compiled_run(backend, dynamic, lengths):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def f(q, k, v, local, mask):
        return attention(
            q, k, v, segment_len=4, recurrence_len=2, local_k=local, local_v=local, attention_mask=mask, return_lse=True
        )

    g = torch.compile(f, backend=counter, fullgraph=True, dynamic=dynamic)
    for s in lengths:
        q, k, v = (torch.randn(2, s, h, 8, requires_grad=True) for h in (4, 2, 2))
        local, mask = torch.randn(2, -(-s // 4), 5, 2, 8, requires_grad=True), torch.ones(2, s)
        out, lse = g(q, k, v, local, mask)
        want, want_lse = f(q, k, v, local, mask)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, want_lse)
        found = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v, local))
        wanted = torch.autograd.grad(want.square().sum() + want_lse.sum(), (q, k, v, local))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
    return counter.frame_count


def test_compile_dynamic_does_not_recompile():
    assert compiled_run("aot_eager", True, (9, 14, 23)) == 1


def test_compile_static():
    assert compiled_run("aot_eager", False, (9, 14)) == 2


@pytest.mark.slow
def test_compile_inductor():
    assert compiled_run("inductor", True, (9, 14)) == 1


@pytest.mark.parametrize("segment_len", [10**6, 2**62, 2**63 - 1])
def test_segments_longer_than_anything(segment_len):
    x, local = torch.randn(1, 20, 2, 8), torch.randn(1, 2, 3, 2, 8)
    options = {"cu_seqlens": torch.tensor([0, 10, 20], dtype=torch.int32), "local_k": local, "local_v": local}
    found = attention(x, x, x, segment_len=segment_len, impl="cpu", **options)
    close(found, attention(x, x, x, segment_len=None, impl="reference", **options), 1e-5)


def test_meta_shapes():
    q, k = torch.empty(2, 9, 4, 8, device="meta"), torch.empty(2, 9, 2, 8, device="meta")
    out, lse = attention(q, k, k, segment_len=4, return_lse=True)
    assert out.device.type == "meta" and out.shape == q.shape and lse.shape == (2, 4, 9)
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    local = torch.empty(1, 5, 3, 2, 8, device="meta")
    packed = attention(q[:1], k[:1], k[:1], segment_len=4, local_k=local, local_v=local, cu_seqlens=cu)
    assert packed.shape == (1, 9, 4, 8)


def test_autocast():
    q, k, v = (torch.randn(2, 9, 4, 8, requires_grad=True) for _ in range(3))
    want = attention(q, k, v, segment_len=4)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(q, k.bfloat16(), v, segment_len=4, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    close(out.detach(), want.detach(), 0.03)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
