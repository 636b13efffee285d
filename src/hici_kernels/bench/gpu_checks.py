"""Correctness on the device, before anything is timed: every kernel against the truth in float64.

The budget, max(2 x the error of plain PyTorch, 2 eps max|truth|), is that of :mod:`hici_kernels.testing.tolerance`. A
result outside it is computed again for DRAWS draws of the same problem in all, and wrong unless the budget holds in the
median for every output and gradient, and ten times the budget in each: of few numbers the plain computation's largest
error is luck, and a small part of what it usually is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ..errors import ImplError
from ..ops.attention.api import attention
from ..ops.global_stats.api import global_stats
from ..ops.local_slots.api import local_slots
from ..testing.tolerance import budget, error
from . import gpu_hga_checks
from .case import Inputs, Outputs
from .gpu_check import ALL, Check
from .gpu_dense import dense_attention, seeded

OPS = ("attention", "local_slots", "global_stats", "hga_summaries", "hga_route", "hga_attention", "gather_rows")
DRAWS = 5


def checks(device: torch.device, ops: tuple[str, ...] = OPS) -> Iterator[Check]:
    """All problems, made one at a time."""
    of = {
        "attention": _attention,
        "local_slots": _local_slots,
        "global_stats": _global_stats,
        "hga_summaries": gpu_hga_checks.summaries,
        "hga_route": gpu_hga_checks.routes,
        "hga_attention": gpu_hga_checks.attention,
        "gather_rows": gpu_hga_checks.gathered,
    }
    for op in ops:
        yield from of[op](device)


def run_check(problem: Check, impls: list[str]) -> list[dict[str, Any]]:
    """One record per implementation: correct True or False, or None with the reason it does not serve the problem."""
    first: _Draw | None = None
    records = []
    for impl in impls:
        found: dict[str, Any] = {
            "op": problem.op,
            "case": problem.name,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "impl": impl,
        }
        try:
            # here, so that a problem the device has no memory for is a record like any other
            first = first or _Draw(problem, 0)
            draws = [first.errors(impl)]
            if 1 < _worst(draws[0])[0] < 10:
                draws += [_Draw(problem, i).errors(impl) for i in range(1, DRAWS)]
        except ImplError as refused:
            found |= {"correct": None, "error": str(refused)}
        except Exception as failed:  # a kernel that does not compile or launch is wrong; the others are still checked
            found |= {"correct": False, "error": f"{type(failed).__name__}: {failed}"}
        else:
            ratios = [[e / limit if limit else float(e > 0) for e, limit in d] for d in draws]
            usual = max(statistics.median(tensor) for tensor in zip(*ratios, strict=True))
            correct = usual <= 1 and max(map(max, ratios)) < 10
            _, e, limit = _worst(draws[0])
            found |= {"correct": correct, "error_max": e, "error_allowed": limit, "draws": len(draws), "usual": usual}
        records.append(found)
    return records


class _Draw:
    """One draw of a problem, with the truth and the plain computation."""

    def __init__(self, problem: Check, number: int) -> None:
        self.problem = problem
        self.low = {k: v.to(problem.dtype) for k, v in problem.draw(number).items()}
        wide = {k: v.double() for k, v in self.low.items()}
        self.truth = [y.double() for y in self.outputs(problem.truth, wide)]
        self.plain = self.outputs(problem.truth, self.low)

    def outputs(self, call: Callable[[Inputs], Outputs], inputs: Inputs) -> list[Tensor]:
        return _with_gradients(call, inputs) if self.problem.gradients else list(call(inputs))

    def errors(self, impl: str) -> list[tuple[float, float]]:
        """(error, budget) of every output and gradient."""
        found = self.outputs(lambda x: self.problem.call(x, impl), self.low)
        triples = zip(self.truth, self.plain, found, strict=True)
        return [(error(t, f), budget(t, p, self.problem.dtype)) for t, p, f in triples]


def _worst(errors: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(error / budget, error, budget) where their ratio is largest."""
    return max((e / limit if limit else float(e > 0), e, limit) for e, limit in errors)


def implementations(op: str, chosen: list[str] | None) -> list[str]:
    """Names to check and measure: the ones asked for, or all but the reference that can run here."""
    if chosen is not None:
        return chosen
    return [n for n in _dispatch.ORDER if n not in ("reference", "cpu") and _dispatch.load(op, n)[0] is not None]


