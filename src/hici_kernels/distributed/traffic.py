"""Bytes on the wire: those that were sent, and those that context parallel schemes must send."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import HiCIConfig
from ..nn.prefix import uses_slots
from .plan import ShardPlan


@dataclass
class Traffic:
    """Bytes one rank received, by what they carried; collectives count as their ring algorithms move them."""

    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int) -> None:
        self.bytes[what] = self.bytes.get(what, 0) + count

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def reset(self) -> None:
        self.bytes.clear()


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which gradients of slots are summed over ranks: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def layer_traffic(
    plan: ShardPlan,
    config: HiCIConfig,
    *,
    hidden_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
) -> dict[str, int]:
    """Bytes a rank receives in one HiCI layer, without token masks: what :class:`ContextParallel` counts.

    slots (forward) = (P - 1) c M H bytes of ``dtype``, c the largest number of segments on a rank; slots (backward) the
    same in float32 at least; recurrence: K and V of recurrence_len tokens each way.
    """
    found: dict[str, int] = {}
    others = plan.ranks - 1
    n = len(plan.spans)
    if uses_slots(config) and n and (config.single_segment == "on" or n > 1 or plan.cu_seqlens is not None):
        block = batch * max(plan.counts) * config.num_local_slots * hidden_size
        found["slots forward"] = others * block * dtype.itemsize
        found["slots backward"] = others * block * gradient_dtype(dtype).itemsize
    length = min(config.recurrence_len, plan.segment_len)
    if length and others:
        tail = 2 * batch * length * num_kv_heads * head_dim * dtype.itemsize
        found["recurrence forward"] = found["recurrence backward"] = tail
    return found


def ring_traffic(
    length: int,
    ranks: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
) -> dict[str, int]:
    """Bytes a rank receives in one layer of ring attention (arXiv 2310.01889) over the same tokens.

    K and V of the ceil(S / P) tokens of every other rank forward; K and V again and their gradients backward, in
    ``dtype``. A lower bound: implementations often send gradients in float32 and once more around.
    """
    block = 2 * batch * -(-length // ranks) * num_kv_heads * head_dim * dtype.itemsize
    return {"keys and values forward": (ranks - 1) * block, "keys, values, gradients backward": 2 * (ranks - 1) * block}


def traffic_table(rows: dict[str, dict[str, int]]) -> str:
    """Lines of ``name, what, bytes``, for printing."""
    lines = []
    for name, parts in rows.items():
        for what, count in {**parts, "total": sum(parts.values())}.items():
            lines.append(f"{name:24s} {what:34s} {count:>16,d} B  {count / 2**20:12.3f} MiB")
    return "\n".join(lines)


def to_json(rows: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The rows with their totals."""
    return {name: {**parts, "total": sum(parts.values())} for name, parts in rows.items()}
