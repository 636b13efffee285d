"""Whole layers under torch.compile: one graph, the same outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from hici_kernels import HiCIConfig, Rope
from hici_kernels.nn import HiCIAttention


def layer(**kwargs: object) -> HiCIAttention:
    sizes = {"num_local_slots": 3, "global_slots": 2, "num_heads": 2, "bottleneck_dim": 8, "shared_compress_dim": 4}
    torch.manual_seed(0)
    return HiCIAttention(32, 4, 2, 8, HiCIConfig(**sizes, **kwargs), rope=Rope.from_theta(1e4, 8), qk_norm_eps=1e-6)


def both(module: HiCIAttention, call: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    module.zero_grad()
    out = call(**kwargs)
    out.square().sum().backward()
    return out.detach(), module.k_proj.weight.grad.clone()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {"context_mode": "none", "num_segments": 4},
        {"context_mode": "causal_shift", "segment_len": 5, "recurrence_len": 2, "empty": "zero"},
        {"context_mode": "causal_gi", "segment_len": 5, "cut": "token"},
    ],
    ids=["none", "causal_shift", "causal_gi"],
)
def test_a_layer_is_one_graph(config: dict, dynamic: bool) -> None:
    torch._dynamo.reset()
    module = layer(**config)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    hidden = torch.randn(2, 23, 32)
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(1)) > 0.3
    calls: list[dict] = [{"hidden": hidden}]
    if "segment_len" in config:
        calls.append({"hidden": hidden, "attention_mask": mask})
        offsets = torch.tensor([0, 9, 23], dtype=torch.int32)
        calls.append({"hidden": hidden[:1], "cu_seqlens": offsets, "total_segments": 5})
    for call in calls:
        torch.testing.assert_close(both(module, compiled, **call), both(module, module, **call), rtol=1e-5, atol=1e-5)
