"""Super-chunks: what they leave out, that what survives is scored exactly, and their recall of the full scan."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hga_cases import full, ids, rope, small, tensors
from torch import Tensor

from hici_kernels import HGAConfig, _native
from hici_kernels.ops.hga_route.api import hga_route
from hici_kernels.ops.hga_summaries.api import hga_summaries
from hici_kernels.ops.hga_summaries.supers import super_chunk_keys

IMPLS = ["reference", *(["cpu"] if _native.paths() else [])]
each_impl = pytest.mark.parametrize("impl", IMPLS)


def tables(k: Tensor) -> tuple[Tensor, Tensor]:
    return hga_summaries(k, rope=rope(k.shape[-1]), chunk_size=16, group_size=4)


@each_impl
@pytest.mark.parametrize("share", ["query", "kv"])
@pytest.mark.parametrize("x", [1, 2, 3, 7])
@pytest.mark.parametrize("keep_last", [0, 2])
def test_routes_by_the_rule_in_words(impl: str, share: str, x: int, keep_last: int) -> None:
    q, k, _ = tensors(16 * 30 + 5, t=60, hq=4, seed=x, dtype=torch.float32)
    ck, gk = tables(k)
    config = small(super_chunk=x, topk_supers=2, keep_last=keep_last, topk_chunks=3, topk_groups=12, share=share)
    at = torch.arange(16 * 30 + 5 - 60, 16 * 30 + 5)
    routes = hga_route(q, ck, gk, config, positions=at[None], impl=impl)
    for t in range(0, 60, 7):
        n = int(at[t]) // 16
        f, l = min(1, n), min(max(1, n - keep_last), n)  # noqa: E741
        for g in range(2):
            for h in (2 * g, 2 * g + 1):
                family = [h] if share == "query" else [2 * g, 2 * g + 1]
                mean = ck[0, : len(ck[0]) // x * x, g].double().unflatten(0, (-1, x)).mean(1)
                supers = {
                    s: max(float(q[0, t, i].double() @ mean[s]) for i in family) for s in range(-(-f // x), l // x)
                }
                best = sorted(supers, key=lambda s: (-supers[s], s))[:2]
                pool = [c for c in range(f, l) if c // x not in supers or c // x in best]
                sigma = {c: max(float(q[0, t, i].double() @ ck[0, c, g].double()) for i in family) for c in pool}
                picks = sorted(pool, key=lambda c: (-sigma[c], c))[:3]
                if keep_last == 0 and n - 1 not in picks:
                    picks[-1] = n - 1
                assert sorted({i // 4 for i in ids(routes[0, t, h])}) == sorted(picks)


@each_impl
def test_enough_of_them_are_the_full_scan(impl: str) -> None:
    q, k, v = tensors(16 * 60, b=2, hq=8, seed=1, dtype=torch.float32)
    plain = small(topk_chunks=5, topk_groups=9)
    whole = full(q, k, v, plain, impl=impl)
    for x, supers in ((1, 60), (4, 15), (16, 4), (100, 1)):
        config = dataclasses.replace(plain, super_chunk=x, topk_supers=supers)
        found = full(q, k, v, config, impl=impl)
        assert torch.equal(found.routes, whole.routes) and torch.equal(found.out, whole.out)


@each_impl
def test_any_split_gives_the_same_ids_and_later_keys_change_nothing(impl: str) -> None:
    q, k, v = tensors(16 * 40, hq=8, seed=2, dtype=torch.float32)
    config = small(super_chunk=3, topk_supers=3, topk_chunks=4, topk_groups=7)
    whole = full(q, k, v, config, impl=impl)
    for start, stop in ((0, 100), (333, 334), (500, 640)):
        part = full(q[:, start:stop], k[:, :stop], v[:, :stop], config, impl=impl)
        assert torch.equal(part.routes, whole.routes[:, start:stop])
    ck, gk = tables(k)
    kept = super_chunk_keys(ck, 3)
    assert torch.equal(super_chunk_keys(ck[:, :14], 3), kept[:, :4])
    assert torch.equal(hga_route(q, ck, gk, config, super_keys=kept, impl=impl), whole.routes)


def test_recall_of_the_full_scan() -> None:
    """Keys that change slowly along a text, as those of real text do: what a quarter of the super-chunks keeps."""
    g = torch.Generator().manual_seed(3)
    steps = torch.randn(1, 16 * 512, 2, 32, generator=g)
    k = torch.stack([steps[:, max(0, i - 127) : i + 1].mean(1) for i in range(0, 16 * 512, 16)], 1)
    k = k.repeat_interleave(16, 1) * 8 + steps
    q = 4 * torch.randn(1, 64, 4, 32, generator=g)
    ck, gk = tables(k)
    plain = HGAConfig(16, 4, 1, 1, 16, 64)
    at = torch.full((1, 64), 16 * 512 - 1)
    want = hga_route(q, ck, gk, plain, positions=at)

    def recall(supers: int) -> float:
        config = dataclasses.replace(plain, super_chunk=16, topk_supers=supers)
        found = hga_route(q, ck, gk, config, positions=at)
        pairs = zip(want.flatten(0, 2).tolist(), found.flatten(0, 2).tolist(), strict=True)
        return sum(len(set(a) & set(b)) / len(set(a)) for a, b in pairs) / (64 * 4)

    measured = [recall(supers) for supers in (2, 8, 32)]
    assert measured == sorted(measured) and measured[1] > 0.8 and measured[2] == 1.0


def test_configs_and_arguments() -> None:
    for bad in ({"super_chunk": -1}, {"topk_supers": -1}, {"super_chunk": 4, "routing": "block"}):
        with pytest.raises(ValueError, match="super"):
            HGAConfig(**bad)
    q, k, _ = tensors(200, dtype=torch.float32)
    ck, gk = tables(k)
    with pytest.raises(ValueError, match="super_keys must be None"):
        hga_route(q, ck, gk, small(), super_keys=ck)
    with pytest.raises(ValueError, match="super_keys"):
        hga_route(q, ck, gk, small(super_chunk=2), super_keys=ck)
