"""attention through the package flash_attn, where that is installed (extra ``flash``).

    lse = log(e^lse_tokens + e^lse_slots);  out = e^(lse_tokens - lse) out_tokens + e^(lse_slots - lse) out_slots

Two calls: the tokens, segments as sequences of different lengths read in place, and the slots, every segment's queries
against its own K + M slots; their results are merged by lse. The backward of each part is the package's own, given the
merged out and lse: exp(s - lse) is then the weight among all keys, so no gradient of the merge is needed.
The package knows no gradient through lse. Where there is one, it is two more calls per part:
    d lse_t / d q_t = scale sum_j p_tj k_j                attention whose values are the keys
    d lse_t / d k_j = scale p_tj q_t                      its gradient of the values, for grad_out = q
Not supported, by name in :func:`rejects`: masks over tokens, recurrence, decoding, float32. Deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import segments
from ..._optional import missing
from ...rope import working_dtype
from ..merge_attention.op import merge_forward

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256

#: backward takes an empty grad_lse for an absent one: a zero one would cost two more calls per part
ABSENT_LSE_GRADIENT = True


def unavailable() -> str | None:
    absent = missing("flash_attn", "flash")
    if absent:
        return absent
    try:
        from flash_attn import flash_attn_interface
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
        return f"flash_attn does not import: {error}"
    if not hasattr(flash_attn_interface, "_flash_attn_varlen_backward"):
        return "flash_attn is too old: 2.7 or newer is needed"
    return None


def rejects(
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
    *rest: Any,
) -> str | None:
    if q.device.type not in DEVICES:
        return f"flash_attn works on CUDA tensors, q is on {q.device}"
    if q.dtype not in DTYPES:
        return f"flash_attn works in float16 and bfloat16, q is {q.dtype}"
    d = q.shape[-1]
    if d > LARGEST_HEAD or d % 8:
        return f"flash_attn needs a head_dim that is a multiple of 8 and at most {LARGEST_HEAD}, q has {d}"
    if attention_mask is not None:
        return "attention_mask: flash_attn reads segments in place and knows no mask over tokens"
    if recurrence_len:
        return f"recurrence_len {recurrence_len}: the keys of two segments would overlap"
    if q.shape[1] != k.shape[1]:
        return f"q has {q.shape[1]} of the {k.shape[1]} positions of k: decoding is not supported"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
            return f"{name} would have to be copied: its rows do not follow each other in memory"
        # loads are 16 bytes wide
        if any(s * x.element_size() % 16 for s in x.stride()[1:3]) or x.data_ptr() % 16:
            return f"{name} would have to be copied: its heads do not start at multiples of 16 bytes"
    return None


class _Cut(NamedTuple):
    """Where segments begin in the rows laid end to end; ``longest`` bounds their lengths."""

    starts: Tensor  # int32 [batch rows * segments + 1]
    longest: int
    per_row: int


def _cut(q: Tensor, segment_len: int, cu_seqlens: Tensor | None, known: int | None) -> _Cut:
    """``known``: the number of packed segments, where the slots or prefix_mask tell it."""
    b, s = q.shape[:2]
    step = segment_len or s
    if cu_seqlens is None:
        n = segments.count(s, step)
        starts = torch.arange(n, device=q.device, dtype=torch.int32) * step
        rows = torch.arange(b, device=q.device, dtype=torch.int32)[:, None] * s
        return _Cut(torch.nn.functional.pad((rows + starts).flatten(), (0, 1), value=b * s), min(step, s), n)
    cu = cu_seqlens.to(device=q.device, dtype=torch.int32)
    # without slots only the device knows how many segments there are: as many as there could be, the surplus ones empty
    most = s // step + cu.shape[0] - 1 if known is None else known
    before = segments.cu_segments(cu, step)
    at = torch.arange(most + 1, device=q.device, dtype=torch.int32)
    document = segments.document_of(before, most + 1)
    starts = torch.where(at < before[-1], cu[document] + (at - before[document]) * step, s)
    return _Cut(starts.to(torch.int32), min(step, s), most)


class _Slots(NamedTuple):
    """Every segment's slots in a row; ``seen`` bool per segment, None = all."""

    k: Tensor  # [segments * (K + M), Hkv, D]
    v: Tensor
    each: int
    seen: Tensor | None


