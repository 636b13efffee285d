"""Masks as these integrations want them: [B, columns] of tokens, never [B, 1, queries, keys].

A mask always tells how many columns the model counts, cached ones included; None where those are the call's own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def token_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """[B, kv_length] for plain causal attention; the usual 4-D mask where the model asks for more.

    Where nothing is masked: None if the columns are those of the call, else an empty mask [B, kv_length, 0].

    Under a tracing compiler transformers cannot see whether positions restart and always hands over the function for
    packed documents; :func:`~.packed.one_document` then looks at the positions.
    """
    compiling = torch.compiler.is_compiling()
    if mask_function is not causal_mask_function and not (compiling and local_size is None):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:]
        if compiling or not bool(attention_mask.all()):
            return attention_mask
    return None if kv_length == q_length else torch.empty(batch_size, kv_length, 0, dtype=torch.bool)


def register(name: str, function: Any) -> None:
    """An attention function of the library, with masks as above."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, token_mask)


def fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What layers that a method leaves alone do (those with a sliding window)."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


def masked(mask: Tensor | None) -> Tensor | None:
    """A mask, None where it says that nothing is masked."""
    return None if mask is None or (mask.ndim == 3 and mask.shape[2] == 0) else mask


def new_tokens(mask: Tensor | None, count: int, method: str) -> Tensor | None:
    """The part of a mask [B, columns] that belongs to the last ``count`` columns; None where nothing is masked."""
    mask = masked(mask)
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(
            f"{method} supports causal attention with an attention_mask [batch, tokens]; got a mask of shape "
            f"{tuple(mask.shape)} (custom masks and documents packed by position_ids are not supported here)"
        )
    if mask.shape[1] < count:
        raise ValueError(f"attention_mask must cover the {count} tokens of this call, got {mask.shape[1]} columns")
    return mask[:, mask.shape[1] - count :]


def only_tokens(mask: Tensor | None, count: int, method: str) -> Tensor | None:
    """The same for a call without a cache, whose columns are the call's own.

    Raises:
        ValueError: the model counts more: it was called with a cache and has dropped it.
    """
    if mask is not None and mask.ndim != 4 and mask.shape[1] != count:
        raise ValueError(
            f"{method} got {count} tokens of {mask.shape[1]} without their cache: gradient checkpointing in training "
            "mode drops past_key_values; switch it off, or call model.eval(), to continue a cache"
        )
    return new_tokens(mask, count, method)


class Columns:
    """Which of the columns a cache was given hold tokens, so that columns can be taken back row by row."""

    def __init__(self) -> None:
        self.count = 0
        self._seen: Tensor | None = None  # bool [B, count] on the CPU; None = all

    def append(self, batch: int, count: int, mask: Tensor | None) -> None:
        if mask is not None or self._seen is not None:
            held = torch.ones(batch, self.count, dtype=torch.bool) if self._seen is None else self._seen
            new = torch.ones(batch, count, dtype=torch.bool) if mask is None else mask.bool().cpu()
            self._seen = torch.cat((held, new), 1)
        self.count += count

    def tokens(self, batch: int, removed: int = 0) -> list[int]:
        """How many tokens every row holds, without the last ``removed`` columns."""
        count = self.count - min(removed, self.count)
        return [count] * batch if self._seen is None else self._seen[:, :count].sum(1).tolist()

    def crop(self, removed: int) -> None:
        """Take back the last columns."""
        self.count -= min(removed, self.count)
        if self._seen is not None:
            self._seen = self._seen[:, : self.count]

    def reorder(self, rows: Tensor) -> None:
        if self._seen is not None:
            self._seen = self._seen[rows.cpu()]


# up to some release, a positive argument of crop() is the length to keep; later ones refuse it
CROP_KEEPS = "max_length" in inspect.signature(DynamicLayer.crop).parameters


def removed_columns(argument: int, held: int) -> int:
    """How many of ``held`` columns ``crop(argument)`` takes back: as many as a negative number says."""
    if argument <= 0:
        return -int(argument)
    if not CROP_KEEPS:
        raise ValueError(f"tokens_to_remove must be negative (that many columns are taken back), got {argument}")
    return max(0, held - int(argument))
