"""KVStore and HGAAttention."""

from __future__ import annotations

import pytest
import torch
from hga_cases import close, feed, full, rope, small, store, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from hici_kernels.kv.store import KVStore
from hici_kernels.nn.hga_attention import HGAAttention
from hici_kernels.ops.hga_attention.api import hga_attention

LEAK_FREE = ("strict", "prefix")


def rows_alone(q, k, v, mask, config) -> torch.Tensor:
    """Every row by itself, masked tokens cut out; 0 where masked."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        kept = mask[b]
        out[b, kept] = hga_attention(*(x[b : b + 1, kept] for x in (q, k, v)), config, rope=rope(q.shape[-1]))[0]
    return out


@pytest.mark.parametrize("routing", LEAK_FREE)
@settings(max_examples=12, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 119), max_size=10),
    keep=st.floats(0.1, 1),
    seed=st.integers(0, 1000),
    w=st.integers(0, 1),
)
def test_p08_ragged_rows_equal_rows_alone(routing: str, cuts: list[int], keep: float, seed: int, w: int) -> None:
    q, k, v = tensors(120, b=3, seed=seed)
    mask = torch.rand(3, 120, generator=torch.Generator().manual_seed(seed)) < keep
    for x in (q, k, v):
        x[~mask] = torch.nan
    config = small(routing=routing, keep_last=w)
    target = store(config, k)
    outs, start = [], 0
    for end in sorted({*cuts, 120}):
        c = slice(start, end)
        outs.append(target.attend(0, q[:, c], k[:, c], v[:, c], attention_mask=mask[:, c]))
        start = end
    close(torch.cat(outs, 1), rows_alone(q, k, v, mask, config))
    assert torch.equal(target.lengths, mask.sum(1)) and (target.next_columns(0) == 120).all()


def test_block_equals_the_whole_when_calls_end_at_block_ends() -> None:
    q, k, v = tensors(150, b=2, seed=1)
    config = small(routing="block", route_block=8)
    close(feed(store(config, k), q, k, v, [8, 24, 32, 96, 104]), hga_attention(q, k, v, config, rope=rope()))


@pytest.mark.parametrize("routing", LEAK_FREE)
@settings(max_examples=15, deadline=None)
@given(first=st.integers(1, 90), back=st.integers(0, 90), seed=st.integers(0, 100), cuts=st.lists(st.integers(1, 99)))
def test_p22_rewind_then_other_data_is_a_fresh_run(
    routing: str, first: int, back: int, seed: int, cuts: list[int]
) -> None:
    q, k, v = tensors(100, b=2, seed=seed)
    back = min(back, first)
    config = small(routing=routing)
    target = store(config, k)
    wrong = tensors(100, b=2, seed=seed + 1)
    for x, y in zip(wrong, (q, k, v), strict=True):
        x[:, :back] = y[:, :back]
    feed(target, *(x[:, :first] for x in wrong), cuts)
    target.rewind(back)
    assert (target.lengths == back).all() and (target.next_columns(0) == back).all()
    got = feed(target, *(x[:, back:] for x in (q, k, v)), cuts)
    close(got, hga_attention(q, k, v, config, rope=rope())[:, back:])


def test_p22_rewind_one_row_and_replay_is_idempotent() -> None:
    q, k, v = tensors(60, b=2, seed=3)
    target = store(small(), k)
    feed(target, q[:, :50], k[:, :50], v[:, :50], [])
    first = target.attend(0, q[:, 50:], k[:, 50:], v[:, 50:])
    target.rewind(50)
    assert torch.equal(target.attend(0, q[:, 50:], k[:, 50:], v[:, 50:]), first)
    target.rewind(20, row=1)
    assert target.lengths.tolist() == [60, 20] and target.next_columns(0).tolist() == [60, 20]
    more = tensors(60, b=2, seed=4)
    mask = torch.zeros(2, 60, dtype=torch.bool)
    mask[1, 20:] = True
    got = target.attend(0, *more, attention_mask=mask)
    row = [torch.cat((x[1:, :20], y[1:, 20:]), 1) for x, y in zip((q, k, v), more, strict=True)]
    close(got[1, 20:], hga_attention(*row, small(), rope=rope())[0, 20:])
    assert not got[0].any()


@pytest.mark.parametrize("routing", LEAK_FREE)
@pytest.mark.parametrize("cuts", [[], [40], [16, 32, 48], [5, 30, 31, 77]])
def test_p23_segment_loss_is_truncated_backpropagation(routing: str, cuts: list[int]) -> None:
    """Gradients through the store = those of the whole attention with history cut from the graph."""
    config = small(routing=routing)
    leaves = [x.requires_grad_() for x in tensors(100, b=2, seed=23)]
    weight = torch.randn(2, 100, 4, 16, dtype=torch.float64)
    got = torch.autograd.grad((feed(store(config, leaves[1]), *leaves, cuts) * weight).sum(), leaves)
    expected = torch.zeros((), dtype=torch.float64)
    whole = full(*leaves, config)
    start = 0
    for end in [*cuts, 100]:
        q, k, v = leaves
        keys, values = (torch.cat((x[:, :start].detach(), x[:, start:end]), 1) for x in (k, v))
        first = start // 16 * 16  # earlier queries of the chunk belong to its maxima
        part = full(torch.cat((q[:, first:start].detach(), q[:, start:end]), 1), keys, values, config)
        assert torch.equal(part.routes[:, start - first :], whole.routes[:, start:end])
        expected = expected + (part.out[:, start - first :] * weight[:, start:end]).sum()
        start = end
    for x, y in zip(got, torch.autograd.grad(expected, leaves), strict=True):
        close(x, y)
    if not cuts:
        for x, y in zip(got, torch.autograd.grad((whole.out * weight).sum(), leaves), strict=True):
            close(x, y)


def test_p23_only_the_queries_need_a_gradient() -> None:
    q, k, v = tensors(40, seed=2)
    target = store(small(), k)
    q.requires_grad_()
    first = target.attend(0, q[:, :30], k[:, :30], v[:, :30])
    target.attend(0, q[:, 30:].detach(), k[:, 30:], v[:, 30:])
    (got,) = torch.autograd.grad(first.sum(), q)
    (want,) = torch.autograd.grad(hga_attention(q[:, :30], k[:, :30], v[:, :30], small(), rope=rope()).sum(), q)
    close(got, want)


@pytest.mark.parametrize("routing", LEAK_FREE)
def test_p24_interleaved_sequences_are_separate_runs(routing: str) -> None:
    config = small(routing=routing)
    runs = [tensors(90, seed=s) for s in range(3)]
    stores = [store(config, k) for _, k, _ in runs]
    outs: list[list[torch.Tensor]] = [[], [], []]
    for start in range(0, 90, 15):
        c = slice(start, start + 15)
        for i, (q, k, v) in enumerate(runs):
            outs[i].append(stores[i].attend(0, q[:, c], k[:, c], v[:, c]))
    for (q, k, v), parts in zip(runs, outs, strict=True):
        close(torch.cat(parts, 1), hga_attention(q, k, v, config, rope=rope()))


@pytest.mark.parametrize("routing", LEAK_FREE)
def test_p24_reset_leaves_no_state(routing: str) -> None:
    config = small(routing=routing)
    q, k, v = tensors(70, b=2, seed=5)
    target = store(config, k)
    feed(target, *tensors(83, b=2, seed=6), [7])
    target.reset()
    assert not target.lengths.any() and not target.next_columns(0).any()
    assert torch.equal(feed(target, q, k, v, [30]), feed(store(config, k), q, k, v, [30]))
    target.reset(row=1)
    assert target.lengths.tolist() == [70, 0] and target.next_columns(0).tolist() == [70, 0]
    close(target.attend(0, q, k, v)[1], hga_attention(q, k, v, config, rope=rope())[1])


def test_reorder_copies_rows() -> None:
    q, k, v = tensors(70, b=3, seed=7)
    target = store(small(), k)
    feed(target, *(x[:, :40] for x in (q, k, v)), [])
    target.rewind(25, row=2)
    order = torch.tensor([1, 1, 0, 2])
    target.reorder(order)
    assert target.batch == 4 and target.lengths.tolist() == [40, 40, 40, 25]
    got = target.attend(0, *(x[order, 40:] for x in (q, k, v)))
    want = hga_attention(q, k, v, small(), rope=rope())[order, 40:]
    close(got[:3], want[:3])
    target.reorder([])
    assert target.batch == 0
    assert target.attend(0, *(x[:0] for x in (q, k, v))).shape == (0, 70, 4, 16)


def test_layers_are_separate_and_lengths_count_what_all_hold() -> None:
    q, k, v = tensors(40, seed=8)
    target = store(small(), k, layers=2)
    target.attend(0, q, k, v)
    assert target.lengths.tolist() == [0] and target.next_columns(0).tolist() == [40]
    target.attend(1, *tensors(30, seed=9))
    assert target.lengths.tolist() == [30]
    target.rewind(30)
    assert target.next_columns(0).tolist() == target.next_columns(1).tolist() == [30]


def test_empty_calls() -> None:
    q, k, v = tensors(40, seed=8)
    target = store(small(), k)
    assert target.attend(0, q[:, :0], k[:, :0], v[:, :0]).shape == (1, 0, 4, 16)
    target.attend(0, q, k, v)
    assert target.attend(0, q[:, :0], k[:, :0], v[:, :0]).shape == (1, 0, 4, 16)
    nothing = torch.zeros(1, 40, dtype=torch.int64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = target.attend(0, *leaves, attention_mask=nothing)
    assert not out.any() and target.lengths.tolist() == [40] and target.next_columns(0).tolist() == [80]
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), leaves))


def test_a_failed_call_changes_nothing() -> None:
    q, k, v = tensors(60, b=2, seed=9)
    target = store(small(), k)
    feed(target, *(x[:, :30] for x in (q, k, v)), [])
    rest = [x[:, 30:] for x in (q, k, v)]
    for bad in (lambda: target.attend(1, *rest), lambda: target.attend(0, *rest, impl="cuda")):
        with pytest.raises(ValueError):
            bad()
    for bad in (lambda: target.rewind(31), lambda: target.reorder([0, 2]), lambda: target.reset(2)):
        with pytest.raises(ValueError):
            bad()
    assert target.lengths.tolist() == [30, 30] and target.batch == 2
    close(target.attend(0, *rest), hga_attention(q, k, v, small(), rope=rope())[:, 30:])


@pytest.mark.parametrize("slack", [0, 100_000])
def test_device_bytes_is_never_exceeded(slack: int) -> None:
    q, k, v = tensors(64, seed=10)
    free = store(small(), k)
    feed(free, q, k, v, [])
    exact = free.stats()["peak_bytes"]["device"]
    assert exact >= free.stats()["resident_bytes"]["device"] > 0
    target = store(small(), k, device_bytes=exact + slack)
    feed(target, q, k, v, [])
    with pytest.raises(ValueError, match="device_bytes"):
        for _ in range(100):
            held = int(target.lengths[0])
            target.attend(0, *tensors(64, seed=11))
            assert target.stats()["peak_bytes"]["device"] <= exact + slack
    assert int(target.lengths[0]) == held
    target.close()
    assert target.stats()["resident_bytes"] == {"device": 0, "host": 0, "disk": 0}


def test_context_manager() -> None:
    q, k, v = tensors(20)
    with store(small(), k) as target:
        target.attend(0, q, k, v)
    for act in (lambda: target.attend(0, q, k, v), lambda: target.rewind(1), lambda: target.next_columns(0)):
        with pytest.raises(ValueError, match="closed"):
            act()


# HGAAttention


def layer(routing: str = "strict", **rest: object) -> HGAAttention:
    torch.manual_seed(0)
    return HGAAttention(32, 4, 2, 16, small(routing=routing), rope=rope(), **rest).double()  # type: ignore[arg-type]


def cache_of(module: HGAAttention, batch: int, layers: int = 1) -> KVStore:
    return KVStore(
        module.config,
        rope=module.rope,
        layers=layers,
        kv_heads=2,
        head_dim=16,
        batch=batch,
        dtype=torch.float64,
        device="cpu",
    )


@pytest.mark.parametrize("qk_norm_eps", [None, 1e-6])
@pytest.mark.parametrize("routing", LEAK_FREE)
def test_layer_prefill_equals_decode_with_padding(routing: str, qk_norm_eps: float | None) -> None:
    module = layer(routing, qk_norm_eps=qk_norm_eps, layer_idx=1)
    hidden = torch.randn(2, 90, 32, dtype=torch.float64)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1, :20] = mask[0, 33] = False
    want = module(hidden, attention_mask=mask)
    cache = cache_of(module, 2, layers=2)
    parts = [
        module(hidden[:, a:b], attention_mask=mask[:, a:b], cache=cache)
        for a, b in ((0, 35), (35, 36), (36, 80), (80, 90))
    ]
    close(torch.cat(parts, 1), want)
    assert not want[1, :20].any()
    # RoPE sees differences only: a left-padded row is the row alone
    close(want[1, 20:], module(hidden[1:, 20:])[0], 1e-4)


def test_layer_positions_and_names() -> None:
    module = layer(qk_norm_eps=1e-6)
    names = {*(f"{x}_proj.weight" for x in "qkvo"), "q_norm.weight", "k_norm.weight"}
    assert set(module.state_dict()) == names
    hidden = torch.randn(2, 70, 32, dtype=torch.float64)
    close(module(hidden, positions=torch.arange(70)), module(hidden))
    assert not torch.equal(module(hidden, positions=2 * torch.arange(70)), module(hidden))
    cache = cache_of(module, 2)
    module(hidden[:, :40], positions=torch.arange(40).expand(2, 40), cache=cache)
    close(module(hidden[:, 40:], cache=cache), module(hidden)[:, 40:])
    cache.rewind(50)
    close(module(hidden[:, 50:], cache=cache), module(hidden)[:, 50:])


def layer_leaks(routing: str) -> bool:
    module = layer(routing)
    torch.manual_seed(1)
    hidden = 5 * torch.randn(4, 150, 32, dtype=torch.float64)
    changed = hidden.clone()
    changed[:, 140:] = 50 * torch.randn(4, 10, 32, dtype=torch.float64)
    return not torch.equal(module(hidden)[:, :140], module(changed)[:, :140])


def test_p07_layer_leaks_with_block_routing_only() -> None:
    assert [layer_leaks(routing) for routing in ("strict", "prefix", "block")] == [False, False, True]


def test_layer_under_autocast_and_with_gradients() -> None:
    module = layer().float()
    hidden = torch.randn(1, 40, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(hidden)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert hidden.grad is not None and all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dtype": torch.bfloat16}, TypeError, "cache has dtype torch.bfloat16, expected torch.float64"),
        ({"device": "meta"}, ValueError, "cache is on meta, expected cpu"),
    ],
)
def test_a_cache_of_another_kind_is_refused_before_the_projections(
    options: dict[str, object], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"layers": 1, "kv_heads": 2, "head_dim": 16, "dtype": torch.float64, "device": "cpu", **options}
    cache, target = KVStore(small(), rope=rope(), **given), layer()  # type: ignore[arg-type]
    monkeypatch.setattr(target, "project", lambda *_: pytest.fail("projected"))
    with pytest.raises(error, match=message):
        target(torch.zeros(1, 3, 32, dtype=torch.float64), cache=cache)
    assert cache.lengths.tolist() == [0]


def test_under_autocast_a_cache_has_the_dtype_of_autocast() -> None:
    target, hidden = layer().float(), torch.randn(1, 3, 32)
    caches = [
        KVStore(small(), rope=rope(), layers=1, kv_heads=2, head_dim=16, dtype=dtype, device="cpu")
        for dtype in (torch.bfloat16, torch.float32)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        assert target(hidden, cache=caches[0]).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"cache has dtype torch\.float32, expected torch\.bfloat16"):
            target(hidden, cache=caches[1])
        wide = KVStore(small(), rope=rope(), layers=1, kv_heads=2, head_dim=16, dtype=torch.float64, device="cpu")
        assert target.double()(hidden.double(), cache=wide).dtype == torch.float64
    assert target.float()(hidden, cache=caches[1]).dtype == torch.float32


@pytest.mark.parametrize("device", ["nope", "cpu:x", torch.device("cuda", 120)], ids=str)
def test_a_device_that_is_not_there_is_named(device: object) -> None:
    with pytest.raises(ValueError, match=f"device must be a device of this machine, got '{device}'"):
        KVStore(small(), rope=rope(), layers=1, kv_heads=2, head_dim=16, dtype=torch.float32, device=device)  # type: ignore[arg-type]