def _with_gradients(call: Callable[[Inputs], Outputs], inputs: Inputs) -> list[Tensor]:
    """Outputs, then gradients of all inputs of sum(out_i * fixed noise_i); infinite outputs carry none."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    outs = call(leaves)
    noise = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=noise, dtype=torch.float64).to(o.device, o.dtype) for o in outs]
    weights = [torch.where(o.isfinite(), w, 0.0) for o, w in zip(outs, weights, strict=True)]
    grads = torch.autograd.grad(outs, list(leaves.values()), weights, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), grads, strict=True)]
    return [*(o.detach() for o in outs), *found]


def _attention(device: torch.device) -> Iterator[Check]:
    def problem(
        name: str,
        dtype: torch.dtype,
        *,
        b: int = 2,
        s: int = 700,
        t: int | None = None,
        d: int = 128,
        hq: int = 4,
        hkv: int = 2,
        k: int = 4,
        m: int = 8,
        n: int | None = None,
        own: bool = False,
        **options: Any,
    ) -> Check:
        options = {"segment_len": 256, **options}
        segments = -(-s // options["segment_len"]) if n is None else n

        def draw(number: int) -> Inputs:
            normal = seeded(s + d + 10000 * number, device)
            x = {"q": normal(b, t or s, hq, d), "k": normal(b, s, hkv, d), "v": normal(b, s, hkv, d)}
            if k:
                shape = (b, segments, k, hkv, d) if own else (b, k, hkv, d)
                x |= {"global_k": normal(*shape), "global_v": normal(*shape)}
            if m:
                x |= {"local_k": normal(b, segments, m, hkv, d), "local_v": normal(b, segments, m, hkv, d)}
            return x

        def call(x: Inputs, impl: str) -> Outputs:
            return attention(**x, **options, return_lse=True, impl=impl)

        return Check("attention", name, dtype, draw, call, lambda x: dense_attention(x, options))

    for dtype in ALL:
        for d in (64, 80, 96, 128, 256):
            yield problem(f"D {d}", dtype, d=d)
    left = torch.ones(2, 700, device=device)
    left[0, :300] = 0
    holes = (torch.rand(2, 700, generator=torch.Generator().manual_seed(1)) > 0.4).to(device)
    packed = torch.tensor([0, 300, 301, 700], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        yield problem("full", dtype, causal=False)
        yield problem("one segment", dtype, segment_len=700)
        yield problem("no slots", dtype, k=0, m=0)
        yield problem("17 slots, one set of globals per segment", dtype, k=9, own=True)
        yield problem("one kv head, own scale", dtype, hkv=1, scale=0.2)
        yield problem("prefix_mask", dtype, prefix_mask=torch.tensor([[False, True, True]] * 2, device=device))
        yield problem("recurrence", dtype, recurrence_len=100)
        yield problem("left padding", dtype, attention_mask=left)
        yield problem("holes", dtype, attention_mask=holes, recurrence_len=30)
        yield problem("packed", dtype, b=1, n=5, cu_seqlens=packed)
        yield problem("the last 5 positions", dtype, t=5)
        yield problem("one token", dtype, s=1)
        yield problem("segments of 4096", dtype, b=1, s=4500, hq=2, hkv=1, segment_len=4096)


def _local_slots(device: torch.device) -> Iterator[Check]:
    def problem(
        name: str,
        dtype: torch.dtype,
        *,
        b: int = 2,
        s: int = 700,
        h: int = 512,
        e: int = 256,
        m: int = 8,
        heads: int = 8,
        **options: Any,
    ) -> Check:
        options = {"segment_len": 256, **options}

        def draw(number: int) -> Inputs:
            normal = seeded(s + h + 10000 * number, device)
            return {
                "hidden": normal(b, s, h),
                "slot_queries": normal(m, e),
                "k_weight": normal(e, h) / h**0.5,
                "v_weight": normal(e, h) / h**0.5,
            }

        def call(x: Inputs, impl: str) -> Outputs:
            return (local_slots(**x, num_heads=heads, **options, impl=impl),)

        return Check("local_slots", name, dtype, draw, call, lambda x: call(x, "reference"))

    holes = (torch.rand(2, 700, generator=torch.Generator().manual_seed(2)) > 0.4).to(device)
    empty = torch.ones(2, 700, device=device)
    empty[0, 256:512] = 0
    for dtype in ALL:
        yield problem("real widths", dtype, b=1, s=1100, h=4096, e=512)
    for dtype in (torch.bfloat16, torch.float32):
        yield problem("ragged", dtype)
        yield problem("odd widths", dtype, h=328, e=120, m=5, heads=3)
        yield problem("many heads and slots", dtype, m=16, heads=32)
        yield problem("holes", dtype, attention_mask=holes)
        yield problem("an empty segment", dtype, attention_mask=empty, empty="uniform")
        yield problem("packed", dtype, b=1, cu_seqlens=torch.tensor([0, 300, 301, 700], dtype=torch.int32))


def _global_stats(device: torch.device) -> Iterator[Check]:
    def problem(name: str, dtype: torch.dtype, shape: tuple[int, ...], **options: Any) -> Check:
        def draw(number: int) -> Inputs:
            return {"local": seeded(sum(shape) + 10000 * number, device)(*shape)}

        def call(x: Inputs, impl: str) -> Outputs:
            return (global_stats(**x, **options, impl=impl),)

        return Check("global_stats", name, dtype, draw, call, lambda x: call(x, "reference"))

    valid = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]], device=device)
    for dtype in ALL:
        yield problem("real shape", dtype, (1, 4, 8, 4096))
        yield problem("real shape, causal", dtype, (1, 4, 8, 4096), causal=True)
    for dtype in (torch.bfloat16, torch.float32):
        yield problem("odd width", dtype, (2, 5, 3, 333))
        yield problem("left out", dtype, (2, 5, 8, 512), valid=valid)
        yield problem("left out, causal", dtype, (2, 5, 8, 512), valid=valid, causal=True)
        yield problem(
            "packed",
            dtype,
            (1, 7, 8, 512),
            cu_segments=torch.tensor([0, 3, 7], dtype=torch.int32, device=device),
            causal=True,
        )
        yield problem("many segments", dtype, (1, 600, 8, 512))
