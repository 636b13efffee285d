"""What the ranks of test_context_parallel.py compute: every case over ranks, and by one process, in each process."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch

from hici_kernels import HiCIConfig, Rope
from hici_kernels.config import CONTEXT_MODES
from hici_kernels.distributed import ContextParallel, apply_context_parallel, layer_traffic, remove_context_parallel
from hici_kernels.nn import HiCIAttention

SIZES: dict[str, Any] = {
    "num_local_slots": 3,
    "global_slots": 2,
    "num_heads": 2,
    "bottleneck_dim": 8,
    "shared_compress_dim": 4,
    "segment_len": 8,
    "cut": "index",
}
H, HQ, HKV, D = 16, 4, 2, 8
# name -> fields of the configuration, tokens, offsets of documents, masked columns
CASES: dict[str, tuple[dict[str, Any], int, tuple[int, ...] | None, tuple[int, ...]]] = {}
for mode, recurrence in itertools.product(CONTEXT_MODES, (0, 5)):
    CASES[f"{mode}-r{recurrence}"] = ({"context_mode": mode, "recurrence_len": recurrence}, 61, None, ())
for mode in CONTEXT_MODES:
    CASES[f"{mode}-packed"] = ({"context_mode": mode, "recurrence_len": 8}, 67, (0, 19, 19, 43, 46, 67), ())
    CASES[f"{mode}-masked"] = ({"context_mode": mode}, 64, None, (*range(0, 11), 20, *range(33, 48), 63))
CASES |= {
    "fewer segments than ranks": ({"recurrence_len": 4}, 21, None, ()),
    "one segment": ({"context_mode": "none"}, 7, None, ()),
    "one segment, leak-free": ({}, 7, None, ()),
    "one segment, off": ({"context_mode": "none", "single_segment": "off"}, 7, None, ()),
    "no tokens": ({"recurrence_len": 2}, 0, None, ()),
    "num_segments": ({"segment_len": None, "num_segments": 6, "context_mode": "causal_gi"}, 50, None, ()),
    "packed, off": ({"single_segment": "off", "context_mode": "none"}, 40, (0, 6, 30, 40), ()),
    "no slots": ({"use_global": False, "use_local": False, "recurrence_len": 8}, 40, None, ()),
    "local only": ({"use_global": False, "context_mode": "causal_gi"}, 40, None, ()),
    "empty zero, recurrence, masked": (
        {"empty": "zero", "recurrence_len": 6, "context_mode": "causal_gi"},
        64,
        None,
        (*range(12, 35), 60),
    ),
    "empty uniform, masked": ({"empty": "uniform", "context_mode": "none"}, 48, None, tuple(range(8, 30))),
}


def errors(dtype: torch.dtype) -> dict[str, dict[str, tuple[float, float]]]:
    """Per case and result: error of the ranks and of one process, against float64, over max(1, largest entry)."""
    return {name: _errors(*case, dtype) for name, case in CASES.items()}


def _errors(
    fields: dict[str, Any], length: int, offsets: tuple[int, ...] | None, masked: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    torch.manual_seed(0)
    config = HiCIConfig(**{**SIZES, **fields})
    layer = HiCIAttention(H, HQ, HKV, D, config, rope=Rope.from_theta(100.0, D), qk_norm_eps=1e-6)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape) * (0.25 if p.dim() > 1 else 1.0))
    layer.to(dtype)
    batch = 1 if offsets else 2
    hidden = torch.randn(batch, length, H, dtype=dtype)
    upstream = torch.randn(batch, length, H, dtype=dtype)
    cu = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    mask = torch.ones(batch, length, dtype=torch.bool) if masked else None
    if mask is not None:
        mask[-1, list(masked)] = False

    whole = hidden.clone().requires_grad_()
    out = layer(whole, attention_mask=mask, cu_seqlens=cu)
    out.backward(upstream)
    expected = {"out": out.detach(), "hidden": whole.grad}
    expected |= {name: p.grad for name, p in layer.named_parameters()}
    truth = copy.deepcopy(layer).double()
    truth.zero_grad(set_to_none=True)
    wide = hidden.detach().clone().double().requires_grad_()
    exact = {"out": truth(wide, attention_mask=mask, cu_seqlens=cu)}
    exact["out"].backward(upstream.double())
    exact |= {"hidden": wide.grad} | {name: p.grad for name, p in truth.named_parameters()}
    own = {name: 0.0 if x is None else _difference(x.detach(), expected[name]) for name, x in exact.items()}
    layer.zero_grad(set_to_none=True)

    exchange = ContextParallel(config)
    plan = exchange.split(length, cu)
    apply_context_parallel(layer, exchange)
    mine = exchange.shard(hidden).clone().requires_grad_()
    part = layer(mine, attention_mask=None if mask is None else exchange.shard(mask))
    part.backward(exchange.shard(upstream))
    counted = dict(exchange.traffic.bytes)
    exchange.sum_gradients(layer.parameters())
    found = {"out": part.detach(), "hidden": mine.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    exact |= {name: exchange.shard(exact[name].detach()) for name in ("out", "hidden")}
    differences = {name: (_difference(exact[name], x), own[name]) for name, x in found.items()}
    if mask is None:
        sizes = {"hidden_size": H, "num_kv_heads": HKV, "head_dim": D, "dtype": dtype, "batch": batch}
        foreseen = layer_traffic(plan, config, **sizes)
        alone = length and len(plan.spans) == 1 and offsets is None and config.context_mode == "causal_shift"
        # the first rank receives no recurrence forward, the last none backward
        for key, rank in (("recurrence forward", 0), ("recurrence backward", exchange.ranks - 1)):
            if exchange.rank == rank:
                foreseen.pop(key, None)
        assert counted == ({} if alone else foreseen), (counted, foreseen)
    remove_context_parallel(layer)
    assert layer.exchange is None
    return differences


def _difference(expected: torch.Tensor | None, found: torch.Tensor) -> float:
    if expected is None:
        expected = torch.zeros_like(found)
    if not expected.numel():
        return 0.0
    assert expected.shape == found.shape and found.isfinite().all()
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1.0))
