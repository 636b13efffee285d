"""Properties 1-19, 23, 26 and 27 of the method on every implementation (sides.py); the number is in the test's name.

 1  budgets that open everything are dense attention         p01, also in bfloat16
 2  windows that hold everything are                         p02
 3  a short text, none, one token                            p03
 4  prefill, decode, any split: the same ids                 p04
 5  any feed block                                           p05
 6  no gradient from later tokens                            p06
 7  no choice from later queries; "block" must have one      p07
 8  rows alone, in a batch, padded                           p08, test_store.py
 9  heads within a kv head; repeated keys                    p09
10  the summary formula, cuts, anchors                       p10, test_oracle.py
11  summaries formed at close are those of the whole         p11
12  positions shifted                                        p12
13  scales that move no choice                               p13
14  every token in one region, none twice                    p14
15  the forced chunk n - 1                                   p15
16  the best are chosen, ties to the lowest id               p16
17  a planted needle                                         p17
18  error falls with the budget and is bounded by what is missed   p18
19  a group is a set                                         p19
20  tiers give the same bits                                 test_store_tiers.py
21  limits are never exceeded                                test_store_tiers.py
22  rewind, replay                                           test_store.py, test_store_training.py
23  gradients are those of a fixed mask                      p23, gradcheck in test_ops.py, test_store_training.py
24  requests are separate                                    test_store.py
25  dual chunk attention                                     tests/transformers_models
26  scores of any size, low precision                        p26
27  pairs counted                                            p27
28  captured in a CUDA graph                                 needs a GPU
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hga_cases import dense, ids, rope, small, store
from hypothesis import given, settings
from hypothesis import strategies as st
from sides import SIDES, Side

from hici_kernels import HGAConfig, Rope
from hici_kernels.ops.hga_route.reference import regions
from hici_kernels.ops.hga_summaries.reference import slow_pairs
from hici_kernels.testing import assert_within_budget

LEAK_FREE = ("strict", "prefix")
ALL = ("strict", "prefix", "block")


def covering(s: int, **changes: object) -> HGAConfig:
    """Budgets that open everything; "block" requests half of topk_groups per query."""
    chunks = s // 16 + 1
    return small(topk_chunks=chunks, topk_groups=2 * 4 * chunks, **changes)


@pytest.mark.parametrize("routing", ALL)
@pytest.mark.parametrize("s", [1, 16, 17, 95, 130])
@pytest.mark.parametrize("t", [None, 1])
def test_p01_dense_equivalence_by_budget(on: Side, s: int, t: int | None, routing: str) -> None:
    q, k, v = on.tensors(s, t=t, b=2, seed=s)
    on.close(on.attention(q, k, v, covering(s, routing=routing), rope=rope()), dense(q, k, v))


def test_p01_dense_equivalence_bf16(on: Side) -> None:
    q, k, v = on.tensors(200, seed=1, dtype=torch.bfloat16)
    got = on.attention(q, k, v, covering(200), rope=rope())
    expected = dense(q.double(), k.double(), v.double())
    assert_within_budget(expected, got, dense(q, k, v), "out")


@pytest.mark.parametrize("routing", ALL)
@pytest.mark.parametrize(("kc", "kg"), [(0, 0), (0, 3), (2, 0), (2, 3)])
def test_p02_dense_equivalence_by_window(on: Side, kc: int, kg: int, routing: str) -> None:
    q, k, v = on.tensors(16 * 4 + 15, seed=kc)
    config = small(keep_first=2, keep_last=2, topk_chunks=kc, topk_groups=kg, routing=routing)
    on.close(on.attention(q, k, v, config, rope=rope()), dense(q, k, v))


@pytest.mark.parametrize("s", [0, 1, 2, 15, 16])
@pytest.mark.parametrize("b", [0, 1, 3])
def test_p03_short_input(on: Side, s: int, b: int) -> None:
    q, k, v = on.tensors(s, b=b)
    got = on.full(q, k, v, small())
    assert got.out.shape == q.shape and got.lse.shape == (b, 4, s) and got.routes.shape == (b, s, 4, 3)
    assert (got.routes == -1).all()
    if b and s:
        on.close(got.out, dense(q, k, v))


@pytest.mark.parametrize("routing", LEAK_FREE)
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 109), max_size=12), w=st.integers(0, 1), seed=st.integers(0, 1000))
def test_p04_prefill_equals_decode(on: Side, routing: str, cuts: list[int], w: int, seed: int) -> None:
    q, k, v = on.tensors(110, b=2, seed=seed, dtype=torch.float32)
    config = small(routing=routing, keep_last=w)
    on.close(on.feed(store(config, k), q, k, v, cuts), on.attention(q, k, v, config, rope=rope()), 2e-6)


@pytest.mark.parametrize("routing", LEAK_FREE)
def test_p04_prefill_equals_token_by_token_and_chunk_edges(on: Side, routing: str) -> None:
    q, k, v = on.tensors(100, seed=2, dtype=torch.float32)
    config = small(routing=routing)
    expected = on.attention(q, k, v, config, rope=rope())
    on.close(on.feed(store(config, k), q, k, v, list(range(100))), expected, 2e-6)
    for offset in (-1, 0, 1):
        on.close(on.feed(store(config, k), q, k, v, [c + offset for c in range(16, 100, 16)]), expected, 2e-6)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 119), max_size=6), seed=st.integers(0, 1000))
def test_p04_ids_are_the_same_for_any_split(on: Side, dtype: torch.dtype | None, cuts: list[int], seed: int) -> None:
    q, k, v = on.tensors(120, seed=seed, hq=8, dtype=dtype or on.dtype)
    config = small()
    chunk_keys, group_keys = on.summaries(k, rope=rope(), chunk_size=16, group_size=4)
    whole = on.full(q, k, v, config).routes
    ends = sorted({*cuts, 120})
    start = 0
    for end in ends:
        n = end // 16
        part = on.route(
            q[:, start:end], chunk_keys[:, :n], group_keys[:, :n], config, positions=torch.arange(start, end)[None]
        )
        assert torch.equal(part, whole[:, start:end])
        last = on.full(q[:, start:end], k[:, :end], v[:, :end], config)
        assert torch.equal(last.routes, whole[:, start:end])
        start = end


def test_p04_ids_are_the_same_across_tiles(on: Side) -> None:
    q, k, v = on.tensors(16 * 40 + 3, seed=4, hq=2, hkv=1, dtype=torch.float32)
    for routing in LEAK_FREE:
        config = small(routing=routing)
        whole = on.full(q, k, v, config).routes
        for start in (100, 255, 256, 257, 500):
            first = start // 16 * 16  # "prefix" maxima begin at a chunk
            part = on.full(q[:, first:], k, v, config).routes
            assert torch.equal(part, whole[:, first:])


@pytest.mark.parametrize("routing", LEAK_FREE)
@pytest.mark.parametrize("block", [1, 7, 16, 64, 100, 150])
def test_p05_feed_block_size_invariance(on: Side, block: int, routing: str) -> None:
    q, k, v = on.tensors(150, seed=3, dtype=torch.float32)
    config = small(routing=routing)
    got = on.feed(store(config, k), q, k, v, list(range(0, 150, block)))
    on.close(got, on.attention(q, k, v, config, rope=rope()), 2e-6)


@pytest.mark.parametrize("routing", ALL)
def test_p06_no_future_leak_gradient(on: Side, routing: str) -> None:
    q, k, v = (x.requires_grad_() for x in on.tensors(100, seed=4))
    for t in (0, 15, 16, 63, 90):
        got = on.full(q, k, v, small(routing=routing))
        grads = torch.autograd.grad(got.out[:, t].sum() + got.lse[:, :, t].sum(), (q, k, v))
        assert all(not g[:, t + 1 :].any() for g in grads)
        assert grads[0][:, t].any() and not grads[0][:, :t].any()


def leaks(on: Side, routing: str, seed: int, share: str = "query") -> bool:
    """Whether new values after t change anything up to t, with more wanted than the budgets hold."""
    q, k, v = on.tensors(150, seed=seed)
    config = small(routing=routing, topk_groups=2, route_block=16, share=share)
    before = on.full(q, k, v, config)
    t = 130 + seed % 16
    q2, k2, v2 = (x.clone() for x in (q, k, v))
    for x, y in zip((q2, k2, v2), on.tensors(150, seed=seed + 1), strict=True):
        x[:, t + 1 :] = 100 * y[:, t + 1 :]
    after = on.full(q2, k2, v2, config)
    upto = slice(0, t + 1)
    same = torch.equal(before.routes[:, upto], after.routes[:, upto])
    return not (same and on.same(after.out[:, upto], before.out[:, upto]))


@pytest.mark.parametrize("share", ["query", "kv"])
@pytest.mark.parametrize("routing", LEAK_FREE)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_p07_no_future_leak_selection(on: Side, routing: str, share: str, seed: int) -> None:
    assert not leaks(on, routing, seed, share)


def test_p07_block_routing_leaks(on: Side) -> None:
    assert sum(leaks(on, "block", seed) for seed in range(0, 60, 5)) >= 6


@pytest.mark.parametrize("routing", ALL)
def test_p07_nan_beyond_the_index_is_not_seen(on: Side, routing: str) -> None:
    q, k, v = on.tensors(150, seed=5)
    expected = on.full(q, k, v, small(routing=routing))
    for t in (3, 47, 48, 100):
        k2, v2 = k.clone(), v.clone()
        k2[:, t + 1 :] = torch.nan
        v2[:, t + 1 :] = torch.nan
        leaves = [x.clone().requires_grad_() for x in (q, k2, v2)]
        got = on.full(*leaves, small(routing=routing))
        assert torch.equal(got.routes[:, : t + 1], expected.routes[:, : t + 1])
        assert on.same(got.out[:, : t + 1], expected.out[:, : t + 1])
        assert on.same(got.lse[:, :, : t + 1], expected.lse[:, :, : t + 1])
        grads = torch.autograd.grad(got.out[:, : t + 1].sum() + got.lse[:, :, : t + 1].sum(), leaves)
        assert all(g[:, : t + 1].isfinite().all() for g in grads)
        assert got.out[:, t + 1 :].isnan().all()  # and who does see it is not told otherwise


@pytest.mark.parametrize("routing", ALL)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), keep=st.floats(0.2, 1))
def test_p08_a_padded_row_equals_the_row_alone(on: Side, routing: str, seed: int, keep: float) -> None:
    q, k, v = on.tensors(120, b=3, seed=seed)
    mask = torch.rand(3, 120, generator=torch.Generator().manual_seed(seed)) < keep
    for x in (q, k, v):
        x[~mask] = torch.nan
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    config = small(routing=routing)
    got = on.full(*leaves, config, attention_mask=mask)
    grads = torch.autograd.grad(got.out.square().sum() + got.lse[got.lse > -torch.inf].sum(), leaves)
    for b in range(3):
        kept = mask[b]
        alone = [x[b : b + 1, kept].clone().requires_grad_() for x in (q, k, v)]
        want = on.full(*alone, config)
        assert torch.equal(got.routes[b, kept], want.routes[0])
        on.close(got.out[b, kept], want.out[0])
        on.close(got.lse[b][:, kept], want.lse[0])
        assert not got.out[b, ~kept].any() and (got.routes[b, ~kept] == -1).all()
        assert (got.lse[b][:, ~kept] == -torch.inf).all()
        if kept.any():
            want_grads = torch.autograd.grad(want.out.square().sum() + want.lse.sum(), alone)
            for g, w in zip(grads, want_grads, strict=True):
                on.close(g[b, kept], w[0])
                assert not g[b, ~kept].any()


@pytest.mark.parametrize("t", [1, 30, 120])
def test_p08_masked_rows_of_the_last_tokens(on: Side, t: int) -> None:
    q, k, v = on.tensors(120, b=3, seed=6)
    mask = torch.rand(3, 120, generator=torch.Generator().manual_seed(6)) < 0.7
    whole = on.full(q, k, v, small(), attention_mask=mask)
    part = on.full(q[:, 120 - t :], k, v, small(), attention_mask=mask.long())
    assert torch.equal(part.routes, whole.routes[:, 120 - t :])
    on.close(part.out, whole.out[:, 120 - t :])


def test_p08_batch_rows_permute(on: Side) -> None:
    q, k, v = on.tensors(100, b=4, seed=7, dtype=torch.float32)
    got = on.full(q, k, v, small())
    order = torch.tensor([2, 0, 3, 1])
    again = on.full(q[order], k[order], v[order], small())
    assert torch.equal(again.routes, got.routes[order])
    on.close(again.out, got.out[order], 2e-6)
    for b in range(4):
        alone = on.full(q[b : b + 1], k[b : b + 1], v[b : b + 1], small())
        assert torch.equal(alone.routes, got.routes[b : b + 1])


@pytest.mark.parametrize("routing", ALL)
def test_p09_heads_permute_within_a_kv_group(on: Side, routing: str) -> None:
    q, k, v = on.tensors(100, hq=8, seed=8)
    order = torch.tensor([2, 0, 3, 1, 7, 4, 5, 6])
    got, again = on.full(q, k, v, small(routing=routing)), on.full(q[:, :, order], k, v, small(routing=routing))
    assert torch.equal(again.routes, got.routes[:, :, order])
    on.close(again.out, got.out[:, :, order])


@pytest.mark.parametrize("routing", ALL)
def test_p09_shared_heads_equal_repeated_keys(on: Side, routing: str) -> None:
    q, k, v = on.tensors(100, hq=8, seed=9)
    got = on.full(q, k, v, small(routing=routing))
    again = on.full(q, k.repeat_interleave(4, 2), v.repeat_interleave(4, 2), small(routing=routing))
    assert torch.equal(again.routes, got.routes)
    on.close(again.out, got.out)


def test_p09_share_kv_gives_one_route_per_kv_head(on: Side) -> None:
    q, k, v = on.tensors(100, hq=8, seed=9)
    routes = on.full(q, k, v, small(share="kv")).routes.unflatten(2, (2, 4))
    assert (routes == routes[:, :, :, :1]).all() and (routes[:, -1] >= 0).all()


@pytest.mark.parametrize(
    ("theta", "dim", "chunk", "expected"),
    [(1e6, 128, 64, 23), (1e7, 128, 64, 20), (1e4, 128, 64, 34), (1e6, 64, 64, 12), (5e6, 128, 64, 21)]  # noqa: RUF005
    + [(1e6, 256, 64, 45), (1e6, 128, 16, 16), (1e6, 128, 32, 20), (1e6, 128, 128, 26)],
)
def test_p10_cut(on: Side, theta: float, dim: int, chunk: int, expected: int) -> None:
    slow = slow_pairs(Rope.from_theta(theta, dim).inv_freq, chunk)
    assert int((~slow).sum()) == expected and not slow[:expected].any()


def test_p10_extreme_cuts_and_anchors(on: Side) -> None:
    c, gs = 64, 16
    plain = torch.randn(c, 1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for w in (1e-3, 1.0):
        r = Rope(torch.tensor([w, w], dtype=torch.float64))
        roped = r.rotate(plain[None], torch.arange(c)).to(on.dtype)
        chunk_keys, group_keys = on.summaries(roped, rope=r)
        if w == 1.0:  # every pair is fast: the mean of the roped keys
            on.close(chunk_keys[0, 0], roped[0].mean(0))
            on.close(group_keys[0, 0], roped[0].unflatten(0, (4, gs)).mean(1))
        else:  # every pair is slow: the mean of the plain keys, rotated at the anchor
            on.close(chunk_keys[0, 0], r.rotate(plain.mean(0)[None, None], torch.tensor([31]))[0, 0])
            means = plain.unflatten(0, (4, gs)).mean(1)
            on.close(group_keys[0, 0], r.rotate(means[None], torch.arange(4) * gs + 7)[0])
    same_chunk, same_group = on.summaries(roped, rope=r, group_size=64)
    on.close(same_chunk, same_group[:, :, 0], 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 129), max_size=8), seed=st.integers(0, 100))
def test_p11_incremental_summaries_are_bulk_summaries(on: Side, dtype: torch.dtype, cuts: list[int], seed: int) -> None:
    q, k, v = on.tensors(130, b=2, seed=seed, dtype=dtype)
    target = store(small(), k)
    on.feed(target, q, k, v, cuts)
    chunk_keys, group_keys = on.summaries(k, rope=rope(), chunk_size=16, group_size=4)
    held = target._layers[0].buffers
    assert torch.equal(held["chunk_keys"][:, :8], chunk_keys) and torch.equal(held["group_keys"][:, :8], group_keys)
    one, _ = on.summaries(k[1:, 48:64], rope=rope(), chunk_size=16, group_size=4)
    assert torch.equal(one[0, 0], chunk_keys[1, 3])


def test_p11_a_single_token_is_its_own_summary(on: Side) -> None:
    _, k, _ = on.tensors(9)
    chunk_keys, group_keys = on.summaries(k, rope=rope(), chunk_size=1, group_size=1)
    assert torch.equal(chunk_keys, k) and torch.equal(group_keys[:, :, 0], k)


@pytest.mark.parametrize("offset", [1, 63, 1000, 1_000_000])
@pytest.mark.parametrize("routing", ALL)
def test_p12_shift_invariance(on: Side, offset: int, routing: str) -> None:
    q, k, v = on.tensors(120, seed=12)
    r = Rope(rope().inv_freq.double())
    at = torch.arange(120)

    def turned(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return r.rotate(x.double(), p).to(on.dtype)

    near, far = (on.full(turned(q, p), turned(k, p), v, small(routing=routing), rope=r) for p in (at, at + offset))
    assert torch.equal(near.routes, far.routes)
    on.close(near.out, far.out, 1e-8)
    _, keys, _ = on.tensors(64)
    default = on.summaries(keys, rope=r, chunk_size=16, group_size=4)
    given_ = on.summaries(keys, rope=r, chunk_size=16, group_size=4, positions=torch.arange(64) + offset)
    assert torch.equal(default[0], given_[0]) and torch.equal(default[1], given_[1])


@pytest.mark.parametrize("routing", ALL)
@pytest.mark.parametrize("factor", [2.0**-10, 2.0**7])
def test_p13_scale_invariance_of_the_selection(on: Side, factor: float, routing: str) -> None:
    q, k, _ = on.tensors(100, seed=13, dtype=torch.float32)
    config = small(routing=routing)
    chunk_keys, group_keys = on.summaries(k, rope=rope(), chunk_size=16, group_size=4)
    expected = on.route(q, chunk_keys, group_keys, config)
    for a, b, c in ((factor, 1, 1), (1, factor, 1), (1, 1, factor)):
        assert torch.equal(on.route(a * q, b * chunk_keys, c * group_keys, config), expected)


def counts(routes: torch.Tensor, positions: torch.Tensor, config: HGAConfig) -> torch.Tensor:
    """How often each query [.., T, Hq] meets each token: built region by region."""
    t, hq, _ = routes.shape
    s = int(positions.max()) + 1
    seen = torch.zeros(t, hq, s, dtype=torch.int64)
    region = regions(positions, config.chunk_size, config.keep_first, config.keep_last)
    for i in range(t):
        seen[i, :, : int(region.f[i]) * config.chunk_size] += 1
        seen[i, :, int(region.l[i]) * config.chunk_size : int(positions[i]) + 1] += 1
        for h in range(hq):
            for g in ids(routes[i, h]):
                seen[i, h, g * config.group_size : (g + 1) * config.group_size] += 1
    return seen


@pytest.mark.parametrize("share", ["query", "kv"])
@pytest.mark.parametrize("routing", ALL)
@settings(max_examples=10, deadline=None)
@given(f=st.integers(0, 2), w=st.integers(0, 2), kc=st.integers(0, 4), kg=st.integers(0, 9), s=st.integers(1, 120))
def test_p14_partition(on: Side, routing: str, share: str, f: int, w: int, kc: int, kg: int, s: int) -> None:
    q, k, v = on.tensors(s, seed=s)
    config = small(keep_first=f, keep_last=w, topk_chunks=kc, topk_groups=kg, routing=routing, share=share)
    routes = on.full(q, k, v, config).routes[0]
    p = torch.arange(s)
    region = regions(p, 16, f, w)
    assert (region.f <= region.l).all() and (region.l <= region.n).all()
    assert counts(routes, p, config).max() <= 1
    for t in range(s):
        pool = int(region.l[t] - region.f[t])
        for h in range(4):
            opened = ids(routes[t, h])
            assert opened == sorted(set(opened)) and all(region.f[t] <= g // 4 < region.l[t] for g in opened)
            assert len({g // 4 for g in opened}) <= min(kc, pool)
            if routing == "block":
                assert len(opened) <= min(kg, min(kc, pool) * 4)
            else:
                assert len(opened) == min(kg, min(kc, pool) * 4)


@pytest.mark.parametrize("routing", LEAK_FREE)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), w=st.integers(0, 1), f=st.integers(0, 2), kc=st.integers(1, 3))
def test_p15_forced_previous_chunk(on: Side, routing: str, seed: int, w: int, f: int, kc: int) -> None:
    q, k, v = on.tensors(100, seed=seed)
    # every group of a picked chunk is opened, so that the picks can be read from the route
    config = small(keep_first=f, keep_last=w, topk_chunks=kc, topk_groups=4 * kc, routing=routing)
    routes = on.full(q, k, v, config).routes[0]
    for t in range(100):
        n = t // 16
        for h in range(4):
            picks = [g // 4 for g in ids(routes[t, h])][::4]
            assert len(picks) == len(set(picks))
            if w == 0 and n > f:
                assert n - 1 in picks
            if w == 1:
                assert n - 1 not in picks


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), kc=st.integers(1, 4))
def test_p16_optimal_selection(on: Side, seed: int, kc: int) -> None:
    q, k, _ = on.tensors(130, seed=seed)
    config = small(topk_chunks=kc, topk_groups=4 * kc)
    chunk_keys, group_keys = on.summaries(k, rope=rope(), chunk_size=16, group_size=4)
    routes = on.route(q, chunk_keys, group_keys, config)
    scores = torch.einsum("thd,nhd->thn", q[0], chunk_keys[0].repeat_interleave(2, 1))
    for t in range(130):
        n = t // 16
        for h in range(4):
            pool = scores[t, h, 1 : max(1, n - 1)]
            best = (pool.topk(min(kc, len(pool))).indices + 1).tolist()
            assert {g // 4 for g in ids(routes[0, t, h])} == set(best)


@pytest.mark.parametrize("share", ["query", "kv"])
@pytest.mark.parametrize("routing", LEAK_FREE)
def test_p16_ties_go_to_the_lowest_id(on: Side, routing: str, share: str) -> None:
    config = small(routing=routing, share=share)
    q = torch.ones(1, 130, 4, 16)
    chunk_keys, group_keys = torch.ones(1, 8, 2, 16), torch.ones(1, 8, 4, 2, 16)
    routes = on.route(q, chunk_keys, group_keys, config)
    assert (routes[0, 129] == torch.tensor([4, 5, 6])).all()
    group_keys[:, 1] = 0.5
    group_keys[:, 5, 2] = 2.0
    chunk_keys[:, 5] = 2.0
    assert (on.route(q, chunk_keys, group_keys, config)[0, 129] == torch.tensor([20, 21, 22])).all()


def test_p16_deterministic(on: Side) -> None:
    q, k, v = on.tensors(300, b=2, seed=16, dtype=torch.float32)
    first = on.full(q, k, v, small())
    for _ in range(3):
        again = on.full(q, k, v, small())
        assert torch.equal(again.routes, first.routes) and torch.equal(again.out, first.out)


@pytest.mark.parametrize("routing", ALL)
@pytest.mark.parametrize("chunk", [1, 2, 4, 6])
@pytest.mark.parametrize("offset", [0, 3, 5, 10, 15])
def test_p17_planted_needle(on: Side, chunk: int, offset: int, routing: str) -> None:
    g = torch.Generator().manual_seed(chunk * 16 + offset)
    k = 0.01 * torch.randn(1, 150, 1, 16, generator=g, dtype=torch.float64)
    v = torch.randn(1, 150, 1, 16, generator=g, dtype=torch.float64)
    at = chunk * 16 + offset
    r = Rope(torch.full((8,), 1e-3, dtype=torch.float64))
    needle = torch.randn(16, generator=g, dtype=torch.float64)
    needle = needle / needle.norm()
    k[0, at, 0] = 20 * needle
    q = (20 * needle).expand(1, 1, 1, 16)
    # "block" requests topk_groups // 2 groups
    config = small(topk_chunks=1, topk_groups=2 if routing == "block" else 1, routing=routing)
    q, k, v = (x.to(on.dtype) for x in (q, k, v))
    got = on.full(q, k, v, config, rope=r)
    assert at // 4 in ids(got.routes[0, 0, 0])
    on.close(got.out[0, 0, 0], v[0, at, 0], 1e-6)


def test_p18_error_falls_with_the_budget(on: Side) -> None:
    q, k, v = on.tensors(320, t=8, b=48, hq=2, hkv=1, seed=18, dtype=torch.float32)
    exact = dense(q, k, v)

    def error(kc: int, kg: int) -> float:
        config = small(topk_chunks=kc, topk_groups=kg)
        return float((on.attention(q, k, v, config, rope=rope()) - exact).abs().mean())

    by_groups = [error(8, kg) for kg in (0, 4, 8, 16, 32)]
    by_chunks = [error(kc, 4 * kc) for kc in (0, 2, 4, 8, 17)]
    assert by_groups == sorted(by_groups, reverse=True) and by_chunks == sorted(by_chunks, reverse=True)
    assert by_chunks[-1] < 1e-5


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), kg=st.integers(0, 8))
def test_p18_error_is_bounded_by_the_missed_mass(on: Side, seed: int, kg: int) -> None:
    q, k, v = on.tensors(120, seed=seed)
    got = on.full(q, k, v, small(topk_groups=kg))
    everything = on.full(q, k, v, covering(120))
    missed = 1 - (got.lse - everything.lse).exp()  # [1, Hq, T]
    error = (got.out - everything.out).norm(dim=-1).transpose(1, 2)
    assert (error <= 2 * missed * v.norm(dim=-1).max() + 10 * on.near).all()


def test_p19_a_group_is_a_set(on: Side) -> None:
    q, k, v = on.tensors(100, t=4, seed=19)
    config = small()
    first = on.full(q, k, v, config)
    order = torch.arange(100)
    for g in range(24):  # the queries stand in the last chunk, behind the 24 closed groups
        order[4 * g : 4 * g + 4] = 4 * g + torch.randperm(4, generator=torch.Generator().manual_seed(g))
    out, _, routes = on.routed(q, k[:, order], v[:, order], first.routes, config, 16**-0.5)
    assert torch.equal(routes, first.routes)
    on.close(out, first.out)


def test_p19_summaries_do_not_depend_on_the_order_in_a_group(on: Side) -> None:
    _, k, _ = on.tensors(16, seed=20)
    order = torch.tensor([3, 1, 0, 2, 5, 4, 7, 6, 8, 10, 9, 11, 15, 14, 13, 12])
    fast = Rope(torch.ones(8, dtype=torch.float64))
    on.close(
        on.summaries(k, rope=fast, chunk_size=16, group_size=4)[1],
        on.summaries(k[:, order], rope=fast, chunk_size=16, group_size=4)[1],
    )
    slow = Rope(torch.full((8,), 1e-2, dtype=torch.float64))
    at = torch.arange(16)
    for i in (0, 1):
        on.close(
            on.summaries(slow.rotate(k, at), rope=slow, chunk_size=16, group_size=4)[i],
            on.summaries(slow.rotate(k[:, order], at), rope=slow, chunk_size=16, group_size=4)[i],
        )


@pytest.mark.parametrize("routing", ALL)
@pytest.mark.parametrize("t", [100, 9])
def test_p23_gradients_are_those_of_attention_with_the_same_mask(on: Side, routing: str, t: int) -> None:
    config = small(routing=routing)
    leaves = [x.requires_grad_() for x in on.tensors(100, t=t, b=2, seed=4)]
    q, k, v = leaves
    got = on.full(q, k, v, config)
    seen = torch.zeros(2, t, 4, 100, dtype=torch.bool)
    for i, p in enumerate(range(100 - t, 100)):
        n = p // 16
        seen[:, i, :, : min(1, n) * 16] = True
        seen[:, i, :, min(max(1, n - 1), n) * 16 : p + 1] = True
    for b, i, h, g in got.routes.ge(0).nonzero().tolist():
        first = int(got.routes[b, i, h, g]) * 4
        seen[b, i, h, first : first + 4] = True
    scores = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(2, 2)) * 16**-0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    out = torch.einsum("bths,bshd->bthd", scores.softmax(-1), v.repeat_interleave(2, 2))
    lse = scores.logsumexp(-1).transpose(1, 2)
    on.close(got.out, out)
    on.close(got.lse, lse)
    weights = torch.randn_like(out), torch.randn_like(lse)
    for x, y in zip(
        torch.autograd.grad((got.out, got.lse), leaves, weights),
        torch.autograd.grad((out, lse), leaves, weights),
        strict=True,
    ):
        on.close(x, y)
        assert torch.equal(x == 0, y == 0)  # what is hidden from everybody has exactly no gradient


@pytest.mark.parametrize("routing", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_p26_large_scores(on: Side, dtype: torch.dtype, routing: str) -> None:
    q, k, v = on.tensors(150, seed=26, dtype=dtype)
    got = on.full(300 * q, 100 * k, v, small(routing=routing))
    assert got.out.isfinite().all() and got.lse.isfinite().all() and float(got.lse.abs().max()) > 1e4
    assert (got.routes[0, -1] >= -1).all() and (got.routes[0, -1, :, 0] >= 0).all()


@pytest.mark.parametrize("routing", ALL)
def test_p26_real_scores_far_below_zero_still_count(on: Side, routing: str) -> None:
    chunk_keys, group_keys = -1e6 * torch.ones(1, 8, 1, 16), -1e6 * torch.ones(1, 8, 4, 1, 16)
    routes = on.route(torch.ones(1, 130, 1, 16), chunk_keys, group_keys, small(routing=routing))
    assert routes[0, 129, 0, 0] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_p26_low_precision_matches_float64(on: Side, dtype: torch.dtype) -> None:
    q, k, v = on.tensors(150, seed=27, dtype=dtype)
    got = on.full(q, k, v, small())
    out, lse, _ = SIDES[0].routed(*(x.double() for x in (q, k, v)), got.routes, small(), 16**-0.5)
    eps = torch.finfo(dtype).eps
    on.close(got.out, out, 1e-6 + 2 * eps * float(v.double().abs().max()))
    on.close(got.lse, lse, 1e-5)


def test_p26_queries_that_see_nothing(on: Side) -> None:
    q, k, v = on.tensors(70, t=6, seed=28)
    at = torch.tensor([[-1, 0, -5, 69, 70, 1000]])
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    got = on.full(q, k, v, small(), positions=at)
    none = torch.tensor([True, False, True, False, True, True])
    assert not got.out[0, none].any() and (got.lse[0, :, none] == -torch.inf).all()
    assert (got.routes[0, none] == -1).all() and got.out[0, ~none].any()
    grads = torch.autograd.grad(got.out.sum() + torch.where(none, 0.0, got.lse).sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and not grads[0][0, none].any()


@pytest.mark.parametrize("share", ["query", "kv"])
@settings(max_examples=8, deadline=None)
@given(s=st.integers(1, 130), f=st.integers(0, 2), w=st.integers(0, 2), kg=st.integers(0, 8))
def test_p27_sparsity_accounting(on: Side, share: str, s: int, f: int, w: int, kg: int) -> None:
    q, k, v = on.tensors(s, seed=s, hq=2, hkv=1)
    config = small(keep_first=f, keep_last=w, topk_groups=kg, share=share)
    got = on.full(q, k, v, config)
    p = torch.arange(s)
    r = regions(p, 16, f, w)
    opened = (got.routes[0] >= 0).sum(-1)
    expected = (r.f * 16 + (p - r.l * 16 + 1))[:, None] + opened * 4
    assert torch.equal(counts(got.routes[0], p, config).sum(-1), expected)
    # with equal scores lse is the log of the number of tokens seen
    flat = on.routed(torch.zeros_like(q), k, v, got.routes, config, 1.0)
    on.close(flat[1][0].exp().T, expected.double(), 1e-6)


def test_long_rows_use_several_tiles(on: Side) -> None:
    q, k, v = on.tensors(1500, seed=30, hq=2, hkv=1, dtype=torch.float32)
    config = dataclasses.replace(HGAConfig(), keep_first=1, keep_last=2, topk_chunks=4, topk_groups=6)
    whole = on.full(q, k, v, config)
    for a, b in ((0, 200), (250, 700), (1499, 1500)):
        part = on.full(q[:, a:b], k[:, :b], v[:, :b], config)
        assert torch.equal(part.routes, whole.routes[:, a:b])
        on.close(part.out, whole.out[:, a:b], 2e-6)
