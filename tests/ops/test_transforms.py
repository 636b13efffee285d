"""What torch may do to a call from outside: derivatives of other kinds, lazy values, default devices, odd layouts."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import hici_kernels as hici
from hici_kernels import HGAConfig, HiCIConfig, KVStore, Rope, _native, nn

HGA = HGAConfig(chunk_size=4, group_size=2, keep_first=1, keep_last=1, topk_chunks=2, topk_groups=2)
ROPE = Rope.from_theta(1e4, 8)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


K, V = rand(1, 6, 2, 8), rand(1, 6, 2, 8) + 1
SLOTS, WEIGHT = rand(3, 8), rand(8, 8)
LSES = [rand(1, 4, 6), rand(1, 4, 6) + 1]
OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "attention": (lambda x: hici.attention(x, K, V), rand(1, 6, 4, 8)),
    "local_slots": (lambda x: hici.local_slots(x, SLOTS, WEIGHT, WEIGHT, num_heads=2), rand(1, 6, 8)),
    "global_stats": (hici.global_stats, rand(1, 3, 2, 8)),
    "merge_attention": (lambda x: hici.merge_attention([x, 2 * x], LSES)[0], rand(1, 6, 4, 8)),
    "hga_attention": (lambda x: hici.hga_attention(x, K, V, HGA, rope=ROPE), rand(1, 6, 4, 8)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_other_derivatives_than_reverse_mode_are_named_errors(name: str) -> None:
    """torch would answer forward mode with zeros."""
    f, x = OPERATIONS[name]

    def total(y: Tensor) -> Tensor:
        return f(y).sum()

    def dual() -> None:
        with forward_ad.dual_level():
            total(forward_ad.make_dual(x, torch.ones_like(x)))

    for call in (
        lambda: torch.func.jvp(total, (x,), (torch.ones_like(x),)),
        lambda: torch.func.jacfwd(total)(x),
        lambda: torch.func.grad(total)(x),
        lambda: torch.func.vmap(torch.func.grad(total))(torch.stack([x, x])),
        lambda: torch.autograd.functional.jacobian(total, x, strategy="forward-mode", vectorize=True),
        dual,
    ):
        with pytest.raises(
            NotImplementedError, match=f"hici::{name} is differentiable by torch.autograd in reverse mode"
        ):
            call()
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(total(leaf), leaf)
    assert torch.equal(torch.autograd.functional.jacobian(total, x), want) and want.any()
    with forward_ad.dual_level():  # nothing of the call is dual
        assert torch.equal(total(x), total(x.clone()))
    assert torch.equal(torch.func.jvp(lambda y: total(x) + y.sum(), (x,), (torch.ones_like(x),))[0], total(x) + x.sum())


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_that_are_still_to_be_negated(name: str) -> None:
    f, x = OPERATIONS[name]
    lazy = torch._neg_view(-x)
    assert lazy.is_neg() and torch.equal(lazy, x)
    assert torch.equal(f(lazy), f(x))


def test_lazy_values_in_a_list() -> None:
    outs, lse = [rand(1, 5, 2, 8), rand(1, 5, 2, 8) + 1], torch.randn(1, 2, 5, dtype=torch.complex64).conj().imag
    assert lse.is_neg()
    plain = torch.tensor(lse.tolist())
    got, want = (hici.merge_attention(outs, [x, torch.zeros(1, 2, 5)])[0] for x in (lse, plain))
    assert torch.equal(got, want)


def hici_layer(decode: str) -> tuple[Any, Callable[[], Any]]:
    recurrence = 2 if decode == "segment" else 0
    config = HiCIConfig(num_heads=2, bottleneck_dim=8, segment_len=16, decode=decode, recurrence_len=recurrence)
    with torch.device("cpu"):
        layer = nn.HiCIAttention(16, 4, 2, 8, config, rope=ROPE)
    return layer, lambda: layer.new_cache(2)


def hga_layer(**options: Any) -> tuple[Any, Callable[[], Any]]:
    with torch.device("cpu"):
        layer = nn.HGAAttention(16, 4, 2, 8, HGA, rope=ROPE)
    sizes = {"layers": 1, "kv_heads": 2, "head_dim": 8, "batch": 2, "dtype": torch.float32, "device": "cpu"}
    return layer, lambda: KVStore(HGA, rope=ROPE, **sizes, **options)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda decode=decode: hici_layer(decode) for decode in ("segment", "full", "slots")),
        hga_layer,
        lambda: hga_layer(tier="host"),
        lambda: hga_layer(cold_dtype=torch.int8),
        pytest.param(
            lambda: hga_layer(tier="disk", path=tempfile.gettempdir()),
            marks=pytest.mark.skipif(_native.status() is not None, reason="the file needs the native library"),
        ),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_caches_under_a_default_device(make: Callable[[], tuple[Any, Callable[[], Any]]], masked: bool) -> None:
    """Their lengths and lists are the host's; the default device may hold nothing at all."""
    layer, new = make()
    hidden, mask = rand(2, 60, 16), torch.ones(2, 60)
    mask[0, :3] = 0
    found = []
    for device in ("cpu", "meta"):
        outs = []
        with torch.device(device), torch.no_grad():
            cache = new()
            for a, b in ((0, 30), (30, 31), (31, 50), (50, 60)):
                outs.append(layer(hidden[:, a:b], cache=cache, attention_mask=mask[:, a:b] if masked else None))
                assert cache.lengths.device.type == "cpu"
            cache.reorder([1, 0])
            if getattr(cache, "tier", "") != "disk":
                cache = copy.deepcopy(cache)
            cache.rewind(int(cache.lengths.min()) - 1)
            outs.append(layer(hidden[:, :5], cache=cache))
            cache.reset()
        found.append(torch.cat(outs, 1))
    assert torch.equal(*found)


