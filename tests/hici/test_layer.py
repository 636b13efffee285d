"""HiCIAttention against the loop oracle, over the cross product of its options."""

import itertools

import pytest
import torch
from hici_cases import (
    HIDDEN,
    build,
    close,
    oracle_of,
    random_layer,
    random_mask,
    random_offsets,
    random_positions,
)
from hici_oracle import MODES

from hici_kernels import HiCIConfig

SMALL = {"num_local_slots": 2, "global_slots": 2, "num_heads": 2, "bottleneck_dim": 4, "shared_compress_dim": 2}


def compare_rows(seed, **fixed):
    rng, layer, oracle = random_layer(seed, **fixed)
    batch, length = rng.randint(1, 3), rng.randint(1, 13)
    hidden = torch.randn(batch, length, HIDDEN, dtype=torch.float64)
    mask, positions = random_mask(rng, batch, length), random_positions(rng, batch, length)
    with torch.no_grad():
        found = layer(hidden, attention_mask=mask, positions=positions)
        close(found, oracle.batch(hidden, mask=mask, positions=positions), what=f"{seed} {layer.config} {mask}")


def compare_packed(seed, **fixed):
    fixed.setdefault("segment_len", 1 + seed % 4)
    rng, layer, oracle = random_layer(seed, **fixed)
    length = rng.randint(0, 14)
    hidden = torch.randn(1, length, HIDDEN, dtype=torch.float64)
    mask, positions = random_mask(rng, 1, length), random_positions(rng, 1, length)
    cu = random_offsets(rng, length, rng.randint(1, 4))
    with torch.no_grad():
        found = layer(hidden, attention_mask=mask, positions=positions, cu_seqlens=cu)
        expected = oracle.batch(hidden, mask=mask, positions=positions, cu_seqlens=cu)
    close(found, expected, what=f"{seed} {layer.config} {mask} {cu}")


@pytest.mark.parametrize("block", range(10))
def test_random_configurations(block):
    for seed in range(30 * block, 30 * block + 30):
        compare_rows(seed)


