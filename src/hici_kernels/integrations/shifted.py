"""apply_shifted: LongLoRA's shifted short attention, a training-time baseline."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from .._dispatch import check_impl
from ..ops.attention.api import attention
from .host import Host, Note, check_attention, check_growing, check_servable, is_sliding
from .masks import masked, new_tokens, register

NAME = "shifted"


class ShiftedCall(NamedTuple):
    group_len: int
    impl: str | None


class ShiftedHook:
    """Before an attention module runs: hand it the group length."""

    def __init__(self, group_len: int, impl: str | None) -> None:
        self.call = ShiftedCall(group_len, impl)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        check_attention(module, NAME)
        check_growing(module, kwargs.get("past_key_values"), "shifted short attention")
        return args, {**kwargs, "shifted": self.call}


def apply_shifted(model: nn.Module, group_len: int, *, impl: str | None = None) -> nn.Module:
    """Shifted short attention (LongLoRA, arXiv 2309.12307) while a model trains; full attention otherwise. In place.

    In training mode without a cache, half of the heads attend causally within groups of ``group_len`` tokens, the other
    half within groups that begin half a group earlier. The published code rolls the text, so its first tokens come to
    stand behind its last ones and see them; here the shifted heads have a first and a last group of half length
    instead, and no token sees a later one.

    Args:
        model: a decoder of transformers whose layers all have full attention and an even number of kv heads (or one).
        group_len: tokens per group, even.

    Raises:
        TypeError, ValueError: before anything has changed.
    """
    _checks.integer("group_len", group_len, 2)
    if group_len % 2:
        raise ValueError(f"group_len must be even, got {group_len}")
    check_impl(impl)
    host = Host.of(model)
    host.check_free("apply_shifted")
    for module in host.attentions:
        check_servable(module, "shifted short attention")
        if is_sliding(module):
            raise ValueError("shifted short attention needs full attention in every layer")
    host.own_config(model)
    note = Note("apply_shifted", host.set_attention(NAME))
    for module in host.attentions:
        note.handles.append(module.register_forward_pre_hook(ShiftedHook(group_len, impl), with_kwargs=True))
    host.notes.append(note)
    return model


def shifted_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    shifted: ShiftedCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, T, D], key and value [B, Hkv, S, D]; out [B, T, Hq, D]."""
    if shifted is None:
        raise ValueError("attention implementation 'shifted' needs apply_shifted(model, group_len)")
    if dropout:
        raise ValueError(f"shifted short attention does not support attention dropout, got {dropout}")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    attention_mask = masked(attention_mask)
    new_tokens(attention_mask, q.shape[1], "shifted short attention")
    if not module.training or q.shape[1] != k.shape[1]:
        out = attention(q, k, v, attention_mask=attention_mask, scale=scaling, impl=shifted.impl)
        return out, None
    return shifted_short(q, k, v, attention_mask, shifted.group_len, scaling, shifted.impl), None


def shifted_short(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group_len: int, scale: float | None, impl: str | None
) -> Tensor:
    """Context [B, S, Hq, D]: half of the heads in groups that begin at 0, the others half a group earlier."""
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % 2 or (kv_heads % 2 and kv_heads > 1):
        raise ValueError(f"heads cannot be halved: {heads} query heads, {kv_heads} kv heads")
    halves = []
    for half in (0, 1):
        mine = q[:, :, half * heads // 2 : (half + 1) * heads // 2]
        pair = (k, v) if kv_heads == 1 else (x[:, :, half * kv_heads // 2 : (half + 1) * kv_heads // 2] for x in (k, v))
        keys, values = pair
        cut = half * group_len // 2
        pieces = []
        for piece in (slice(0, cut), slice(cut, None)):
            if mine[:, piece].shape[1]:
                pieces.append(
                    attention(
                        mine[:, piece],
                        keys[:, piece],
                        values[:, piece],
                        segment_len=group_len,
                        attention_mask=None if mask is None else mask[:, piece],
                        scale=scale,
                        impl=impl,
                    )
                )
        halves.append(torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0])
    return torch.cat(halves, 2)


register(NAME, shifted_forward)
