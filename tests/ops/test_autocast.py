"""Under torch.autocast an operation is the same call on tensors of the autocast dtype, float32 sums included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hici_kernels as hici

ROPE = hici.Rope.from_theta(1e4, 16)
CONFIG = hici.HGAConfig(chunk_size=16, group_size=4, keep_first=1, keep_last=1, topk_chunks=2, topk_groups=3)
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "attention": lambda q, k, w: hici.attention(q, k, k, segment_len=50, return_lse=True),
    "hga_attention": lambda q, k, w: hici.hga_attention(q, k, k, CONFIG, rope=ROPE, return_lse=True)[:2],
    "hga_summaries": lambda q, k, w: hici.hga_summaries(k, rope=ROPE, chunk_size=16, group_size=4),
    "local_slots": lambda q, k, w: (hici.local_slots(q.flatten(2), w[:3, :8], w[:8], w[8:16], num_heads=2),),
}


def tensors() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=g) for s in ((2, 130, 4, 16), (2, 130, 2, 16), (16, 64))]


@pytest.mark.parametrize("op", CALLS)
def test_autocast_only_casts(op: str) -> None:
    given = [x.requires_grad_() for x in tensors()]
    low = [x.detach().bfloat16().requires_grad_() for x in given]
    with torch.autocast("cpu", torch.bfloat16):
        found = CALLS[op](*given)
    expected = CALLS[op](*low)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        torch.testing.assert_close(f, e, rtol=0, atol=0)
    if found[0].requires_grad:
        found[0].float().square().sum().backward()
        expected[0].float().square().sum().backward()
        for x, y in zip(given, low, strict=True):
            if (
                y.grad is not None
            ):  # a tensor used twice adds its gradients in float32 on one side, bfloat16 on the other
                torch.testing.assert_close(x.grad, y.grad.float(), rtol=0.01, atol=0.01 * float(y.grad.abs().max()))


def test_float64_is_left_alone() -> None:
    q, k, _ = (x.double() for x in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        assert hici.attention(q, k, k).dtype == torch.float64


def test_a_budget_far_above_the_text_costs_no_memory() -> None:
    q, k, _ = tensors()
    # routes of the full budget would be 2 x 130 x 4 x 10^7 int32, 41 GB
    huge = hici.HGAConfig(chunk_size=16, group_size=4, topk_chunks=10**7, topk_groups=10**7, keep_first=0, keep_last=0)
    out = hici.hga_attention(q, k, k, huge, rope=ROPE)
    torch.testing.assert_close(out, hici.attention(q, k, k), rtol=1e-5, atol=1e-5)
    store = hici.KVStore(huge, rope=ROPE, layers=1, kv_heads=2, head_dim=16, batch=2, dtype=q.dtype, device="cpu")
    torch.testing.assert_close(store.attend(0, q, k, k), out, rtol=1e-5, atol=1e-5)