def test_offsets_on_the_cpu_serve_tensors_elsewhere() -> None:
    slots, offsets = torch.zeros(1, 3, 4, 8, device="meta"), torch.tensor([0, 1, 3], dtype=torch.int32)
    assert hici.global_stats(slots, cu_segments=offsets).device.type == "meta"
    with pytest.raises(ValueError, match="cu_segments is on meta, expected cpu"):
        hici.global_stats(torch.zeros(1, 3, 4, 8), cu_segments=offsets.to("meta"))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_is_not_taken_for_a_query_without_keys(impl: str) -> None:
    if impl == "cpu" and _native.status() is not None:
        pytest.skip(str(_native.status()))
    q, k, v = rand(1, 3, 2, 4), rand(1, 3, 2, 4) + 1, rand(1, 3, 2, 4) - 1
    bad = k.clone()
    bad[0, 1] = torch.nan
    part, other = (hici.attention(q, x, v, return_lse=True, impl=impl) for x in (bad, k))
    assert part[1][0, :, 1:].isnan().all() and part[1][0, :, 0].isfinite().all()
    out, lse = hici.merge_attention([part[0], other[0]], [part[1], other[1]], impl=impl)
    assert out[:, 1:].isnan().all() and lse[..., 1:].isnan().all()
    assert out[:, 0].isfinite().all() and lse[..., 0].isfinite().all()


def test_masked_columns_of_hga_may_hold_anything_in_training() -> None:
    layer, hidden, mask = hga_layer()[0], rand(1, 9, 16), torch.ones(1, 9)
    mask[0, 2] = 0
    found = []
    for value in (0.0, torch.nan, torch.inf):
        hidden[0, 2] = value
        layer.zero_grad()
        out = layer(hidden, attention_mask=mask)
        out.square().sum().backward()
        found.append((out.detach(), *(p.grad.clone() for p in layer.parameters())))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_layouts_other_than_dense_are_named() -> None:
    q = rand(1, 2, 1, 4)
    for call, kind in (
        (
            lambda: hici.attention(torch.nested.nested_tensor([rand(2, 1, 4)]), q, q),
            "q must be a dense .* a nested one",
        ),
        (lambda: hici.attention(q, q, q.to_sparse()), "v must be a dense .* a sparse_coo one"),
        (
            lambda: hici.attention(q, q, q, attention_mask=torch.ones(1, 2).to_sparse()),
            "attention_mask must be a dense",
        ),
        (lambda: hici.merge_attention([q.to_sparse()], [torch.zeros(1, 1, 2)]), r"outs\[0\] must be a dense"),
        (lambda: hici.global_stats(rand(1, 2, 2, 4).to_sparse()), "local must be a dense"),
    ):
        with pytest.raises(TypeError, match=kind):
            call()
    with pytest.raises(ValueError, match="scale must be finite, got 1000"):
        hici.attention(q, q, q, scale=10**400)
    for module in (nn.LocalConstructor, nn.GlobalIntegrator):
        with pytest.raises(ValueError, match="impl must be None or one of"):
            module(8, 2, 2, 4, impl="nonsense")