def _slots(
    global_k: Tensor | None,
    global_v: Tensor | None,
    local_k: Tensor | None,
    local_v: Tensor | None,
    prefix_mask: Tensor | None,
    b: int,
    cut: _Cut,
) -> _Slots | None:
    n = cut.per_row
    seen = None
    if prefix_mask is not None:
        seen = prefix_mask.expand(b, -1).flatten()

    def side(of_all: Tensor | None, of_one: Tensor | None) -> Tensor | None:
        parts = []
        if of_all is not None:
            parts.append(of_all[:, None].expand(-1, n, -1, -1, -1) if of_all.ndim == 4 else of_all)
        if of_one is not None:
            parts.append(of_one)
        if not parts:
            return None
        x = torch.cat(parts, 2).flatten(0, 1)
        # slots that nobody sees may hold NaN
        return x if seen is None else torch.where(seen[:, None, None, None], x, 0.0)

    k, v = side(global_k, local_k), side(global_v, local_v)
    if k is None or v is None or k.shape[1] == 0:
        return None
    return _Slots(k.flatten(0, 1), v.flatten(0, 1), k.shape[1], seen)


class _Call:
    """One call's two parts, with its rows laid end to end."""

    def __init__(
        self,
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
        self.b, self.s, self.hq, self.d = q.shape
        self.q, self.k, self.v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        self.causal, self.scale = causal, scale
        per_segment = (local_k, global_k if global_k is not None and global_k.ndim == 5 else None)
        counts = [x.shape[1] for x in per_segment if x is not None]
        counts += [] if prefix_mask is None else [prefix_mask.shape[-1]]
        self.cut = _cut(q, segment_len, cu_seqlens, counts[0] if counts else None)
        self.slots = _slots(global_k, global_v, local_k, local_v, prefix_mask, self.b, self.cut)

    def token_part(self) -> dict[str, Any]:
        starts = self.cut.starts
        return self._part(starts, self.cut.longest, self.causal)

    def slot_part(self, slots: _Slots) -> dict[str, Any]:
        count = self.cut.starts.shape[0]
        return self._part(torch.arange(count, device=self.q.device, dtype=torch.int32) * slots.each, slots.each, False)

    def _part(self, key_starts: Tensor, longest: int, causal: bool) -> dict[str, Any]:
        return {
            "cu_seqlens_q": self.cut.starts,
            "cu_seqlens_k": key_starts,
            "max_seqlen_q": self.cut.longest,
            "max_seqlen_k": longest,
            "dropout_p": 0.0,
            "softmax_scale": self.scale,
            "causal": causal,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        }

    def row_seen(self, slots: _Slots) -> Tensor | None:
        """bool [B*S]: whether a query sees its segment's slots."""
        if slots.seen is None:
            return None
        at = torch.arange(self.b * self.s, device=self.q.device, dtype=torch.int32)
        segment = torch.searchsorted(self.cut.starts, at, right=True) - 1
        return slots.seen[segment.clamp(max=slots.seen.shape[0] - 1)]

    def attend(self, v: Tensor, slot_v: Tensor | None) -> tuple[Tensor, Tensor]:
        """(out [B, S, Hq, D], lse [B, Hq, S]) with the given values."""
        out, lse = _forward(self.q, self.k, v, **self.token_part())
        if self.slots is None or slot_v is None:
            return self._shaped(out), self._lse(lse)
        slot_out, slot_lse = _forward(self.q, self.slots.k, slot_v, **self.slot_part(self.slots))
        seen = self.row_seen(self.slots)
        if seen is not None:
            slot_lse = torch.where(seen, slot_lse, -torch.inf)
        outs, lses = [self._shaped(out), self._shaped(slot_out)], [self._lse(lse), self._lse(slot_lse)]
        merged: tuple[Tensor, Tensor] = merge_forward(outs, lses, "")
        return merged

    def _shaped(self, out: Tensor) -> Tensor:
        return out.view(self.b, self.s, self.hq, self.d)

    def _lse(self, lse: Tensor) -> Tensor:
        return lse.view(self.hq, self.b, self.s).transpose(0, 1).contiguous()


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(out [B, S, Hq, D] in q.dtype, lse [B, Hq, S]); arguments as the operation's schema up to ``scale``."""
    q = arguments[0]
    if q.numel() == 0:
        return torch.zeros_like(q), q.new_zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=working_dtype(q.dtype))
    call = _Call(*arguments)
    return call.attend(call.v, None if call.slots is None else call.slots.v)


