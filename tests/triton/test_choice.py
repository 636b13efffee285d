"""Under the interpreter, kernels serve CPU tensors where they are named and nowhere else."""

import importlib

import pytest
import torch

from hici_kernels import HGAConfig, ImplError, Rope, _dispatch, attention, global_stats, local_slots
from hici_kernels.ops.hga_attention.api import hga_attention
from hici_kernels.ops.hga_route.api import hga_route
from hici_kernels.ops.hga_summaries.api import hga_summaries
from hici_kernels.tuning.chips import pretend

pytest.importorskip("triton.language")

OPS = ("attention", "local_slots", "global_stats", "hga_attention")
#: without a gradient
FORWARD = ("hga_summaries", "hga_route")


def call(op, impl):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 2, 16, generator=g).requires_grad_()
    if op == "attention":
        out = attention(x, x, x, segment_len=4, impl=impl)
    elif op == "global_stats":
        out = global_stats(x, impl=impl)
    elif op == "hga_attention":
        config = HGAConfig(chunk_size=2, group_size=1, keep_first=0, keep_last=1, topk_chunks=1, topk_groups=1)
        out = hga_attention(x, x, x, config, rope=Rope.from_theta(1e4, 16), impl=impl)
    else:
        weights = torch.randn(3, 16, 16, generator=g)
        out = local_slots(x[:, :, 0], *weights, num_heads=2, segment_len=4, impl=impl)
    out.sum().backward()
    return out.detach(), x.grad


@pytest.fixture
def seen(monkeypatch):
    """Names of the modules chosen, in order."""
    names = []
    select = _dispatch.select

    def spy(op, impl, *arguments):
        module = select(op, impl, *arguments)
        names.append(module.__name__.rsplit(".", 1)[1])
        return module

    for op in (*OPS, *FORWARD):
        monkeypatch.setattr(importlib.import_module(f"hici_kernels.ops.{op}.op"), "select", spy)
    return names


@pytest.mark.parametrize("op", OPS)
def test_without_a_name_cpu_tensors_never_meet_them(op, seen):
    unnamed = call(op, None)
    assert len(seen) == 2 and "triton" not in seen
    seen.clear()
    named = call(op, "triton")
    assert seen == ["triton", "triton"]
    for a, b in zip(unnamed, named, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_summaries_and_routes_too(seen):
    k = torch.randn(1, 32, 2, 16, generator=torch.Generator().manual_seed(0))
    config = HGAConfig(chunk_size=4, group_size=2, keep_first=0, keep_last=1, topk_chunks=2, topk_groups=2)
    found = []
    for impl in (None, "triton"):
        keys = hga_summaries(k, rope=Rope.from_theta(1e4, 16), chunk_size=4, group_size=2, impl=impl)
        found.append((*keys, hga_route(k[:, :3], *keys, config, impl=impl)))
    assert len(seen) == 4 and "triton" not in seen[:2] and seen[2:] == ["triton", "triton"]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", (*OPS, *FORWARD))
def test_they_can_run(op):
    assert _dispatch.explain(op)["triton"] is None


@pytest.mark.parametrize("op", OPS)
def test_gpus_older_than_the_kernels_are_named(op):
    with pretend("sm_75"), pytest.raises(ImplError, match=r"from sm_80 .* is of sm_75"):
        call(op, "triton")
