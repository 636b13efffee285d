"""attention in Triton: the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ... import tuning
from .triton import descriptors, slot_strides
from .triton_backward import grad_keys, grad_queries, query_rows
from .triton_backward_slots import sum_segments, sum_tiles
from .triton_schedule import Cut, Tiles

# Slots per step: the least a matrix instruction takes.
SLOTS = 16
# Of the kernels that only move bytes: rows, tiles and segments a program has in flight.
ROWS, TILES, SEGMENTS, COLUMNS = 32, 32, 32, 128


def backward(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of (q, k, v, global_k, global_v, local_k, local_v), each in its input's dtype and contiguous.

    Args:
        grad_out: [B, T, Hq, D]; grad_lse: [B, Hq, T], or empty = 0; out, lse: what forward returned.
        arguments: as the operation's schema up to ``scale``. An absent input gives an empty tensor.

    float32, bfloat16, float16. Products take operands in the inputs' dtype (P and dS are rounded to it) and sum in
    float32; sums over tiles, heads and segments are float32. Deterministic: no atomics, every sum in a fixed order.
    Temporary memory: 8 bytes per query and head, and 8 (K + M) D bytes per query tile and head. Nothing is read back
    from the device.
    """
    inputs = [arguments[i] for i in (0, 1, 2, 5, 6, 7, 8)]
    q = arguments[0]
    if q.numel() == 0:
        return tuple(grad_out.new_empty(0) if x is None else torch.zeros_like(x) for x in inputs)
    with torch.cuda.device_of(q):
        found = _Call(grad_out, grad_lse, out, lse, *arguments).gradients()
    return tuple(grad_out.new_empty(0) if g is None else g for g in found)