def backward(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of (q, k, v, global_k, global_v, local_k, local_v); an absent input gives an empty tensor."""
    inputs = [arguments[i] for i in (0, 1, 2, 5, 6, 7, 8)]
    if arguments[0].numel() == 0:
        return tuple(grad_out.new_empty(0) if x is None else torch.zeros_like(x) for x in inputs)
    call = _Call(*arguments)
    b, s, hq, d = grad_out.shape
    rows = lse.transpose(0, 1).reshape(hq, b * s)
    flat_out, flat_grad = out.reshape(b * s, hq, d), grad_out.reshape(b * s, hq, d)
    through_lse = grad_lse.numel() > 0
    weighted, keys = None, None
    if through_lse:
        weighted = (call.q * grad_lse.transpose(1, 2).reshape(b * s, hq, 1)).to(grad_out.dtype)
        keys, _ = call.attend(call.k, None if call.slots is None else call.slots.k)

    dq, dk, dv = _backward(flat_grad, call.q, call.k, call.v, flat_out, rows, call.token_part())
    if weighted is not None:
        dk = dk + call.scale * _backward(weighted, call.q, call.k, call.k, flat_out, rows, call.token_part())[2]
    of_slots: list[Tensor | None] = [None] * 4
    if call.slots is not None:
        slots, part, wide = call.slots, call.slot_part(call.slots), working_dtype(grad_out.dtype)
        seen = call.row_seen(slots)
        # lse = +inf makes every weight of a query 0
        slot_rows = rows if seen is None else torch.where(seen, rows, torch.inf)
        slot_dq, slot_dk, slot_dv = _backward(flat_grad, call.q, slots.k, slots.v, flat_out, slot_rows, part)
        if weighted is not None:
            extra = _backward(weighted, call.q, slots.k, slots.k, flat_out, slot_rows, part)[2]
            slot_dk = slot_dk.to(wide) + call.scale * extra.to(wide)
        dq = dq + slot_dq
        of_slots = _split(call, slots.each, slot_dk, slot_dv, inputs)
    if keys is not None:
        dq = dq + (call.scale * grad_lse.transpose(1, 2)[..., None] * keys).reshape(dq.shape)
    found = [dq.view(b, s, hq, d), dk.view(arguments[1].shape), dv.view(arguments[2].shape), *of_slots]
    return tuple(
        grad_out.new_empty(0) if x is None else torch.zeros_like(x) if g is None else g.to(grad_out.dtype)
        for x, g in zip(inputs, found, strict=True)
    )


def _split(call: _Call, each: int, dk: Tensor, dv: Tensor, inputs: list[Any]) -> list[Tensor | None]:
    """Gradients of all segments' slots -> those of global_k, global_v, local_k, local_v; sums in float32, in order."""
    global_k, local_k = inputs[3], inputs[5]
    found: list[Tensor | None] = [None] * 4
    for side, gradient in enumerate((dk, dv)):
        g = gradient.to(working_dtype(gradient.dtype)).view(call.b, call.cut.per_row, each, *gradient.shape[1:])
        split = 0 if global_k is None else global_k.shape[-3]
        if global_k is not None:
            found[side] = g[:, :, :split].sum(1) if global_k.ndim == 4 else g[:, :, :split]
        if local_k is not None:
            found[2 + side] = g[:, :, split:]
    return found


def _forward(q: Tensor, k: Tensor, v: Tensor, **part: Any) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(q, k, v, **part, return_softmax=False)
    return out, lse


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _flash_attn_varlen_backward(grad_out, q, k, v, out, lse, dq, dk, dv, **part, deterministic=True)
    return dq, dk, dv
