"""Segments over ranks equal one process: outputs, gradients of inputs and of every parameter; bytes as counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from context_work import CASES, errors
from ranks import on_ranks

from hici_kernels import HiCIConfig
from hici_kernels.distributed import ContextParallel, ShardPlan, layer_traffic, ring_traffic, traffic_table

RUNS = [(2, torch.float32, 1e-6), (2, torch.float64, 1e-14), (4, torch.float32, 1e-6)]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0]} ranks, {run[1]}")
def run(request: pytest.FixtureRequest) -> tuple[float, list[dict[str, dict[str, tuple[float, float]]]]]:
    """All cases on one process group, and the limit that holds for them."""
    ranks, dtype, limit = request.param
    return limit, on_ranks(ranks, errors, dtype)


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(run: tuple[float, list[dict[str, dict[str, tuple[float, float]]]]], case: str) -> None:
    limit, found = run
    for rank, result in enumerate(found):
        for what, (error, own) in result[case].items():
            # ranks have other shapes, so kernels add in another order; float64 shows that nothing else differs
            assert error <= max(limit, 3 * own), f"rank {rank}: {what} is off by {error:.2e}, one process by {own:.2e}"


def test_plan_covers_the_sequence_in_whole_segments() -> None:
    for length in (0, 1, 7, 8, 9, 61, 1000):
        for segment_len in (1, 8, 100):
            for ranks in (1, 2, 3, 8):
                plan = ShardPlan(length, segment_len, ranks)
                parts = [plan.columns(r) for r in range(ranks)]
                assert [c.start for c in parts[1:]] == [c.stop for c in parts[:-1]]
                assert parts[0].start == 0 and parts[-1].stop == length
                assert all(c.start % segment_len == 0 or c.start == length for c in parts)
                assert sum(plan.counts) == len(plan.spans)
                # ranks without segments come last, and only where there are too few
                assert plan.counts.count(0) == max(0, ranks - len(plan.spans))
                assert sorted(plan.counts, key=bool, reverse=True) == plan.counts
                if len(plan.spans) >= 4 * ranks:
                    assert max(c.stop - c.start for c in parts) <= length / ranks + segment_len


def test_plan_of_packed_documents() -> None:
    plan = ShardPlan(20, 4, 2, (0, 5, 5, 20))
    assert plan.columns(0) == slice(0, 9) and plan.continues(1)
    assert plan.local_cu_seqlens(0) == (0, 5, 5, 9) and plan.local_cu_seqlens(1) == (0, 11)
    assert plan.positions(1).tolist() == list(range(4, 15))
    with pytest.raises(ValueError, match="cu_seqlens must ascend"):
        ShardPlan(20, 4, 2, (0, 25))


def test_traffic_of_a_7b_layer_is_a_few_hundred_kilobytes() -> None:
    config = HiCIConfig(segment_len=4096)
    sizes = {"num_kv_heads": 32, "head_dim": 128}
    ours = layer_traffic(ShardPlan(65536, 4096, 8), config, hidden_size=4096, **sizes)
    # 7 ranks, 2 segments of 8 slots of 4096 bfloat16 each
    assert ours["slots forward"] == 7 * 2 * 8 * 4096 * 2 == 917504
    assert ours["slots backward"] == 2 * ours["slots forward"]
    ring = ring_traffic(65536, 8, **sizes)
    assert ring["keys and values forward"] == 7 * 8192 * 2 * 4096 * 2
    table = traffic_table({"HiCI": ours, "ring attention": ring})
    assert "917,504 B" in table and table.count("total") == 2


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        ContextParallel(HiCIConfig())


def refusals() -> list[str]:
    from hici_kernels import Rope
    from hici_kernels.distributed import apply_context_parallel
    from hici_kernels.nn import HiCIAttention

    sizes = {"num_local_slots": 2, "num_heads": 2, "bottleneck_dim": 8, "shared_compress_dim": 4}
    config = HiCIConfig(segment_len=4, cut="index", **sizes)
    layer = HiCIAttention(16, 2, 2, 8, config, rope=Rope.from_theta(10.0, 8))
    exchange, x = ContextParallel(config), torch.randn(1, 16, 16)
    token = ContextParallel(HiCIConfig(**{**config.to_dict(), "cut": "token"}))  # another one, as both are explicit
    said = []
    assert exchange.serves(config) and not exchange.serves(token.config)
    open_ = ContextParallel(dataclasses.replace(config, cut=None))  # a layer of any cut fills it in
    assert all(open_.serves(c) for c in (config, token.config, open_.config)) and exchange.serves(open_.config)

    def refuse(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("no error")

    refuse(lambda: exchange.shard(x))
    refuse(lambda: apply_context_parallel(torch.nn.Linear(2, 2), exchange))
    refuse(lambda: apply_context_parallel(layer, token))
    apply_context_parallel(layer, exchange)
    refuse(lambda: apply_context_parallel(layer, exchange))
    refuse(lambda: exchange.split(16, torch.tensor([0, 15], dtype=torch.int32)))
    refuse(lambda: exchange.split(16, attention_mask=torch.ones(1, 15)))
    refuse(lambda: exchange.split(16).columns(2))
    refuse(lambda: layer(x))
    refuse(lambda: layer(x[:, :8], cache=layer.new_cache(1)))
    refuse(lambda: layer(x[:, :8], cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32)))
    layer.config = token.config
    vars(layer)["exchange"] = token
    token.split(16)
    refuse(lambda: layer(x[:, :8], attention_mask=torch.tensor([[0] + [1] * 7])))
    return said


def test_what_cannot_be_served_is_refused_before_any_exchange() -> None:
    expected = [
        "split(length) must be called",
        "no HiCI layers",
        "another config",
        "context parallel already",
        "cu_seqlens must run from 0 to 16",
        "attention_mask must have 16 columns",
        "rank must be at most 1",
        "must hold the 8 tokens",
        "cache must be None",
        "cu_seqlens must be given to split()",
        "use cut='index'",
    ]
    for said in on_ranks(2, refusals):
        for text, part in zip(said, expected, strict=True):
            assert part in text
