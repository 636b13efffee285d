"""The operations against the loops of oracle.py, over random configurations."""

from __future__ import annotations

import oracle
import pytest
import torch
from hga_cases import close, full, ids, small, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from hici_kernels import HGAConfig, Rope
from hici_kernels.ops.hga_route.api import hga_route
from hici_kernels.ops.hga_summaries.api import hga_summaries


def compare(q, k, v, config, rope, positions=None) -> None:
    b, t = q.shape[:2]
    at = None if positions is None else torch.tensor([positions] * b)
    got = full(q, k, v, config, rope=rope, positions=at)
    for row in range(b):
        out, lse, opened = oracle.attention(q[row], k[row], v[row], rope.inv_freq, config, positions)
        assert [[ids(got.routes[row, x, h]) for h in range(q.shape[2])] for x in range(t)] == opened
        close(got.out[row], out)
        close(got.lse[row], lse)


CONFIGS = st.builds(
    lambda gs, f, w, kc, kg, routing, block, share: small(
        group_size=gs,
        keep_first=f,
        keep_last=w,
        topk_chunks=kc,
        topk_groups=kg,
        routing=routing,
        route_block=block,
        share=share,
    ),
    st.sampled_from((4, 8, 16)),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 4),
    st.integers(0, 7),
    st.sampled_from(("strict", "prefix", "block")),
    st.sampled_from((1, 5, 16, 64)),
    st.sampled_from(("query", "kv")),
)


@settings(max_examples=40, deadline=None)
@given(
    config=CONFIGS, s=st.integers(0, 100), t=st.integers(0, 40), r=st.sampled_from((1, 4)), seed=st.integers(0, 2**31)
)
def test_random_configurations(config: HGAConfig, s: int, t: int, r: int, seed: int) -> None:
    q, k, v = tensors(s, t=min(s, t), hq=r, hkv=1, d=8, seed=seed)
    compare(q, k, v, config, Rope.from_theta(1e4, 8))


@settings(max_examples=10, deadline=None)
@given(config=CONFIGS, seed=st.integers(0, 2**31), at=st.sets(st.integers(0, 89), min_size=1, max_size=20))
def test_given_positions(config: HGAConfig, seed: int, at: set[int]) -> None:
    q, k, v = tensors(90, t=len(at) + 1, hq=2, hkv=1, d=8, seed=seed)
    compare(q, k, v, config, Rope.from_theta(1e4, 8), [*sorted(at), -1])


@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
@pytest.mark.parametrize(("hq", "hkv"), [(2, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("gs", [8, 16, 64])
def test_chunks_of_64(gs: int, hq: int, hkv: int, routing: str) -> None:
    config = HGAConfig(group_size=gs, keep_first=1, keep_last=1, topk_chunks=2, topk_groups=3, routing=routing)
    q, k, v = tensors(64 * 6 + 9, t=12, hq=hq, hkv=hkv, d=8, seed=gs + hq)
    compare(q, k, v, config, Rope.from_theta(1e6, 8))


@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
def test_partial_rotary(routing: str) -> None:
    q, k, v = tensors(100, t=30, b=2, d=12, seed=5)
    compare(q, k, v, small(routing=routing), Rope.from_theta(1e3, 8))


@pytest.mark.parametrize("theta", [2.0, 1e4, 1e7])
@pytest.mark.parametrize("rotary", [4, 8, 10])
def test_p10_summaries_are_the_double_loop(theta: float, rotary: int) -> None:
    _, k, _ = tensors(70, b=2, d=10, seed=3)
    rope = Rope.from_theta(theta, rotary)
    chunk_keys, group_keys = hga_summaries(k, rope=rope, chunk_size=16, group_size=4)
    assert chunk_keys.shape == (2, 4, 2, 10) and group_keys.shape == (2, 4, 4, 2, 10)
    for row in range(2):
        chunks, groups = oracle.summaries(k[row], rope.inv_freq, 16, 4)
        close(chunk_keys[row], chunks, 1e-7 if theta > 1e6 else 1e-11)
        close(group_keys[row], groups, 1e-7 if theta > 1e6 else 1e-11)


@pytest.mark.parametrize("t", [1, 20, 70])
def test_route_default_positions_are_the_last_of_the_closed_or_given(t: int) -> None:
    q, k, _ = tensors(70, t=t, seed=8)
    rope = Rope.from_theta(1e4, 16)
    chunk_keys, group_keys = hga_summaries(k, rope=rope, chunk_size=16, group_size=4)
    last = max(64, t)
    explicit = torch.arange(last - t, last).unsqueeze(0)
    config = small()
    got = hga_route(q, chunk_keys, group_keys, config)
    assert got.dtype == torch.int32 and got.shape == (1, t, 4, 3)
    assert torch.equal(got, hga_route(q, chunk_keys, group_keys, config, positions=explicit))
