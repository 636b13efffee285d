"""Training through a tiered history, segment by segment: gradients, gradient checkpointing, atomicity."""

from __future__ import annotations

import functools

import pytest
import torch
from hga_cases import close, feed, full, rope, small, store, tensors
from torch.utils.checkpoint import checkpoint

from hici_kernels import HGAConfig, KVStore, KVStoreError, _native
from hici_kernels.nn.hga_attention import HGAAttention
from hici_kernels.ops.hga_attention.api import hga_attention

TIERS = ("device", "host", "disk")


def on(tier: str, tmp_path) -> dict:
    if tier == "disk":
        if _native.status() is not None:
            pytest.skip("the tier disk needs the native library")
        return {"tier": tier, "path": tmp_path, "host_bytes": 400_000}
    return {"tier": tier}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("routing", ["strict", "prefix"])
def test_p23_gradients_of_a_segment_equal_the_reference_with_constants(tier: str, routing: str, tmp_path) -> None:
    """A history of many records, then a segment of several chunks that opens groups of both."""
    config = small(routing=routing, topk_chunks=4, topk_groups=8)
    leaves = [x.requires_grad_() for x in tensors(400, b=2, seed=23)]
    q, k, v = leaves
    weight = torch.randn(2, 90, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with store(config, k, **on(tier, tmp_path)) as target:
        with torch.no_grad():
            feed(target, q[:, :310], k[:, :310], v[:, :310], [77])
        with target.segment():
            out = target.attend(0, *(x[:, 310:] for x in leaves))
            got = torch.autograd.grad((out * weight).sum(), leaves)
        assert target.lengths.tolist() == [400, 400]
    first = 310 // 16 * 16  # earlier queries of the chunk belong to its maxima
    keys, values = (torch.cat((x[:, :310].detach(), x[:, 310:]), 1) for x in (k, v))
    whole = full(torch.cat((q[:, first:310].detach(), q[:, 310:]), 1), keys, values, config)
    chunk = whole.routes // 4
    assert (chunk >= 310 // 16).any() and ((chunk >= 0) & (chunk < 200 // 16)).any()
    close(out, whole.out[:, 310 - first :])
    for x, y in zip(got, torch.autograd.grad((whole.out[:, 310 - first :] * weight).sum(), leaves), strict=True):
        close(x, y)
        assert not x[:, :310].any()


class Model(torch.nn.Module):
    """Two routed layers with residuals, checkpointed or not."""

    def __init__(self, config: HGAConfig, again: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            HGAAttention(32, 4, 2, 16, config, rope=rope(), layer_idx=i).double() for i in range(2)
        )
        self.again = again

    def forward(self, x: torch.Tensor, cache: KVStore, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            if self.again is None:
                x = x + layer(x, cache=cache, attention_mask=mask)
            else:
                run = functools.partial(layer, cache=cache, attention_mask=mask)
                x = x + checkpoint(run, x, use_reentrant=self.again)
        return x


def cache_of(config: HGAConfig, **more) -> KVStore:
    return store(config, torch.zeros(2, 1, 2, 16, dtype=torch.float64), layers=2, **more)


def train(model: Model, cache: KVStore, hidden: torch.Tensor, ends: list[int]) -> list[torch.Tensor]:
    """Parameter gradients of the sum of the losses of all segments."""
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
    mask[1, :9] = mask[0, 50] = False
    start = 0
    for end in ends:
        with cache.segment():
            model(hidden[:, start:end].clone().requires_grad_(), cache, mask[:, start:end]).square().mean().backward()
        start = end
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cold", [None, torch.int8])
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.filterwarnings("ignore"))])
def test_p22_replay_under_gradient_checkpointing_is_idempotent(
    tier: str, cold: torch.dtype | None, reentrant: bool, tmp_path
) -> None:
    config = small(topk_chunks=4, topk_groups=8)
    hidden = torch.randn(2, 330, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ends = [100, 170, 320]
    with (
        cache_of(config, cold_dtype=cold) as near,
        cache_of(config, cold_dtype=cold, **on(tier, tmp_path)) as far,
    ):
        plain, again = Model(config, None), Model(config, reentrant)
        for x, y in zip(train(plain, near, hidden, ends), train(again, far, hidden, ends), strict=True):
            if reentrant:  # adds the same gradients in another order
                close(x, y, 1e-14)
            else:
                assert torch.equal(x, y)
        assert torch.equal(near.lengths, far.lengths) and far.lengths.tolist() == [319, 311]
        with torch.no_grad():
            assert torch.equal(plain(hidden[:, 320:], near), plain(hidden[:, 320:], far))


def test_p23_one_segment_is_full_backpropagation() -> None:
    config = small()
    model = Model(config, False)
    hidden = torch.randn(2, 150, 32, dtype=torch.float64)
    with cache_of(config) as cache, cache.segment():
        model(hidden, cache).square().sum().backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    x = hidden
    for layer in model.layers:
        x = x + layer(x)
    x.square().sum().backward()
    for a, b in zip(got, (p.grad for p in model.parameters()), strict=True):
        close(a / b.abs().max(), b / b.abs().max())


def test_segments_without_gradients_are_appended_too() -> None:
    q, k, v = tensors(200, b=2, seed=4)
    target = store(small(), k)
    outs = []
    for start, end in ((0, 60), (60, 61), (61, 200)):
        with target.segment():
            for _ in range(2):  # a replay
                out = target.attend(0, *(x[:, start:end] for x in (q, k, v)))
        outs.append(out)
        assert (target.lengths == end).all() and (target.next_columns(0) == end).all()
    close(torch.cat(outs, 1), hga_attention(q, k, v, small(), rope=rope()))


def test_what_a_caller_does_to_its_tensors_later_is_not_stored() -> None:
    q, k, v = tensors(120, seed=4)
    target = store(small(), k)
    given = [x[:, :60].clone() for x in (q, k, v)]
    with target.segment():
        target.attend(0, *given)
        for x in given:
            x.fill_(torch.nan)
    rest = [x[:, 60:] for x in (q, k, v)]
    close(target.attend(0, *rest), hga_attention(q, k, v, small(), rope=rope())[:, 60:])


def test_an_exception_inside_a_segment_leaves_the_store_as_it_was(tmp_path) -> None:
    q, k, v = tensors(300, b=2, seed=4)
    target = store(small(), k)
    target.attend(0, *(x[:, :130] for x in (q, k, v)))
    other = tensors(170, b=2, seed=5)
    with pytest.raises(KeyError), target.segment():
        target.attend(0, *other)
        for act in (target.reset, lambda: target.rewind(3), lambda: target.reorder([0]), target.segment().__enter__):
            with pytest.raises(ValueError, match="inside a segment"):
                act()
        raise KeyError
    assert target.lengths.tolist() == [130, 130]
    rest = [x[:, 130:] for x in (q, k, v)]
    close(target.attend(0, *rest), hga_attention(q, k, v, small(), rope=rope())[:, 130:])


def test_a_segment_that_cannot_be_stored_can_be_rewound(tmp_path) -> None:
    config = small()
    hidden = torch.randn(2, 300, 32, dtype=torch.float64)
    model = Model(config, None)
    with cache_of(config, **on("disk", tmp_path)) as far, cache_of(config) as near:
        train(model, far, hidden, [150])
        train(model, near, hidden, [150])
        length = int(far.lengths.min())
        far._engine.tier.file.inject(True, "error", 28, skip=45, times=1)  # in the second layer
        with pytest.raises(KVStoreError, match="layer 1"), far.segment():
            model(hidden[:, 150:], far).sum().backward()
        for cache in (far, near):
            cache.rewind(length)
        with torch.no_grad():
            assert torch.equal(model(hidden[:, 150:], near), model(hidden[:, 150:], far))
