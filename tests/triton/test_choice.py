"""Under the interpreter, kernels serve CPU tensors where they are named and nowhere else."""

import importlib

import pytest
import torch

from hici_kernels import _dispatch, attention, global_stats, local_slots

pytest.importorskip("triton.language")

OPS = ("attention", "local_slots", "global_stats")


def call(op, impl):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 2, 16, generator=g).requires_grad_()
    if op == "attention":
        out = attention(x, x, x, segment_len=4, impl=impl)
    elif op == "global_stats":
        out = global_stats(x, impl=impl)
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

    for op in OPS:
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


@pytest.mark.parametrize("op", OPS)
def test_they_can_run(op):
    assert _dispatch.explain(op)["triton"] is None