@pytest.mark.parametrize("block", range(6))
def test_random_packings(block):
    for seed in range(20 * block, 20 * block + 20):
        compare_packed(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_many_random_configurations(block):
    for seed in range(10_000 + 60 * block, 10_060 + 60 * block):
        compare_rows(seed)
        compare_packed(seed)


@pytest.mark.parametrize("use_global, use_local", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_ablation(mode, use_global, use_local):
    for empty, cut, recurrence in itertools.product(["skip", "zero", "uniform"], ["index", "token"], [0, 2]):
        options = {"use_global": use_global, "use_local": use_local, "empty": empty, "cut": cut}
        compare_rows(7, context_mode=mode, segment_len=3, recurrence_len=recurrence, **options)
        compare_packed(8, context_mode=mode, segment_len=3, recurrence_len=recurrence, **options)


@pytest.mark.parametrize("seed", range(12))
def test_gradients(seed):
    mode = MODES[seed % len(MODES)]
    rng, layer, _oracle = random_layer(1000 + seed, context_mode=mode, empty="skip" if seed % 2 else "zero")
    batch, length = 2, rng.randint(3, 10)
    eps = 1e-6 if layer.q_norm is not None else None
    mask = random_mask(rng, batch, length)
    hidden = torch.randn(batch, length, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(batch, length, HIDDEN, dtype=torch.float64)
    (layer(hidden, attention_mask=mask) * weights).sum().backward()
    state = {name: x.detach().clone().requires_grad_() for name, x in layer.state_dict().items()}
    other = hidden.detach().clone().requires_grad_()
    expected = (oracle_of(layer, eps, state).batch(other, mask=mask) * weights).sum() + 0.0 * other.sum()
    expected.backward()
    close(hidden.grad, other.grad, 1e-8, f"hidden {seed}")
    for name, p in layer.named_parameters():
        expected = torch.zeros_like(p) if state[name].grad is None else state[name].grad
        close(torch.zeros_like(p) if p.grad is None else p.grad, expected, 1e-8, f"{name} {seed}")


@pytest.mark.parametrize("seed", range(40))
def test_token_cut_row_equals_the_row_alone(seed):
    rng, layer, _ = random_layer(2000 + seed, cut="token")
    batch, length = 3, rng.randint(1, 12)
    hidden = torch.randn(batch, length, HIDDEN, dtype=torch.float64)
    mask = random_mask(rng, batch, length, "mixed")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = layer(hidden, attention_mask=mask, positions=positions)
        for b in range(batch):
            at = mask[b].nonzero()[:, 0]
            close(found[b, at], layer(hidden[b : b + 1, at])[0], 1e-11, f"{seed} row {b}")
            assert not found[b, mask[b] == 0].any()


@pytest.mark.parametrize("seed", range(30))
def test_rows_do_not_see_each_other(seed):
    rng, layer, _ = random_layer(3000 + seed)
    length = rng.randint(1, 12)
    hidden = torch.randn(4, length, HIDDEN, dtype=torch.float64)
    mask = random_mask(rng, 4, length)
    with torch.no_grad():
        found = layer(hidden, attention_mask=mask)
        for b in range(4):
            alone = layer(hidden[b : b + 1], attention_mask=None if mask is None else mask[b : b + 1])
            close(found[b], alone[0], 1e-11, f"{seed} row {b}")


@pytest.mark.parametrize("seed", range(30))
def test_packed_equals_each_document_alone(seed):
    rng, layer, _ = random_layer(4000 + seed, segment_len=1 + seed % 4)
    length = rng.randint(1, 14)
    hidden = torch.randn(1, length, HIDDEN, dtype=torch.float64)
    cu = random_offsets(rng, length, 4)
    with torch.no_grad():
        found = layer(hidden, cu_seqlens=cu)
        for a, b in itertools.pairwise(cu.tolist()):
            close(found[:, a:b], layer(hidden[:, a:b]), 1e-11, f"{seed} document {a}:{b}")


@pytest.mark.parametrize("mode", MODES)
def test_single_segment_is_judged_per_document(mode):
    on, off = (HiCIConfig(**SMALL, segment_len=4, context_mode=mode, single_segment=x) for x in ("on", "off"))
    (a, _), (b, oracle) = build(on), build(off)
    hidden = torch.randn(1, 11, HIDDEN, dtype=torch.float64)
    cu = torch.tensor([0, 4, 11], dtype=torch.int32)
    with torch.no_grad():
        one, other = a(hidden, cu_seqlens=cu), b(hidden, cu_seqlens=cu)
        close(other, oracle.batch(hidden, cu_seqlens=cu))
    close(one[:, 4:], other[:, 4:], 1e-12)
    leak_free = mode in ("causal_shift", "causal_shift_g")
    assert leak_free == torch.allclose(one[:, :4], other[:, :4], atol=1e-9)


def test_default_positions():
    layer, _ = build(HiCIConfig(**SMALL, segment_len=3))
    hidden = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1], [1] * 7])
    at = torch.arange(7)
    assert torch.equal(layer(hidden, attention_mask=mask), layer(hidden, attention_mask=mask, positions=at))
    assert torch.equal(layer(hidden, positions=at), layer(hidden, positions=at.int().expand(2, -1)))
    cu = torch.tensor([0, 2, 7], dtype=torch.int32)
    restarted = torch.tensor([0, 1, 0, 1, 2, 3, 4])
    assert torch.equal(layer(hidden[:1], cu_seqlens=cu), layer(hidden[:1], cu_seqlens=cu, positions=restarted))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("fixed", [{}, {"empty": "uniform", "cut": "token"}, {"empty": "uniform", "cut": "index"}])
