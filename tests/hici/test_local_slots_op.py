"""local_slots against the loop oracle."""

import random

import pytest
import torch
import torch._dynamo.testing
from hici_cases import close, random_mask, random_offsets
from hici_oracle import local_slots as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from hici_kernels import local_slots
from hici_kernels.testing import assert_within_budget

LOW = [torch.float32, torch.bfloat16, torch.float16]


def case(seed, dtype=torch.float64, packed=None, big=False):
    """(tensors, options) of one call; `big`: enough entries for a maximal error to be more than one draw of luck."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads, d, h, m = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 6), rng.randint(1, 3)
    packed = rng.random() < 0.4 if packed is None else packed
    batch, length = 1 if packed else rng.randint(1, 3), rng.randint(0, 11)
    if big:
        d, h, m, length = 8, 32, 4, 64
    hidden = torch.randn(batch, length, h, dtype=torch.float64)
    if rng.random() < 0.3:
        hidden = torch.randn(length, batch, h, dtype=torch.float64).transpose(0, 1)
    weights = [torch.randn(m, heads * d), torch.randn(heads * d, h), torch.randn(heads * d, h)]
    tensors = [x.to(dtype) for x in (hidden, *weights)]
    options = {
        "num_heads": heads,
        "segment_len": rng.choice([None, 20]) if big else rng.choice([None, 1, 2, 3, 5, 20]),
        "attention_mask": random_mask(rng, batch, length),
        "cu_seqlens": random_offsets(rng, length, rng.randint(1, 4)) if packed else None,
        "empty": rng.choice(["zero", "uniform"]),
    }
    return tensors, options


def gradients(function, tensors, options, weights):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    total = (out * weights.to(out.dtype)).sum() + sum(0.0 * x.sum() for x in leaves)
    return out.detach(), torch.autograd.grad(total, leaves)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_equals_the_oracle(seed):
    tensors, options = case(seed)
    torch.manual_seed(seed)
    expected = oracle(*tensors, **options)
    weights = torch.randn_like(expected)
    found, grads = gradients(local_slots, tensors, options, weights)
    close(found, expected, 1e-10, str(options))
    _, wanted = gradients(oracle, tensors, options, weights)
    for name, a, b in zip(("hidden", "slot_queries", "k_weight", "v_weight"), grads, wanted, strict=True):
        close(a, b, 1e-10, f"{name} {options}")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("seed", range(6))
def test_low_precision_budget(dtype, seed):
    tensors, options = case(seed, dtype, big=True)
    wide = [x.double() for x in tensors]
    weights = torch.randn_like(oracle(*wide, **options)).to(dtype)
    found, grads = gradients(local_slots, tensors, options, weights)
    assert found.dtype == dtype
    expected, wanted = gradients(oracle, wide, options, weights.double())
    plain, plain_grads = gradients(oracle, tensors, options, weights)
    if not found.numel():
        return
    assert_within_budget(expected, found, plain, f"slots {options}")
    for i in range(4):
        if wanted[i].numel():
            assert_within_budget(wanted[i], grads[i], plain_grads[i], f"gradient {i} {options}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("packed", [False, True])
def test_masked_columns_may_hold_anything(value, packed):
    torch.manual_seed(0)
    clean = torch.randn(1, 9, 4, dtype=torch.float64)
    weights = [torch.randn(2, 4).double(), torch.randn(4, 4).double(), torch.randn(4, 4).double()]
    mask = torch.tensor([[0, 0, 0, 1, 0, 1, 1, 1, 0]])
    options = {
        "num_heads": 2,
        "segment_len": 3,
        "attention_mask": mask,
        "cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None,
    }
    dirty = clean.clone()
    dirty[mask == 0] = value
    g = torch.randn_like(local_slots(clean, *weights, **options))
    a, da = gradients(local_slots, [clean, *weights], options, g)
    b, db = gradients(local_slots, [dirty, *weights], options, g)
    assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(da, db, strict=True))
    assert not db[0][mask == 0].any()


def test_order_inside_a_segment_does_not_matter():
    tensors, _ = case(3, packed=False)
    hidden = torch.randn(2, 8, tensors[0].shape[2], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1, 7, 6, 4, 5])
    heads = case(3, packed=False)[1]["num_heads"]
    one = local_slots(hidden, *tensors[1:], num_heads=heads, segment_len=4)
    other = local_slots(hidden[:, order], *tensors[1:], num_heads=heads, segment_len=4)
    close(one, other, 1e-12)


def test_large_scores_stay_finite():
    hidden = 1e4 * torch.randn(1, 6, 4)
    weights = [1e4 * torch.randn(2, 4), torch.randn(4, 4), torch.randn(4, 4)]
    found, grads = gradients(local_slots, [hidden, *weights], {"num_heads": 2, "segment_len": 4}, torch.ones(()))
    assert found.isfinite().all() and all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("empty", ["zero", "uniform"])
def test_shapes_without_tokens(empty):
    weights = [torch.randn(2, 4), torch.randn(4, 3), torch.randn(4, 3)]
    for batch, length, n in ((0, 5, 3), (2, 0, 0), (0, 0, 0)):
        hidden = torch.zeros(batch, length, 3)
        options = {"num_heads": 2, "segment_len": 2, "empty": empty}
        out, grads = gradients(local_slots, [hidden, *weights], options, torch.ones(()))
        assert out.shape == (batch, n, 2, 4) and not any(x.any() for x in grads)
    found = local_slots(
        torch.zeros(1, 0, 3), *weights, num_heads=2, cu_seqlens=torch.tensor([0, 0, 0], dtype=torch.int32)
    )
    assert found.shape == (1, 0, 2, 4)


@pytest.mark.parametrize("seed", range(8))
def test_gradcheck(seed):
    tensors, options = case(40 + seed)
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: local_slots(*x, **options), tensors)


def raw(seed, packed=None):
    tensors, o = case(seed, torch.float32, packed=packed)
    n = oracle(*[x.double() for x in tensors], **o).shape[1]
    return (*tensors, o["num_heads"], o["segment_len"] or 0, n, o["attention_mask"], o["cu_seqlens"], o["empty"], "")


@pytest.mark.parametrize("seed", range(6))
def test_opcheck(seed):
    torch.manual_seed(seed)
    arguments = raw(seed, packed=seed % 2 == 0)
    tensors = tuple(x.detach().clone().requires_grad_() for x in arguments[:4])
    torch.library.opcheck(torch.ops.hici.local_slots.default, tensors + arguments[4:])
    with torch.no_grad():
        out = torch.ops.hici.local_slots.default(*arguments)
        torch.library.opcheck(torch.ops.hici.local_slots_backward.default, (torch.randn_like(out), *arguments))


def test_second_derivative_is_refused():
    tensors, options = case(1)
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    with pytest.raises((RuntimeError, NotImplementedError)):
        (g,) = torch.autograd.grad(local_slots(*tensors, **options).square().sum(), tensors[1], create_graph=True)
        torch.autograd.grad(g.square().sum(), tensors[1])


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile(dynamic):
    torch._dynamo.reset()
    weights = [torch.randn(2, 4, requires_grad=True), torch.randn(4, 3), torch.randn(4, 3)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(x, mask):
        return local_slots(x, *weights, num_heads=2, segment_len=4, attention_mask=mask)

    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=dynamic)
    for length in (9, 14, 21):
        x, mask = torch.randn(2, length, 3, requires_grad=True), torch.ones(2, length)
        out = compiled(x, mask)
        torch.testing.assert_close(out, run(x, mask))
        out.square().sum().backward()
        assert x.grad is not None
    assert counter.frame_count == (1 if dynamic else 3)


@pytest.mark.parametrize("segment_len", [10**6, 2**62, 2**63 - 1])
def test_segments_longer_than_anything(segment_len):
    hidden, queries = torch.randn(1, 20, 16), torch.randn(4, 8)
    weights, cu = [torch.randn(8, 16) for _ in range(2)], torch.tensor([0, 10, 20], dtype=torch.int32)
    given = (hidden, queries, *weights)
    found = local_slots(*given, num_heads=2, segment_len=segment_len, cu_seqlens=cu, impl="cpu")
    close(found, local_slots(*given, num_heads=2, segment_len=None, cu_seqlens=cu, impl="reference"), 1e-4)


def test_meta_and_autocast():
    x = torch.randn(2, 9, 3)
    weights = [torch.randn(2, 4), torch.randn(4, 3), torch.randn(4, 3)]
    out = local_slots(*[t.to("meta") for t in (x, *weights)], num_heads=2, segment_len=4)
    assert out.device.type == "meta" and out.shape == (2, 3, 2, 4)
    packed = local_slots(
        *[t.to("meta") for t in (x[:1], *weights)],
        num_heads=2,
        segment_len=4,
        cu_seqlens=torch.empty(3, dtype=torch.int32, device="meta"),
        total_segments=5,
    )
    assert packed.shape == (1, 5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        low = local_slots(x, *weights, num_heads=2, segment_len=4)
    assert low.dtype == torch.bfloat16
    close(low, local_slots(x, *weights, num_heads=2, segment_len=4), 0.05)
