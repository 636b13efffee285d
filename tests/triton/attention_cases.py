"""Calls of attention for the tests of its Triton kernels, and two plain computations of them."""

from __future__ import annotations

import math
import mmap
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from hici_cases import random_mask
from hici_oracle import column_segments
from torch import Tensor
from triton.runtime import interpreter

NAMES = ("q", "k", "v", "global_k", "global_v", "local_k", "local_v")


@dataclass(frozen=True)
class Case:
    """One call: shapes, options, and how its random contents are drawn."""

    name: str
    tokens: int = 40
    queries: int | None = None
    batch: int = 1
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 16
    segment_len: int | None = None
    recurrence_len: int = 0
    shared: int | None = None  # K, one set for all segments
    each: int | None = None  # K, one set per segment
    local: int | None = None  # M
    prefix_mask: int = 0  # its number of dimensions, 0 = None
    mask: str | None = None  # kind of random_mask
    mask_dtype: torch.dtype = torch.int64
    cu: tuple[int, ...] | None = None
    causal: bool = True
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "bshd"  # or "bhsd" (heads first in memory), "fused" (q, k, v in one tensor)
    blocks: tuple[int, int] = (16, 16)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def segments(self) -> list[tuple[list[int], int]]:
        return column_segments(self.tokens, self.segment_len, self.cu)

    def make(self, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by name in ``dtype``, options of attention)."""
        torch.manual_seed(seed)
        rng = random.Random(seed)
        (hq, hkv), d, b, s = self.heads, self.head_dim, self.batch, self.tokens
        t = s if self.queries is None else self.queries
        n = len(self.segments)
        if self.layout == "fused":
            fused = torch.randn(b, s, hq + 2 * hkv, d, dtype=torch.float64).to(self.dtype)
            q, k, v = fused.split((hq, hkv, hkv), 2)
            tensors = {"q": q[:, s - t :], "k": k, "v": v}
        else:
            shapes = {"q": (b, t, hq, d), "k": (b, s, hkv, d), "v": (b, s, hkv, d)}
            tensors = {name: self._tensor(shape) for name, shape in shapes.items()}
        for side in "kv":
            if self.shared is not None:
                tensors[f"global_{side}"] = torch.randn(b, self.shared, hkv, d).to(self.dtype)
            if self.each is not None:
                tensors[f"global_{side}"] = torch.randn(b, n, self.each, hkv, d).to(self.dtype)
            if self.local is not None:
                tensors[f"local_{side}"] = torch.randn(b, n, self.local, hkv, d).to(self.dtype)
        shape = {0: None, 1: (n,), 2: (b, n)}[self.prefix_mask]
        mask = None if self.mask is None else random_mask(rng, b, s, self.mask)
        return tensors, {
            "segment_len": self.segment_len,
            "recurrence_len": self.recurrence_len,
            "prefix_mask": None if shape is None else torch.rand(shape) < 0.5,
            "attention_mask": None if mask is None else mask.to(self.mask_dtype),
            "cu_seqlens": None if self.cu is None else torch.tensor(self.cu, dtype=torch.int32),
            "causal": self.causal,
            "scale": self.scale,
        }

    def _tensor(self, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64).to(self.dtype)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if self.layout == "bhsd" else x


def dense(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) as anyone would write it, rounding to the tensors' dtype at every step: cat, matmul, softmax, matmul.

    In float64 the oracle (it is compared with the loops of the oracle in the tests), in other dtypes the plain
    computation of the budget rule.
    """
    q, k, v = (tensors[x] for x in "qkv")
    b, t, hq, d = q.shape
    s, hkv = k.shape[1:3]
    scale = d**-0.5 if options["scale"] is None else options["scale"]
    segments = column_segments(s, options["segment_len"], options["cu_seqlens"])
    mask = options["attention_mask"]
    alive = torch.ones(b, s, dtype=torch.bool) if mask is None else mask != 0
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((b, hq, t), -math.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for i, (columns, document) in enumerate(segments):
        asked = [c for c in columns if c >= s - t]
        if not asked:
            continue
        rows = [c - (s - t) for c in asked]
        keys = list(columns)
        if i and segments[i - 1][1] == document and options["recurrence_len"]:
            keys = segments[i - 1][0][-options["recurrence_len"] :] + keys
        parts: dict[str, list[Tensor]] = {"k": [], "v": []}
        slots = 0
        for kind in ("global", "local"):
            for side in "kv":
                x = tensors.get(f"{kind}_{side}")
                if x is not None:
                    parts[side].append(x if x.ndim == 4 else x[:, i])
                    slots += x.shape[-3] * (side == "k")
        all_k = torch.cat([*parts["k"], k[:, keys]], 1).repeat_interleave(hq // hkv, 2)
        all_v = torch.cat([*parts["v"], v[:, keys]], 1).repeat_interleave(hq // hkv, 2)
        seen = torch.ones(b, len(asked), slots + len(keys), dtype=torch.bool)
        shown = options["prefix_mask"]
        if shown is not None:
            seen[:, :, :slots] &= shown[..., i].expand(b)[:, None, None]
        seen[:, :, slots:] &= alive[:, None, keys]
        if options["causal"]:
            seen[:, :, slots:] &= torch.tensor(keys)[None, :] <= torch.tensor(asked)[:, None]
        seen &= alive[:, asked, None]
        scores = (torch.einsum("bthd,bnhd->bhtn", q[:, rows], all_k) * scale).masked_fill(~seen[:, None], -math.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        out[:, rows] = torch.einsum("bhtn,bnhd->bthd", weights, all_v)
        lse[:, :, rows] = scores.logsumexp(-1).to(lse.dtype)
    return out, lse


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in tensors.items()}


def reserved(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``count`` numbers of memory that is reserved and takes room only where it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, dtype.itemsize * count, flags=flags), dtype=dtype)


def pointer(x: Tensor, offset: int = 0) -> tl.tensor:
    """A kernel argument that the interpreter takes without copying the bfloat16 it points to."""
    kind = tl.pointer_type(tl.bfloat16)
    return tl.tensor(interpreter.TensorHandle(np.array([x.data_ptr() + 2 * offset], dtype=np.uint64), kind), kind)


@contextmanager
def other_order() -> Iterator[list[tuple[int, int]]]:
    """Programs along the first axis of a grid run in another order; gives (turn, program) of all."""
    original = interpreter.interpreter_builder.set_grid_idx
    order: list[tuple[int, int]] = []

    def shuffled(x: int, y: int, z: int) -> None:
        size = interpreter.interpreter_builder.grid_dim[0]
        step = next(n for n in (7, 11, 13, 17) if size % n)
        order.append((x, (x * step + 3) % size))
        original((x * step + 3) % size, y, z)

    with mock.patch.object(interpreter.interpreter_builder, "set_grid_idx", shuffled):
        yield order


@pytest.fixture(autouse=True, scope="module")
def rounding() -> Iterator[None]:
    """float32 becomes bfloat16 to nearest even, as on a GPU: the interpreter cuts off, which doubles the error."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return original(self, source, kind)
        x = torch.from_numpy(np.atleast_1d(np.ascontiguousarray(source.data))).to(torch.bfloat16)
        bits = x.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape)
        return interpreter.TensorHandle(bits, kind.scalar)

    with mock.patch.object(interpreter.InterpreterBuilder, "cast_impl", cast):
        yield