def test_what_masked_columns_hold_does_not_matter(seed, fixed):
    rng, layer, _ = random_layer(5000 + seed, **({"empty": "skip" if seed % 2 else "zero"} | fixed))
    length = rng.randint(2, 12)
    mask = random_mask(rng, 2, length, rng.choice(["left", "right", "holes", "gap", "empty_row"]))
    if layer.config.cut == "index" and layer.config.empty == "uniform":
        # the slots of a segment without tokens are the mean of what it holds: every segment gets one
        mask[:, :: layer.config.resolve_segment_len(length)] = 1
    clean = torch.randn(2, length, HIDDEN, dtype=torch.float64)
    poisoned, positions = clean.clone(), torch.arange(length).expand(2, -1).clone()
    poisoned[mask == 0] = float("nan") if seed % 3 else float("inf")
    positions[mask == 0] = 10**6
    poisoned.requires_grad_()
    found = layer(poisoned, attention_mask=mask, positions=positions)
    with torch.no_grad():
        assert torch.equal(found, layer(clean, attention_mask=mask))
    found.sum().backward()
    assert poisoned.grad[mask == 1].isfinite().all() and not poisoned.grad[mask == 0].any()
    for name, p in layer.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("segments", [{"segment_len": 3}, {"num_segments": 3}])
@pytest.mark.parametrize("cut", ["index", "token"])
def test_empty_inputs(mode, segments, cut):
    for recurrence in (0, 2):
        config = HiCIConfig(**SMALL, **segments, context_mode=mode, cut=cut, recurrence_len=recurrence)
        layer, _ = build(config)
        for shape in ((0, 5), (2, 0), (0, 0)):
            hidden = torch.zeros(*shape, HIDDEN, dtype=torch.float64, requires_grad=True)
            for mask in (None, torch.ones(shape)):
                out = layer(hidden, attention_mask=mask)
                assert out.shape == hidden.shape
                out.sum().backward()
        mask = torch.zeros(2, 7)
        assert not layer(torch.randn(2, 7, HIDDEN, dtype=torch.float64), attention_mask=mask).any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_mask_dtypes(dtype):
    layer, _ = build(HiCIConfig(**SMALL, segment_len=3))
    hidden = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1, 0]])
    assert torch.equal(layer(hidden, attention_mask=mask.to(dtype)), layer(hidden, attention_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_module_computes_in_the_dtype_of_hidden(dtype):
    layer, _ = build(HiCIConfig(**SMALL, segment_len=3), dtype=dtype)
    eps = torch.finfo(dtype).eps
    hidden = torch.randn(2, 8, HIDDEN).to(dtype)
    out = layer(hidden)
    assert out.dtype == dtype
    with torch.no_grad():
        expected = oracle_of(layer).batch(hidden.double())
    close(out, expected, 60 * eps)


def test_autocast():
    layer, _ = build(HiCIConfig(**SMALL, segment_len=3), dtype=torch.float32)
    hidden = torch.randn(2, 8, HIDDEN, requires_grad=True)
    plain = layer(hidden)
    for cache in (None, layer.new_cache(2)):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(hidden, cache=cache)
        assert out.dtype == torch.bfloat16
        close(out.detach(), plain.detach(), 0.15)
        out.float().sum().backward()
        assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize("length", [12, 2**31 - 1, 2**31, 2**40, 2**63 - 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_segments_longer_than_anything_are_one_segment(length, packed, masked):
    """And cost nothing by their length."""
    options = {"num_local_slots": 2, "global_slots": 2, "num_heads": 2, "bottleneck_dim": 4, "shared_compress_dim": 2}
    x = torch.randn(1, 11, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    given = {"cu_seqlens": torch.tensor([0, 5, 5, 11], dtype=torch.int32)} if packed else {}
    if masked:
        given["attention_mask"] = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1]])
    outs = [
        build(HiCIConfig(**options, segment_len=n, recurrence_len=2, empty=empty))[0](x, **given)
        for n in (11, length)
        for empty in ("skip", "zero")
    ]
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
