"""global_stats in Triton: one pass over the rows, summaries merged by Chan's rule, no difference of large sums.

Launches: shared, 2 (statistics of each channel; the normalised mean, whose norm needs all channels), 3 where there are
so many rows that a set is cut into splits. Causal, 2; with many segments 4: the summaries of pieces of the sequence,
their running merge, the statistics of every segment from there, the normalised means. Backward, which keeps nothing of
the forward pass: shared 3, causal 2 to 4.

Bytes: shared forward reads ``local`` once, causal forward once (twice with pieces); backward reads it twice. Besides,
28 bytes per channel and split, piece or (causal backward) segment.

Deterministic: no atomics, splits and blocks of channels merged in order. float32, bfloat16, float16, sums in float32;
not float64. The causal backward walks over all segments of a row in one program per block of channels: made for the
tens of segments a sequence has, slow for thousands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ..._triton import rejects_device
from ...segments import document_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rejects(local: Tensor, *rest: Any) -> str | None:
    from .triton_forward import INTERPRET

    if local.dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, local is {local.dtype}"
    foreign = rejects_device("local", local, INTERPRET.value)
    if foreign is not None:
        return foreign
    if local.shape[1] * local.shape[2] >= 2**31 - 2**16:
        return f"it serves fewer than 2^31 slots per batch row, local has shape {tuple(local.shape)}"
    return None


def power(value: int, low: int, high: int) -> int:
    """The smallest power of two in [low, high] that is at least ``value``, or ``high``."""
    return min(max(1 << max(value - 1, 0).bit_length(), low), high)


def programs(device: torch.device) -> int:
    """How many programs keep a device's memory busy."""
    return 4 * tuning.multiprocessors(device)


