"""Context parallel models of transformers, alone, checkpointed and under FSDP2; routed attention over kv heads."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks

from hici_kernels.distributed import HeadShard

# mode, FSDP2, gradient checkpointing
STEPS = {2: [("causal_shift", False, False), ("none", False, True), ("causal_shift", True, False)],
         4: [("causal_gi", False, False), ("causal_shift", True, True)]}  # fmt: skip


@pytest.mark.parametrize("ranks", STEPS)
def test_a_training_step_equals_one_process(ranks: int) -> None:
    pytest.importorskip("transformers")
    from model_work import steps

    for found in on_ranks(ranks, steps, STEPS[ranks]):
        for what, (loss, gradients) in found.items():
            assert loss < 1e-6 and gradients < 1e-6, f"{what}: loss {loss:.2e}, gradients {gradients:.2e}"


def test_padding_on_one_rank_only() -> None:
    """The other ranks' masks are all ones, which transformers' models do not see: split() tells every rank."""
    pytest.importorskip("transformers")
    from model_work import padded

    for found in on_ranks(2, padded):
        for what, difference in found.items():
            assert difference < 1e-5, f"{what}: {difference:.2e}"


# kv heads, share, tier
LAYERS = {2: [(2, "query", "device"), (3, "kv", "host")], 4: [(5, "query", "disk")]}


@pytest.mark.parametrize("ranks", LAYERS)
def test_hga_over_kv_heads_equals_one_process(ranks: int) -> None:
    from model_work import layers

    for found in on_ranks(ranks, layers, LAYERS[ranks]):
        for case in found.values():
            for what, difference in case.items():
                assert difference < 1e-6, f"{what}: {difference:.2e}"


def test_a_shard_is_trained_as_its_layer_is() -> None:
    from model_work import frozen

    assert on_ranks(1, frozen) == [(False, False, True, True)]


def test_head_shards_cover_all_heads_once() -> None:
    shards = [HeadShard(15, 5, 3, r) for r in range(3)]
    assert [h for s in shards for h in range(15)[s.heads]] == list(range(15))
    assert [h for s in shards for h in range(5)[s.kv_heads]] == list(range(5))
    with pytest.raises(ValueError, match="ranks must be at most num_kv_heads 2"):
        HeadShard(4, 2, 4, 0)
    assert torch.zeros(1, 1, 15, 2)[:, :, shards[1].heads].shape[2] == 6
