"""Which slots a segment sees: the context modes, the shift by one segment, the ablations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import LEAK_FREE_MODES, HiCIConfig
from ..ops.global_stats.api import global_stats
from ..segments import document_of
from .global_integrator import GlobalIntegrator


class Prefix(NamedTuple):
    """Slots before the tokens of each segment, as hidden vectors.

    global_slots: [B, K, H] for all segments, [B, N, K, H], or None.
    local_slots: [B, N, M, H] or None.
    mask: bool [B, N], False = the segment sees no slots; None = all see them.
    """

    global_slots: Tensor | None
    local_slots: Tensor | None
    mask: Tensor | None


def uses_global(config: HiCIConfig) -> bool:
    """Whether tokens of this configuration see global slots."""
    return config.use_global


def uses_local(config: HiCIConfig) -> bool:
    """Whether tokens of this configuration see local slots (two modes drop them whatever use_local says)."""
    return config.use_local and config.context_mode not in ("causal_shift_g", "causal_gi_gonly")


def uses_slots(config: HiCIConfig) -> bool:
    return uses_global(config) or uses_local(config)


def build_prefix(
    config: HiCIConfig,
    local: Tensor,
    integrator: GlobalIntegrator,
    *,
    valid: Tensor | None = None,
    cu_segments: Tensor | None = None,
    slots_on: Tensor | None = None,
    own: slice | None = None,
) -> Prefix:
    """The slots every segment sees (HiCI, arXiv 2603.20843), segments counted from 1:

        none             G(L_1..L_N), L_i          causal_shift     G_{i-1}, L_{i-1}
        causal_gi        G_i = G(L_1..L_i), L_i    causal_shift_g   G_{i-1}
        causal_gi_gonly  G_i

    Args:
        local: [B, N, M, H], L_i.
        valid: bool [B, N]; False = the segment has no slots: left out of G, and "i-1" is the last valid one before i.
        cu_segments: int32 [docs+1] of packed documents; "i-1" never leaves the document.
        slots_on: bool [B, N]; False = the segment sees no slots (single_segment="off").
        own: only these segments' prefixes are wanted (all N take part in them); axis N of the result is theirs.
    """
    n = local.shape[1]
    shifted = config.context_mode in LEAK_FREE_MODES
    global_slots = None
    if uses_global(config):
        causal = config.context_mode != "none"
        if own is None or not causal:
            global_slots = integrator(local, causal=causal, valid=valid, cu_segments=cu_segments)
        else:
            stats = global_stats(local, causal=True, valid=valid, cu_segments=cu_segments, impl=integrator.impl)
            at = torch.arange(own.start, own.stop, device=local.device) - int(shifted)
            global_slots = integrator(local, stats=stats[:, at.clamp(min=0)])
    local_slots = local if uses_local(config) else None
    mask = slots_on
    if shifted:
        previous, exists = _previous(local, valid, cu_segments)
        if global_slots is not None and own is None:  # G_{i-1} already equals G of the last valid segment before i
            global_slots = torch.cat((global_slots[:, :1], global_slots[:, :-1]), 1)
        if local_slots is not None:
            local_slots = local_slots.gather(1, previous[:, :, None, None].expand_as(local_slots))
        mask = exists if mask is None else mask & exists
    elif valid is not None:
        mask = valid if mask is None else mask & valid
    if mask is not None:
        mask = mask.expand(local.shape[0], n)
    if own is not None:
        if global_slots is not None and config.context_mode == "none" and cu_segments is not None:
            global_slots = global_slots[:, own]
        local_slots = None if local_slots is None else local_slots[:, own]
        mask = None if mask is None else mask[:, own]
    return Prefix(global_slots, local_slots, mask)


def _previous(local: Tensor, valid: Tensor | None, cu_segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The last valid segment before each in its document: index [B, N] (0 where none) and bool [B, N] whether any."""
    b, n = local.shape[:2]
    at = torch.arange(n, device=local.device).expand(b, n)
    last = at if valid is None else torch.where(valid, at, -1).cummax(1).values
    before = torch.cat((torch.full_like(last[:, :1], -1), last[:, :-1]), 1)
    start: Tensor | int = 0
    if cu_segments is not None:
        start = cu_segments.long()[document_of(cu_segments, n)]
    return before.clamp(min=0), before >= start