class Problem:
    """The arguments of one call and how they are cut."""

    def __init__(self, op: str, local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> None:
        self.local = local
        self.b, self.n, self.m, self.h = local.shape
        self.valid = None if valid is None else valid.contiguous().view(torch.uint8)
        self.cu = None if cu_segments is None else cu_segments.contiguous()
        self.documents = 1 if self.cu is None else self.cu.shape[0] - 1
        arch = tuning.architecture(local.device)
        config = tuning.configuration(op, arch, head_dim=self.h, segment_len=self.n, dtype=local.dtype)
        self.options = {k: config[k] for k in ("num_warps", "num_stages")}
        self.block_h = min(config["BLOCK_H"], power(self.h, 16, 4096))
        self.chunks = -(-self.h // self.block_h)
        rows = self.m if causal else self.n * self.m
        self.block_r = min(config["BLOCK_R"], power(rows, 1, 4096))
        sets = self.b * self.documents * self.chunks
        spare = max(programs(local.device) // sets, 1)
        # a split of fewer tiles than this costs more in merging than it gains
        self.splits = max(min(spare, self.n * self.m // (8 * self.block_r), 64), 1)
        self.pieces = max(min(max(programs(local.device) // (self.b * self.chunks), 1), self.n // 16, 64), 1)
        self.starts = None
        if causal and self.cu is not None:
            self.starts = self.cu[document_of(self.cu, self.n)].contiguous()

    @property
    def flags(self) -> dict[str, Any]:
        return {
            "BLOCK_R": self.block_r,
            "BLOCK_H": self.block_h,
            "VALID": self.valid is not None,
            "PACKED": self.cu is not None,
            **self.options,
        }

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.local.stride()[:3], self.n, self.m, self.h)

    def floats(self, *shape: int) -> Tensor:
        return self.local.new_empty(shape, dtype=torch.float32)

    def summaries(self, count: int) -> tuple[Tensor, Tensor]:
        return self.floats(count, 8, self.h), self.local.new_empty(count, dtype=torch.int32)

    def split(self, indices: bool, out: Tensor, scratch: Tensor, squares: Tensor, final: bool) -> tuple[Tensor, Tensor]:
        """Shared statistics of every split, or (``final``: one split) of every set into ``out``."""
        from .triton_forward import shared_stats

        parts, counts = self.summaries(0 if final else self.b * self.documents * self.splits)
        shared_stats[(self.chunks * self.splits * self.b * self.documents,)](
            self.local,
            self.valid,
            self.cu,
            out,
            scratch,
            squares,
            parts,
            counts,
            *self.shape,
            self.documents,
            self.splits,
            STAGES=self.options["num_stages"],
            FINAL=final,
            INDICES=indices,
            **self.flags,
        )
        return parts, counts

    def scan(self, emit: str, grad: Tensor, out: Tensor, scratch: Tensor, squares: Tensor, dots: Tensor) -> Any:
        """Causal statistics of every segment: into ``out`` (emit "stats"), or summaries (emit "gradient")."""
        from .triton_forward import carry_stats, causal_stats

        indices = emit == "gradient"
        carry, carry_counts = self.summaries(0)

        def walk(what: str, parts: Tensor, counts: Tensor) -> None:
            causal_stats[(self.chunks * self.pieces * self.b,)](
                self.local,
                self.valid,
                self.starts,
                grad,
                out,
                scratch,
                squares,
                dots,
                parts,
                counts,
                carry,
                carry_counts,
                *self.shape,
                self.pieces,
                STAGES=1,
                EMIT=what,
                CARRY=self.pieces > 1 and what != "piece",
                INDICES=indices,
                **self.flags,
            )

        if self.pieces > 1:
            parts, counts = self.summaries(self.b * self.pieces)
            walk("piece", parts, counts)
            carry, carry_counts = self.summaries(self.b * self.pieces)
            carry_stats[(self.chunks * self.b,)](
                self.starts,
                parts,
                counts,
                carry,
                carry_counts,
                self.n,
                self.h,
                self.pieces,
                BLOCK_H=self.block_h,
                PACKED=self.cu is not None,
                INDICES=indices,
                num_warps=self.options["num_warps"],
                num_stages=1,
            )
        parts, counts = self.summaries(self.b * self.n if indices else 0)
        walk(emit, parts, counts)
        return parts, counts


def forward(local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> Tensor:
    """[B, 5, H] or [B, N, 5, H]; with ``cu_segments`` [docs, 5, H] or [1, N, 5, H]."""
    b, n, _, h = local.shape
    if causal:
        out = local.new_empty((b, n, 5, h))
    else:
        out = local.new_empty((b if cu_segments is None else cu_segments.shape[0] - 1, 5, h))
    if out.numel() == 0 or b == 0 or n == 0:
        return out.zero_()
    with torch.cuda.device_of(local):
        return _forward(Problem("global_stats", local, causal, valid, cu_segments), causal, out)


def _forward(x: Problem, causal: bool, out: Tensor) -> Tensor:
    from .triton_forward import merge_stats, normalise_mean

    sets = out.numel() // (5 * x.h)
    scratch, squares = x.floats(sets, x.h), x.floats(sets, x.chunks)
    if causal:
        x.scan("stats", out, out, scratch, squares, squares)
    else:
        final = x.splits == 1
        parts, counts = x.split(False, out, scratch, squares, final)
        if not final:
            merge_stats[(x.chunks * sets,)](
                out,
                scratch,
                squares,
                parts,
                counts,
                x.h,
                x.splits,
                BLOCK_H=x.block_h,
                num_warps=x.options["num_warps"],
                num_stages=1,
            )
    block = power(x.h, 16, 1024)
    normalise_mean[(-(-x.h // block) * sets,)](
        out,
        scratch,
        squares,
        x.h,
        x.chunks,
        BLOCK_H=block,
        BLOCK_K=power(x.chunks, 1, 1 << 30),
        num_warps=4,
        num_stages=1,
    )
    return out


def backward(grad_out: Tensor, local: Tensor, causal: bool, valid: Tensor | None, cu_segments: Tensor | None) -> Tensor:
    """Gradient of ``local``, contiguous."""
    if local.numel() == 0 or grad_out.numel() == 0:
        return torch.zeros_like(local, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(local):
        return _backward(
            Problem("global_stats_backward", local, causal, valid, cu_segments), causal, grad_out.contiguous()
        )


def _backward(x: Problem, causal: bool, grad: Tensor) -> Tensor:
    from .triton_backward import causal_gradients, merge_summaries, shared_gradients

    sets = grad.numel() // (5 * x.h)
    squares, dots = x.floats(sets, x.chunks), x.floats(sets, x.chunks)
    dx = x.local.new_empty(x.local.shape)
    block_k = power(x.chunks, 1, 1 << 30)
    if causal:
        parts, counts = x.scan("gradient", grad, grad, squares, squares, dots)
        causal_gradients[(x.chunks * x.b,)](
            x.local,
            x.valid,
            x.starts,
            grad,
            parts,
            counts,
            squares,
            dots,
            dx,
            *x.shape,
            x.chunks,
            BLOCK_K=block_k,
            **x.flags,
        )
        return dx
    parts, counts = x.split(True, grad, squares, squares, False)
    merged, merged_counts = x.summaries(sets)
    merge_summaries[(x.chunks * sets,)](
        grad,
        parts,
        counts,
        merged,
        merged_counts,
        squares,
        dots,
        x.h,
        x.splits,
        BLOCK_H=x.block_h,
        num_warps=x.options["num_warps"],
        num_stages=1,
    )
    shared_gradients[(x.chunks * x.splits * sets,)](
        x.local,
        x.valid,
        x.cu,
        grad,
        merged,
        merged_counts,
        squares,
        dots,
        dx,
        *x.shape,
        x.documents,
        x.splits,
        x.chunks,
        BLOCK_K=block_k,
        STAGES=x.options["num_stages"],
        **x.flags,
    )
    return dx
