"""attention: the public function."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ... import _checks, segments
from ..._dispatch import check_impl
from ..._library import call
from .op import attention_forward


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_len: int | None = ...,
    recurrence_len: int = ...,
    global_k: Tensor | None = ...,
    global_v: Tensor | None = ...,
    local_k: Tensor | None = ...,
    local_v: Tensor | None = ...,
    prefix_mask: Tensor | None = ...,
    attention_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_len: int | None = ...,
    recurrence_len: int = ...,
    global_k: Tensor | None = ...,
    global_v: Tensor | None = ...,
    local_k: Tensor | None = ...,
    local_v: Tensor | None = ...,
    prefix_mask: Tensor | None = ...,
    attention_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_len: int | None = None,
    recurrence_len: int = 0,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
    local_k: Tensor | None = None,
    local_v: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every segment to [global slots, its local slots, recurrence, its own tokens].

    Formula (HiCI, arXiv 2603.20843), for query t of segment i, query head h, kv head h // (Hq // Hkv):
        J_t   = global slots of i + local slots of i + last recurrence_len tokens of segment i-1 + tokens of i up to t
        lse_t = log sum_{j in J_t} exp(scale q_t . k_j)
        out_t = sum_{j in J_t} exp(scale q_t . k_j - lse_t) v_j

    Args:
        q: [B, T, Hq, D], T <= S. T < S: the queries are the last T of the S positions (decoding).
        k, v: [B, S, Hkv, D], Hq a multiple of Hkv. Read in place: any strides with a contiguous last dim.
        segment_len: tokens per segment; segment i = columns [i*segment_len, min((i+1)*segment_len, S)), N =
            ceil(S/segment_len), the last may be short. None = one segment (per document).
        recurrence_len: 0..segment_len, tokens of the previous segment of the same document that are also seen.
        global_k, global_v: [B, K, Hkv, D] for all segments, or [B, N, K, Hkv, D].
        local_k, local_v: [B, N, M, Hkv, D].
        prefix_mask: bool [N] or [B, N]; False = the queries of that segment see no slots.
        attention_mask: [B, S], nonzero = token, any pattern. Masked keys are unseen, masked queries give 0.
        cu_seqlens: int32 [docs+1], B == 1, T == S: packed documents; a segment never crosses one and N counts the
            segments of all documents in order. On the CPU its contents are checked, on a device they are trusted.
        causal: False = a query sees all tokens of its segment.
        scale: default D ** -0.5.
        return_lse: also return the log-sum-exp.
        impl: implementation name, or None for the fastest that serves the call.

    Returns:
        out [B, T, Hq, D] in q.dtype, or (out, lse [B, Hq, T] natural logarithm, float32, float64 for float64). A query
        that sees nothing gives 0 and -inf, and gradient 0; so does one all of whose scores overflow to -inf. NaN in q
        or k reaches the queries that see it, in v of a token that any query sees also earlier ones (0 * NaN, as in
        PyTorch). Differentiable once in q, k, v and the slots, through out and lse. Sums are kept in float32 at least.
        Deterministic. float32, bfloat16, float16, float64. Under torch.autocast, tensors are cast to the autocast
        dtype. Dropout, windows, soft caps and biases: unsupported.

    Raises:
        TypeError, ValueError: before any work, naming the argument.
    """
    q, k, v, global_k, global_v, local_k, local_v = _checks.autocast(  # type: ignore[assignment]
        q, k, v, global_k, global_v, local_k, local_v
    )
    _check(
        q,
        k,
        v,
        segment_len,
        recurrence_len,
        global_k,
        global_v,
        local_k,
        local_v,
        prefix_mask,
        attention_mask,
        cu_seqlens,
    )
    _checks.boolean("causal", causal)
    _checks.boolean("return_lse", return_lse)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        _checks.number("scale", scale)
    out, lse = call(
        attention_forward,
        q,
        k,
        v,
        0 if segment_len is None else segment_len,
        recurrence_len,
        global_k,
        global_v,
        local_k,
        local_v,
        prefix_mask,
        attention_mask,
        cu_seqlens,
        causal,
        float(scale),
        check_impl(impl),
    )
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_len: int | None,
    recurrence_len: int,
    global_k: Tensor | None,
    global_v: Tensor | None,
    local_k: Tensor | None,
    local_v: Tensor | None,
    prefix_mask: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _checks.qkv(q, k, v)
    b, t, _, d = q.shape
    s, hkv = k.shape[1], k.shape[2]
    if t > s:
        raise ValueError(f"q must have at most as many positions as k ({s}), got {t}")
    slots = not (global_k is None and global_v is None and local_k is None and local_v is None)
    masks = not (prefix_mask is None and attention_mask is None and cu_seqlens is None)
    # a call for one query spends a tenth of its time on what follows
    if segment_len is None and not slots and not masks and type(recurrence_len) is int and recurrence_len == 0:
        return
    if segment_len is not None:
        _checks.integer("segment_len", segment_len, 1)
    _checks.integer("recurrence_len", recurrence_len, 0, segment_len)

    if slots:
        _check_slots(q, global_k, global_v, local_k, local_v)

    n: int | None = segments.count(s, segment_len)
    if cu_seqlens is not None:
        if b != 1:
            raise ValueError(f"cu_seqlens needs batch 1 (packed documents), got q with batch {b}")
        if t != s:
            raise ValueError(f"cu_seqlens needs as many queries as keys ({s}), got {t}")
        _checks.offsets("cu_seqlens", cu_seqlens, s)
        n = segments.count_packed(cu_seqlens, segment_len) if _checks.readable(cu_seqlens) else None
    if n is None:  # trusted contents: whatever N the slots agree on
        for x, axis in ((local_k, 1), (global_k if global_k is not None and global_k.ndim == 5 else None, 1)):
            n = x.shape[axis] if n is None and x is not None else n
        if n is None and prefix_mask is not None:
            n = prefix_mask.shape[-1]
    if global_k is not None and global_v is not None:
        if global_k.ndim == 4:
            _checks.shape("global_k", global_k, (b, global_k.shape[1], hkv, d), "B, K, Hkv, D")
        else:
            _checks.shape("global_k", global_k, (b, n, global_k.shape[2], hkv, d), "B, N, K, Hkv, D")  # type: ignore
        _checks.shape("global_v", global_v, global_k.shape, "the shape of global_k")
    if local_k is not None and local_v is not None:
        _checks.shape("local_k", local_k, (b, n, local_k.shape[2], hkv, d), "B, N, M, Hkv, D")  # type: ignore
        _checks.shape("local_v", local_v, local_k.shape, "the shape of local_k")
    if prefix_mask is not None:
        if not isinstance(prefix_mask, Tensor):
            raise TypeError(f"prefix_mask must be a bool tensor, got {type(prefix_mask).__name__}")
        if prefix_mask.dtype != torch.bool:
            raise TypeError(f"prefix_mask must be bool, got {prefix_mask.dtype}")
        if prefix_mask.ndim not in (1, 2):
            raise ValueError(f"prefix_mask must be [N] or [B, N], got shape {tuple(prefix_mask.shape)}")
        expected = (n,) if prefix_mask.ndim == 1 else (b, n)
        _checks.shape("prefix_mask", prefix_mask, expected, "N" if prefix_mask.ndim == 1 else "B, N")  # type: ignore
        if prefix_mask.device != q.device:
            raise ValueError(f"prefix_mask is on {prefix_mask.device}, expected {q.device} like q")
    if attention_mask is not None:
        _checks.token_mask("attention_mask", attention_mask, b, s, q.device)


def _check_slots(
    q: Tensor, global_k: Tensor | None, global_v: Tensor | None, local_k: Tensor | None, local_v: Tensor | None
) -> None:
    """Everything that does not depend on how the sequence is cut."""
    for kind in ("global", "local"):
        slot_k, slot_v = (global_k, global_v) if kind == "global" else (local_k, local_v)
        if (slot_k is None) != (slot_v is None):
            missing, given = ("v", "k") if slot_v is None else ("k", "v")
            raise ValueError(f"{kind}_{missing} must be given together with {kind}_{given}, got None")
    if global_k is not None and isinstance(global_k, Tensor) and global_k.ndim == 4:
        _checks.tensor("global_k", global_k, "B, K, Hkv, D")
    elif global_k is not None:
        _checks.tensor("global_k", global_k, "B, N, K, Hkv, D")
    if local_k is not None:
        _checks.tensor("local_k", local_k, "B, N, M, Hkv, D")
    for name, x in (("global_v", global_v), ("local_v", local_v)):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    slots = {"global_k": global_k, "global_v": global_v, "local_k": local_k, "local_v": local_v}
    _checks.floats(q=q, **slots)
    _checks.last_contiguous(**slots)
