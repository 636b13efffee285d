"""attention in Triton: K and V are read where they lie, slots enter as the first key tiles of every program.

float32, bfloat16, float16; head_dim 1 to 256 (float64 and wider heads are served by the reference). Products take
operands in the tensors' dtype and sum in float32 (float32 without tf32); weights are rounded to the tensors' dtype
before they multiply V. Deterministic in both directions: no atomics, every sum in a fixed order. Nothing is expanded,
concatenated or padded in memory, whatever the number of kv heads, slots or documents; nothing is read back from the
device. In 16-bit dtypes scores beyond 2^29 in size lose all meaning (their rounding exceeds the range of exp).

Query heads that share a kv head are packed into the rows of a tile, position-major (:func:`packed_heads`), so that
keys are fetched once for all of them where queries are few, and less of the causal diagonal is computed in vain where
they are many. Where programs are fewer than multiprocessors and keys are long (decoding), keys are cut into runs that
:func:`~.triton_forward.merge_splits` joins (:func:`splits_for`).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ..._triton import rejects_device
from ...tuning import multiprocessors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
LARGEST_GRID = 65535
LOG2E = 1.4426950408889634

#: backward takes an empty grad_lse for an absent one
ABSENT_LSE_GRADIENT = True

# A run of keys that a program of its own is worth: shorter ones cost more in merging than they hide.
SPLIT_TILES = 4


def rejects(q: Tensor, k: Tensor, *rest: Any) -> str | None:
    from .triton_forward import INTERPRET
    from .triton_schedule import LARGEST_LENGTH

    b, _, hq, d = q.shape
    if q.dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, q is {q.dtype}"
    if d > LARGEST_HEAD:
        return f"it serves head_dim up to {LARGEST_HEAD}, q has {d}"
    foreign = rejects_device("q", q, INTERPRET.value)
    if foreign is not None:
        return foreign
    if k.shape[1] >= LARGEST_LENGTH:
        return f"it serves fewer than 2^30 positions, k has shape {tuple(k.shape)}"
    if b > LARGEST_GRID or hq > LARGEST_GRID:
        return f"it serves a batch and heads of at most {LARGEST_GRID}, q has shape {tuple(q.shape)}"
    return None


def column_blocks(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """(BLOCK_D, BLOCK_E): one or two powers of two that hold head_dim, the second 0 or at least 16.

    In float32 more than 64 columns are always two blocks: its products hold rows of both operands in registers, as many
    numbers as a block has columns, and one summed in a single run of 256 has twice the error.
    """
    whole = max(1 << (head_dim - 1).bit_length(), 16)
    half = whole // 2
    rest = head_dim - half
    if half < 16 or rest <= 0:
        return whole, 0
    extra = max(1 << (rest - 1).bit_length(), 16)
    return (half, extra) if extra < half or (dtype == torch.float32 and half >= 64) else (whole, 0)


def packed_heads(group: int, queries: int, block: int) -> int:
    """Query heads per tile: all of a kv head's where one tile then holds all queries, else a power of two.

    Always a divisor of ``group``; at least 16 positions are left in a tile of many.
    """
    divisors = [x for x in range(1, group + 1) if group % x == 0]
    fitting = [x for x in divisors if x * queries <= block]
    if fitting and fitting[-1] > 1:
        return fitting[-1]
    return max(x for x in divisors if x & (x - 1) == 0 and (x == 1 or x * 16 <= block))


def splits_for(programs: int, tiles: int, multiprocessors: int) -> int:
    """Runs that a tile's keys are cut into: two programs per multiprocessor, runs of SPLIT_TILES key tiles or more."""
    if programs * 2 > multiprocessors:
        return 1
    return max(min(tiles // SPLIT_TILES, 2 * multiprocessors // max(programs, 1)), 1)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def forward(
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
) -> tuple[Tensor, Tensor]:
    """(out [B, T, Hq, D] in q.dtype, lse [B, Hq, T] float32); arguments as the operation's schema up to ``scale``."""
    from .triton_forward import attention_forward, merge_blocks, merge_splits
    from .triton_schedule import Cut

    b, t, hq, d = q.shape
    hkv = k.shape[2]
    out = torch.empty((b, t, hq, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, hq, t), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse

    offsets = None if cu_seqlens is None else cu_seqlens.to(q.device, non_blocking=True)
    cut = Cut.of(q, k, segment_len, recurrence_len, offsets, (global_k, local_k, prefix_mask))
    if cut.packed:  # rows behind the last document are in no tile
        out.zero_(), lse.fill_(-torch.inf)
    chosen = tuning.configuration(
        "attention", tuning.architecture(q.device), head_dim=d, segment_len=cut.segment_len, dtype=q.dtype
    )
    rows = min(t, cut.segment_len)
    pack = packed_heads(hq // hkv, rows, chosen["BLOCK_M"])
    chosen = fitted(chosen, rows * pack, attention_mask is not None)
    with on_device(q):
        tiles = cut.tiles(chosen["BLOCK_M"] // pack)
    if tiles.count == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    heads = hq // pack
    longest = cut.segment_len + cut.recurrence_len
    splits = splits_for(tiles.count * heads * b, -(-longest // chosen["BLOCK_N"]), multiprocessors(q.device))
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty((splits, b, t, hq, d), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, b, hq, t), dtype=torch.float32, device=q.device)

    block_d, block_e = column_blocks(d, q.dtype)
    shown = prefix_mask if prefix_mask is None else prefix_mask.view(torch.uint8).expand(b, -1)
    seen = flags(attention_mask)
    global_k, global_v, local_k, local_v = (
        x if x is not None and x.shape[-3] else None for x in (global_k, global_v, local_k, local_v)
    )
    described: tuple[Any, ...] = (None, None, 0, 0, 0, 0, 0, 0)
    if chosen.pop("TMA", 0) and attention_mask is None and block_d == d:
        described = descriptors(k, v, chosen["BLOCK_N"]) or described
    with on_device(q):
        attention_forward[(tiles.count * splits, heads, b)](
            q,
            k,
            v,
            global_k,
            global_v,
            local_k,
            local_v,
            shown,
            seen,
            parts,
            part_lse,
            abs(scale) or 1.0,
            (abs(scale) or 1.0) * LOG2E,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *slot_strides(global_k),
            *slot_strides(global_v),
            *slot_strides(local_k),
            *slot_strides(local_v),
            *(shown.stride() if shown is not None else (0, 0)),
            *(seen.stride() if seen is not None else (0, 0)),
            *described,
            t,
            0 if global_k is None else global_k.shape[-3],
            0 if local_k is None else local_k.shape[-3],
            hq // hkv,
            splits,
            **tiles.arguments,
            HEAD_DIM=d,
            BLOCK_D=block_d,
            BLOCK_E=block_e,
            PACK=pack,
            CAUSAL=causal,
            PACKED=cut.packed,
            SPLIT=splits > 1,
            FUSED=q.dtype != torch.float32,
            SIGN=(scale > 0) - (scale < 0),
            **chosen,
        )
        if splits > 1:
            total = b * t * hq
            blocks = merge_blocks(d)
            merge_splits[(-(-total // blocks["BLOCK_R"]),)](
                parts,
                part_lse,
                out,
                lse,
                total,
                t,
                hq,
                splits,
                HEAD_DIM=d,
                **blocks,
                num_warps=4,
            )
    return out, lse


def backward(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of (q, k, v, global_k, global_v, local_k, local_v); an absent input gives an empty tensor."""
    from .triton_backward_launch import backward as launch

    return launch(grad_out, grad_lse, out, lse, *arguments)


def flags(mask: Tensor | None) -> Tensor | None:
    """A mask as integers, nonzero where it is: copied only if it is floating."""
    if mask is None:
        return None
    mask = mask != 0 if mask.dtype.is_floating_point else mask
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def descriptors(k: Tensor, v: Tensor, rows: int) -> tuple[Any, ...] | None:
    """Tensor descriptors of k and v and where heads lie in them, or None where their layout is not that of a matrix.

    Rows are all positions of a batch row whose stride divides those of batch and heads, or else of a batch row with
    its heads side by side.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    found: list[Any] = []
    places: list[int] = []
    for x in (k, v):
        (b, s, h, d), (sb, sn, sh, _) = x.shape, x.stride()
        if sn <= 0 or x.data_ptr() % 16 or sn * x.element_size() % 16 or (b > 1 and sb % sn):
            return None
        row_b = sb // sn if b > 1 else 0
        # heads side by side within a row, or each with rows of its own
        beside = h == 1 or (h - 1) * sh + d <= sn
        if not beside and sh % sn:
            return None
        row_h, column_h = (0, sh) if beside else (sh // sn, 0)
        last = (b - 1) * row_b + (h - 1) * row_h + s
        if last >= 2**31:
            return None
        found.append(TensorDescriptor(x, [last, (h - 1) * column_h + d], [sn, 1], [rows, d]))
        places += [row_b, row_h, column_h]
    return (*found, *places)


def slot_strides(x: Tensor | None) -> tuple[int, int, int, int]:
    """Strides over batch, segments, slots and heads; 0 over segments that share them."""
    if x is None:
        return 0, 0, 0, 0
    batch, *segment, slot, head, _ = x.stride()
    return batch, segment[0] if segment else 0, slot, head


def fitted(chosen: dict[str, int], rows: int, masked: bool = False) -> dict[str, int]:
    """The configuration for a call: a tile no taller than all the rows there are, in powers of two from 16.

    With a mask over tokens key tiles are half as wide: which of them are seen takes registers that are not there.
    """
    chosen = dict(chosen)
    if masked:
        chosen["BLOCK_N"] = max(chosen["BLOCK_N"] // 2, 16)
    block = max(1 << (rows - 1).bit_length(), 16)
    if block < chosen["BLOCK_M"]:
        chosen |= {"BLOCK_M": block, "num_warps": min(chosen["num_warps"], 4)}
    return chosen
