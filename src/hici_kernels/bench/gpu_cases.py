"""What is measured on a GPU: layers of real models and segments of 1K to 16K, and what each is compared with.

FLOPs and bytes of the forward pass are those of the modules ``attention``, ``local_slots`` and ``global_stats`` beside
this one. Backward: attention 2.5 times its forward (five products for two); local_slots twice; bytes: every input and
output once more, and every gradient once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.attention.api import attention
from ..ops.global_stats.api import global_stats
from ..ops.local_slots.api import local_slots
from .attention import K, M, pairs
from .case import Inputs, Outputs
from .gpu_attention import BASELINES
from .gpu_case import Baseline, GpuCase, Work
from .gpu_hga_cases import hga_cases
from .shapes import Layer

LLAMA2_7B = Layer("Llama-2-7B", 4096, 32, 32, 128)
LLAMA3_8B = Layer("Llama-3-8B", 4096, 32, 8, 128)
QWEN3_8B = Layer("Qwen3-8B", 4096, 32, 8, 128)
MODELS = ((LLAMA2_7B, 16384, 4096), (LLAMA3_8B, 32768, 8192), (QWEN3_8B, 49152, 12288))
SEGMENTS = (1024, 2048, 4096, 8192, 16384)


def cases(ops: list[str] | None = None, dtype: torch.dtype = torch.bfloat16) -> list[GpuCase]:
    """All that ``hici bench --suite gpu`` measures."""
    found = [attention_case(layer, s, length, dtype, f"{layer.name} {s // 1024}K") for layer, s, length in MODELS]
    found += [attention_case(LLAMA3_8B, 16384, length, dtype, f"segments of {length // 1024}K") for length in SEGMENTS]
    found += [slots_case(layer, s, length, dtype) for layer, s, length in MODELS]
    found += [
        stats_case("4 segments of a 7B layer", 4, dtype, False),
        stats_case("4 segments of a 7B layer", 4, dtype, True),
        stats_case("256 MiB", 4096, dtype, False),
        stats_case("256 MiB", 4096, dtype, True),
        *hga_cases(dtype),
    ]
    return [c for c in found if ops is None or c.op in ops]


def attention_case(layer: Layer, s: int, segment_len: int, dtype: torch.dtype, name: str, b: int = 1) -> GpuCase:
    """Causal, K global and M local slots."""
    hq, hkv, d = layer.hq, layer.hkv, layer.d
    n = -(-s // segment_len)
    size = torch.finfo(dtype).bits // 8
    tokens, slots = b * s * 2 * (hq + hkv) * d, b * 2 * hkv * d * (K + n * M)
    with_slots = 4 * d * hq * b * pairs(s, segment_len, K + M)
    without = 4 * d * hq * b * pairs(s, segment_len, 0)
    options: dict[str, Any] = {"segment_len": segment_len}

    def inputs(device: torch.device) -> Inputs:
        normal = _random(device, dtype)
        x = {"q": normal(b, s, hq, d), "k": normal(b, s, hkv, d), "v": normal(b, s, hkv, d)}
        for kind, shape in (("global", (b, K, hkv, d)), ("local", (b, n, M, hkv, d))):
            x |= {f"{kind}_{side}": normal(*shape) for side in "kv"}
        return x

    def call(x: Inputs, impl: str) -> Outputs:
        return (attention(**x, **options, impl=impl),)

    def arguments(x: Inputs) -> tuple[Any, ...]:
        slots = (x["global_k"], x["global_v"], x["local_k"], x["local_v"])
        return (x["q"], x["k"], x["v"], segment_len, 0, *slots, None, None, None, True, d**-0.5)

    return GpuCase(
        op="attention",
        name=name,
        shape=f"batch {b}, {s} tokens, segments of {segment_len}, {hq}/{hkv} heads, D {d}, {K}+{M} slots, causal",
        dtype=dtype,
        inputs=inputs,
        options=options,
        call=call,
        forward=Work(with_slots, size * (tokens + slots)),
        # reads q, k, v, out, grad_out and the slots, writes the gradients of q, k, v and the slots
        backward=Work(5 * with_slots // 2, size * (tokens + b * s * (2 * hq + 2 * hkv) * d + 2 * slots)),
        baselines={
            label: Baseline(prepare, with_slots if same else without, same)
            for label, (prepare, same) in BASELINES.items()
        },
        arguments=arguments,
    )


def slots_case(
    layer: Layer, s: int, segment_len: int, dtype: torch.dtype, width: int = 512, heads: int = 8, b: int = 1
) -> GpuCase:
    """The published constructor: M slots, bottleneck ``width``."""
    h, n = layer.hidden, -(-s // segment_len)
    size = torch.finfo(dtype).bits // 8
    weights = 2 * width * h + M * width
    flops = 4 * b * s * width * (h + M)

    def inputs(device: torch.device) -> Inputs:
        normal = _random(device, dtype)
        return {
            "hidden": normal(b, s, h),
            "slot_queries": normal(M, width),
            "k_weight": normal(width, h) / h**0.5,
            "v_weight": normal(width, h) / h**0.5,
        }

    def call(x: Inputs, impl: str) -> Outputs:
        return (local_slots(**x, num_heads=heads, segment_len=segment_len, impl=impl),)

    def arguments(x: Inputs) -> tuple[Any, ...]:
        return (*x.values(), heads, segment_len, n, None, None, "zero")

    def sequence(x: Inputs, options: dict[str, Any]) -> tuple[Callable[[], Outputs], list[Tensor]]:
        leaves = {k: v.detach().requires_grad_() for k, v in x.items()}
        return lambda: (_projected(leaves, heads, segment_len),), list(leaves.values())

    return GpuCase(
        op="local_slots",
        name=f"{layer.name} {s // 1024}K",
        shape=f"batch {b}, {s} tokens, segments of {segment_len}, H {h}, E {width}, {heads} heads, M {M}",
        dtype=dtype,
        inputs=inputs,
        options={"segment_len": segment_len, "num_heads": heads},
        call=call,
        forward=Work(flops, size * (b * s * h + weights + b * n * M * width)),
        backward=Work(2 * flops, size * (2 * b * s * h + 2 * weights + b * n * M * width)),
        baselines={"reference's sequence": Baseline(sequence, flops)},
        arguments=arguments,
    )


def stats_case(name: str, n: int, dtype: torch.dtype, causal: bool, m: int = 8, h: int = 4096, b: int = 1) -> GpuCase:
    """Five statistics of n segments of m slots."""
    size = torch.finfo(dtype).bits // 8
    rows, outs = b * n * m * h, 5 * b * h * (n if causal else 1)

    def call(x: Inputs, impl: str) -> Outputs:
        return (global_stats(**x, causal=causal, impl=impl),)

    def sequence(x: Inputs, options: dict[str, Any]) -> tuple[Callable[[], Outputs], list[Tensor]]:
        local = x["local"].detach().requires_grad_()
        return lambda: (_statistics(local, causal),), [local]

    return GpuCase(
        op="global_stats",
        name=f"{name}, {'causal' if causal else 'shared'}",
        shape=f"batch {b}, {n} segments, {m} slots, H {h}: {size * rows / 2**20:.3g} MiB",
        dtype=dtype,
        inputs=lambda device: {"local": _random(device, dtype)(b, n, m, h)},
        options={"causal": causal},
        call=call,
        forward=Work(6 * rows, size * (rows + outs)),
        backward=Work(6 * rows, size * (2 * rows + outs)),
        baselines={"reference's sequence": Baseline(sequence, 6 * rows)},
        arguments=lambda x: (x["local"], causal, None, None),
    )


def _projected(x: Inputs, heads: int, segment_len: int) -> Tensor:
    """Keys and values of all tokens, then attention of the slots: the published order of operations."""
    hidden, q = x["hidden"], x["slot_queries"]
    b, s, _ = hidden.shape
    m, e = q.shape
    cut = (b * s // segment_len, segment_len, heads, e // heads)
    k = (hidden @ x["k_weight"].T).view(cut).transpose(1, 2).contiguous()
    v = (hidden @ x["v_weight"].T).view(cut).transpose(1, 2).contiguous()
    queries = q.view(m, heads, -1).transpose(0, 1)
    scores = (queries @ k.transpose(2, 3)) * (e // heads) ** -0.5
    out = torch.softmax(scores, -1) @ v
    return out.transpose(1, 2).reshape(b, s // segment_len, m, e)


def _statistics(local: Tensor, causal: bool) -> Tensor:
    """The published formulas, the causal variance from the mean of squares included."""
    n, m = local.shape[1:3]
    if not causal:
        flat = local.flatten(1, 2)
        mean = flat.mean(1)
        std = flat.float().std(1, unbiased=False).clamp_min(1e-6).to(local.dtype)
        rows = (mean, flat.amax(1), flat.amin(1), std, mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-6))
        return torch.stack(rows, 1)
    count = torch.arange(1, n + 1, device=local.device)[:, None] * m
    mean = local.sum(2).cumsum(1) / count
    square = local.float().square().sum(2).cumsum(1) / count
    std = (square - mean.float().square()).clamp_min(1e-12).sqrt().to(local.dtype)
    top, low = local.amax(2).cummax(1).values, local.amin(2).cummin(1).values
    return torch.stack((mean, top, low, std, mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-6)), 2)


def _random(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
