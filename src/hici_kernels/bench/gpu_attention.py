"""What attention is measured against on a GPU.

"assembled beforehand": [G | L_i | segment] is concatenated, and queries are preceded by as many empty rows as there
are slots (so that a square causal mask shows every query all slots), before the clock starts: the same work with the
assembly for free. "no slots": segments alone, a little less work. "reference's sequence": what the published code does
in every call, assembly inside: expand kv heads, concatenate per segment, stack, attention on padded queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from .case import Inputs, Outputs

Prepared = tuple[Callable[[], Outputs], list[Tensor]]


def assemble(x: Inputs, segment_len: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """q [B*N, Hq, P+L, D], k, v [B*N, Hkv, P+L, D] and P, the number of slots, by torch.cat and torch.stack."""
    b, s, hq, d = x["q"].shape
    n = s // segment_len
    if n * segment_len != s:
        raise ValueError(f"{s} tokens are not whole segments of {segment_len}")
    p = x["global_k"].shape[1] + x["local_k"].shape[2]
    sides = []
    for side in "kv":
        parts = [
            torch.cat(
                (x[f"global_{side}"], x[f"local_{side}"][:, i], x[side][:, i * segment_len : (i + 1) * segment_len]), 1
            )
            for i in range(n)
        ]
        sides.append(torch.stack(parts, 1).flatten(0, 1).transpose(1, 2))
    q = pad(x["q"].reshape(b * n, segment_len, hq, d), (0, 0, 0, 0, p, 0)).transpose(1, 2)
    return q, sides[0], sides[1], p


def tokens_of(out: Tensor, p: int, like: Tensor) -> Tensor:
    """[B*N, Hq, P+L, D] -> [B, S, Hq, D] without the empty rows."""
    return out[:, :, p:].transpose(1, 2).reshape(like.shape)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def sdpa_without_slots(backend: SDPBackend, x: Inputs, options: dict[str, Any]) -> Prepared:
    b, s = x["q"].shape[:2]
    n = s // options["segment_len"]
    q, k, v = (_leaf(x[y].reshape(b * n, s // n, *x[y].shape[2:]).transpose(1, 2)) for y in "qkv")
    return lambda: (_sdpa(backend, q, k, v),), [q, k, v]


def sdpa_assembled(backend: SDPBackend, x: Inputs, options: dict[str, Any]) -> Prepared:
    q, k, v, p = assemble(x, options["segment_len"])
    q, k, v = _leaf(q), _leaf(k), _leaf(v)
    return lambda: (tokens_of(_sdpa(backend, q, k, v), p, x["q"]),), [q, k, v]


def flex_assembled(x: Inputs, options: dict[str, Any]) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    padded, k, v, p = assemble(x, options["segment_len"])
    q, k, v = _leaf(padded[:, :, p:]), _leaf(k), _leaf(v)
    length = q.shape[2]

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return column <= row + p

    mask = create_block_mask(visible, None, None, length, length + p, device=str(q.device))
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    gqa = q.shape[1] != k.shape[1]

    def call() -> Outputs:
        return (tokens_of(compiled(q, k, v, block_mask=mask, enable_gqa=gqa), 0, x["q"]),)

    return call, [q, k, v]


def reference_sequence(x: Inputs, options: dict[str, Any]) -> Prepared:
    leaves = {name: _leaf(t) for name, t in x.items()}
    group = x["q"].shape[2] // x["k"].shape[2]

    def call() -> Outputs:
        expanded = dict(leaves)
        if group > 1:
            for name in ("k", "v", "global_k", "global_v", "local_k", "local_v"):
                t = leaves[name]
                heads = t.unsqueeze(-2).expand(*t.shape[:-1], group, t.shape[-1])
                expanded[name] = heads.reshape(*t.shape[:-2], -1, t.shape[-1])
        q, k, v, p = assemble(expanded, options["segment_len"])
        out = scaled_dot_product_attention(q, k.contiguous(), v.contiguous(), is_causal=True)
        return (tokens_of(out, p, x["q"]),)

    return call, list(leaves.values())


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


#: label -> (prepare, whether it computes what the operation computes)
BASELINES: dict[str, tuple[Callable[[Inputs, dict[str, Any]], Prepared], bool]] = {
    "SDPA flash, no slots": (functools.partial(sdpa_without_slots, SDPBackend.FLASH_ATTENTION), False),
    "SDPA cuDNN, no slots": (functools.partial(sdpa_without_slots, SDPBackend.CUDNN_ATTENTION), False),
    "SDPA flash, assembled beforehand": (functools.partial(sdpa_assembled, SDPBackend.FLASH_ATTENTION), True),
    "SDPA cuDNN, assembled beforehand": (functools.partial(sdpa_assembled, SDPBackend.CUDNN_ATTENTION), True),
    "FlexAttention, assembled beforehand": (flex_assembled, True),
    "reference's sequence": (reference_sequence, True),
}