class _Call:
    """The arguments of one call, and the buffers its kernels share."""

    def __init__(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segment_len: int,
        recurrence_len: int,
        global_k: Tensor | None,
        global_v: Tensor | None,
        local_k: Tensor | None,
        local_v: Tensor | None,
        prefix_mask: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        causal: bool,
        scale: float,
    ) -> None:
        self.grad_out, self.grad_lse, self.out, self.lse = dense(grad_out), grad_lse, dense(out), lse
        self.q, self.k, self.v = dense(q), dense(k), dense(v)
        self.b, self.t, self.heads, self.d = q.shape
        self.s, self.kv_heads = k.shape[1], k.shape[2]
        self.group = self.heads // self.kv_heads
        self.causal, self.scale, self.fused = causal, scale, q.dtype != torch.float32
        self.inputs = (global_k, global_v, local_k, local_v)
        self.shared = global_k is not None and global_k.ndim == 4
        cu = None if cu_seqlens is None else cu_seqlens.to(q.device, non_blocking=True)
        self.cut = Cut.of(q, k, segment_len, recurrence_len, cu, (global_k, local_k, prefix_mask))
        self.global_slots = 0 if global_k is None else global_k.shape[-3]
        self.local_slots = 0 if local_k is None else local_k.shape[-3]
        self.prefix = None
        if prefix_mask is not None and self.global_slots + self.local_slots:
            self.prefix = prefix_mask.view(torch.uint8)
        self.keep = None
        if attention_mask is not None:
            self.keep = (attention_mask != 0).contiguous().view(torch.uint8)
        self.delta = q.new_empty((self.b, self.heads, self.t), dtype=torch.float32)
        self.level = torch.empty_like(self.delta)
        self.segment_len = segment_len

    def configuration(self, table: str) -> dict[str, int]:
        arch = tuning.architecture(self.q.device)
        return tuning.configuration(
            table, arch, head_dim=self.d, segment_len=self.segment_len or self.s, dtype=self.q.dtype
        )

    @property
    def widths(self) -> dict[str, int]:
        return {"HEAD_DIM": self.d, "BLOCK_D": padded(self.d)}

    def gradients(self) -> tuple[Tensor | None, ...]:
        self._query_rows()
        dk, dv = self._keys()
        dq, parts, tiles, size = self._queries()
        return dq, dk, dv, *self._slots(parts, tiles, size)

    def _query_rows(self) -> None:
        through_lse = self.grad_lse.numel() > 0
        query_rows[(self.b * self.heads * triton.cdiv(self.t, ROWS),)](
            self.out,
            self.grad_out,
            self.lse,
            self.grad_lse,
            self.delta,
            self.level,
            *self.out.stride()[:3],
            *self.grad_out.stride()[:3],
            *self.lse.stride(),
            *(self.grad_lse.stride() if through_lse else (0, 0, 0)),
            self.heads,
            self.t,
            **self.widths,
            BLOCK_M=ROWS,
            HAS_LSE_GRADIENT=through_lse,
            FUSED=self.fused,
            num_warps=4,
        )

    def _descriptors(self, config: dict[str, int], x: Tensor, y: Tensor, rows: str) -> tuple[Any, ...]:
        """What both kernels take first. Copies by hardware (TMA) know no masks and no columns that are not there."""
        absent = (None, None, 0, 0, 0, 0, 0, 0)
        if not config.get("TMA") or self.keep is not None or padded(self.d) != self.d:
            return absent
        return descriptors(x, y, config[rows]) or absent

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        """Packed documents that do not cover all positions leave rows that no tile writes."""
        return self.q.new_zeros(shape) if self.cut.packed else self.q.new_empty(shape)

    def _keys(self) -> tuple[Tensor, Tensor]:
        dk, dv = self._empty(tuple(self.k.shape)), self._empty(tuple(self.v.shape))
        config = self.configuration("attention_backward")
        tiles = self.cut.tiles(config["BLOCK_N"], queries=False, reverse=False)
        described = self._descriptors(config, self.q, self.grad_out, "BLOCK_M")
        if config.pop("TMA", 0) and described[0] is None:
            config["BLOCK_M"] = by_pointers(config["BLOCK_M"])
        grad_keys[(tiles.count * self.b * self.kv_heads,)](
            *described,
            self.q,
            self.k,
            self.v,
            self.grad_out,
            self.level,
            self.delta,
            self.q if self.keep is None else self.keep,
            dk,
            dv,
            *self.q.stride()[:3],
            *self.k.stride()[:3],
            *self.v.stride()[:3],
            *self.grad_out.stride()[:3],
            self.kv_heads,
            self.group,
            self.t,
            self.cut.first_query,
            self.scale,
            tiles.count,
            **tiles.arguments,
            **self.widths,
            CAUSAL=self.causal,
            FUSED=self.fused,
            RECURRENT=self.cut.recurrence_len > 0,
            HAS_MASK=self.keep is not None,
            PACKED=self.cut.packed,
            **config,
        )
        return dk, dv

    def _queries(self) -> tuple[Tensor, Tensor, Tiles, int]:
        """dq; parts of the slots' gradients; the tiles those belong to and their size."""
        dq = self._empty(tuple(self.q.shape))
        slots = self.global_slots + self.local_slots
        config = self.configuration("attention_backward_dq")
        if self.keep is not None and slots and self.q.element_size() == 2 and padded(self.d) == 128:
            # with both, releases of Triton before 3.9 need more shared memory than chips of compute capability 8 have
            config["BLOCK_M"] = max(config["BLOCK_M"] // 2, 16)
            config["num_warps"] = max(1, min(config["num_warps"], config["BLOCK_M"] // 8))
        tiles = self.cut.tiles(config["BLOCK_M"], reverse=self.causal, runs=slots > 0)
        parts = self.delta.new_empty((self.b, self.heads, tiles.count, 2, slots, self.d))
        # a tensor without elements has no memory to point at
        given = [x if x is not None and x.shape[-3] else None for x in self.inputs]
        strides = [slot_strides(x) for x in given]
        described = self._descriptors(config, self.k, self.v, "BLOCK_N")
        config.pop("TMA", 0)
        grad_queries[(tiles.count * self.b * self.heads,)](
            *described,
            self.q,
            self.k,
            self.v,
            self.grad_out,
            self.level,
            self.delta,
            self.q if self.keep is None else self.keep,
            *(self.q if x is None else x for x in given),
            self.q if self.prefix is None else self.prefix,
            dq,
            parts if slots else self.delta,
            *self.q.stride()[:3],
            *self.k.stride()[:3],
            *self.v.stride()[:3],
            *self.grad_out.stride()[:3],
            *(n for four in strides for n in four),
            *self._prefix_strides(),
            self.global_slots,
            self.local_slots,
            self.heads,
            self.group,
            self.t,
            self.cut.first_query,
            self.scale,
            tiles.count,
            **tiles.arguments,
            **self.widths,
            SLOTS=SLOTS,
            CAUSAL=self.causal,
            FUSED=self.fused,
            HAS_GLOBAL=given[0] is not None,
            HAS_LOCAL=given[2] is not None,
            HAS_PREFIX=self.prefix is not None,
            HAS_MASK=self.keep is not None,
            PACKED=self.cut.packed,
            **config,
        )
        return dq, parts, tiles, config["BLOCK_M"]

    def _prefix_strides(self) -> tuple[int, int]:
        if self.prefix is None:
            return 0, 0
        return (0 if self.prefix.ndim == 1 else self.prefix.stride(0)), self.prefix.stride(-1)

    def _slots(self, parts: Tensor, tiles: Tiles, size: int) -> list[Tensor | None]:
        found = [None if x is None else x.new_empty(x.shape) for x in self.inputs]
        segments, slots = self.cut.segments, self.global_slots + self.local_slots
        if not slots:
            return found
        wanted: list[Tensor | None] = list(found)
        if self.shared:
            each = (self.b, segments, self.global_slots, self.kv_heads, self.d)
            wanted[:2] = [parts.new_empty(each), parts.new_empty(each)]
        names = ("tiles_per_segment", "first_segment", "first_query", "segment_len", "tokens")
        sum_tiles[(self.b * segments * self.kv_heads * slots * 2,)](
            parts,
            self.q if self.prefix is None else self.prefix,
            *(parts if x is None else x for x in wanted),
            *self._prefix_strides(),
            self.global_slots,
            self.local_slots,
            segments,
            self.kv_heads,
            self.group,
            tiles.count,
            tiles.runs,
            **{name: tiles.arguments[name] for name in names},
            **self.widths,
            SIZE=size,
            TILES=TILES,
            HAS_PREFIX=self.prefix is not None,
            PACKED=self.cut.packed,
            REVERSE=self.causal,
            num_warps=4,
        )
        if self.shared and self.global_slots:
            row = self.global_slots * self.kv_heads * self.d
            sum_segments[(self.b * triton.cdiv(row, COLUMNS),)](
                *wanted[:2], *found[:2], segments, row, BLOCK=COLUMNS, SEGMENTS=SEGMENTS, num_warps=4
            )
        return found


def padded(head_dim: int) -> int:
    """Columns of a tile: the power of two, at least 16, that holds a head."""
    return max(triton.next_power_of_2(head_dim), 16)


def by_pointers(block: int) -> int:
    """BLOCK_M of grad_keys without the descriptors its configuration counts on: pointers take registers."""
    return max(block // 2, 16)


def dense(x: Tensor) -> Tensor:
    """Kernels read any strides but that of the last dim; a gradient broadcast by autograd has stride 0 there."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
