"""global_stats: cases.

FLOPs: 6 per element (sum, maximum, minimum, deviation, square, sum). Bytes: local once, statistics out. The operation
is bound by memory: the share of the roofline is a share of copy bandwidth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.global_stats.api import global_stats
from .case import Baseline, Case, Inputs, Outputs
from .shapes import drawn

REAL, LARGE = "4 segments of a 7B layer", "256 MiB"
#: beside the large case, in every round: a machine's memory may be twice as fast a minute later
COPY = "copy, as many bytes read and written"


def make(name: str, b: int, n: int, m: int, h: int, dtype: torch.dtype, causal: bool, *, backward: bool = True) -> Case:
    size = torch.finfo(dtype).bits // 8

    def call(x: Inputs, impl: str | None) -> Outputs:
        return (global_stats(x["local"], causal=causal, impl=impl),)

    def plain(x: Inputs) -> Outputs:
        return statistics(x["local"], shared_ties=False)

    def statistics(local: Tensor, *, shared_ties: bool) -> Outputs:
        ends = range(1, n + 1) if causal else [n]
        rows = []
        for end in ends:
            flat = local[:, :end].reshape(b, end * m, h)
            mean = flat.mean(1)
            std = flat.std(1, correction=0).clamp(min=1e-6)
            unit = mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            if shared_ties:
                largest, smallest = flat.amax(1), flat.amin(1)
            else:  # amax would share the gradient among equal entries, of which bfloat16 has many; ours is the first's
                largest = flat.gather(1, flat.argmax(1, keepdim=True))[:, 0]
                smallest = flat.gather(1, flat.argmin(1, keepdim=True))[:, 0]
            rows.append(torch.stack((mean, largest, smallest, std, unit), 1))
        return (torch.stack(rows, 1) if causal else rows[0],)

    def halves(x: Inputs) -> Inputs:
        moved = size * b * h * (n * m + 5 * (n if causal else 1)) // 2
        source = x["local"].view(torch.uint8).flatten()[:moved]
        return {"from": source, "to": torch.empty_like(source)}

    baselines = {"amax, ties share gradient": Baseline(lambda x: statistics(x["local"], shared_ties=True))}
    if name == LARGE:
        baselines[COPY] = Baseline(lambda x: (x["to"].copy_(x["from"]),), prepare=halves)
    return Case(
        op="global_stats",
        name=name,
        dtype=dtype,
        shape=f"batch {b}, {n} segments, {m} slots, H {h}, {'causal' if causal else 'shared'}",
        inputs=lambda: {"local": drawn(dtype, 0, b, n, m, h)},
        call=call,
        plain=plain,
        flops=6 * b * n * m * h,
        bytes=size * b * h * (n * m + 5 * (n if causal else 1)),
        differentiable=("local",) if backward else (),
        baselines=baselines,
    )


def cases(suite: str) -> list[Case]:
    both = (torch.float32, torch.bfloat16)
    real = [make(REAL, 1, 4, 8, 4096, dtype, causal) for dtype in both for causal in (False, True)]
    if suite == "quick":
        return real
    if suite == "cpu":
        segments = {dtype: (1 << 28) // (8 * 4096 * dtype.itemsize) for dtype in both}
        return [*real, *(make(LARGE, 1, n, 8, 4096, dtype, False, backward=False) for dtype, n in segments.items())]
    return [*real, make("large", 2, 64, 8, 4096, torch.float32, False)]
