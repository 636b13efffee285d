"""The cache layer of a HiCI attention layer in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..config import HiCIConfig
from ..nn.hici_cache import HiCICache
from ..nn.slot_attention import SlotAttention
from .masks import Columns, removed_columns


class HiCILayer(CacheLayerMixin):
    """Wraps the :class:`HiCICache` of one layer. What it holds follows from config.decode, see :func:`apply_hici`."""

    is_compileable = False
    # crop() works as far as the cache can go back, but not into the first call, whose tokens the slots have read
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, config: HiCIConfig) -> None:
        super().__init__()
        self.config = config
        self.cache: HiCICache | None = None
        self.columns = Columns()
        self.first = 0  # columns of the first call
        self.skipped = False
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone: the attention function appends them."""
        return key_states, value_states

    @torch.compiler.disable
    def attend(
        self, slots: SlotAttention, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Append tokens and attend, as of :meth:`SlotAttention.attend`; mask bool [B, T]."""
        if self.cache is None:
            self.cache = slots.new_cache(q.shape[0])
        self.cache.check(q.shape[0], slots)
        out = slots.attend(hidden, q, k, v, mask=mask, cache=self.cache)
        self.first = self.first or q.shape[1]
        self.columns.append(q.shape[0], q.shape[1], mask)
        return out

    def skippable(self, training: bool) -> bool:
        """Whether this call is a training step, which needs no cache."""
        return training and torch.is_grad_enabled() and self.get_seq_length() == 0

    def check_filled(self) -> None:
        if self.skipped:
            raise ValueError(
                "this cache comes from a training step, which fills none; call the model in eval mode or under "
                "torch.no_grad() to make one that can be continued"
            )

    def get_seq_length(self) -> int:
        return self.columns.count

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns.count + query_length, 0

    def reset(self) -> None:
        self.cache, self.columns, self.first, self.skipped = None, Columns(), 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns (given as a negative number, as transformers does).

        Raises:
            ValueError: decode="segment" beyond the start of the open segment, "full" and "slots" into the first call,
                which is another computation than decoding. Nothing has changed then.
        """
        removed = removed_columns(tokens_to_remove, self.columns.count)
        if self.config.decode != "segment" and removed and self.columns.count - removed < self.first:
            raise ValueError(
                f"the first call on this cache gave {self.first} columns, which cannot be taken back in part with "
                f"decode={self.config.decode!r}: {removed} of {self.columns.count} were to go. Assisted decoding does "
                "this, and is not supported"
            )
        if self.cache is not None and removed:
            for row, length in enumerate(self.columns.crop(removed, self.cache.batch)):
                self.cache.rewind(length, row)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx)
            self.columns.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.cache is not None:
            self.reorder_cache(torch.arange(self.cache.batch)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.reorder_cache(torch.arange(self.cache.batch).repeat_interleave(repeats))


def layer_of(cache: Cache, layer_idx: int, config: HiCIConfig) -> HiCILayer:
    """The HiCI layer of a cache; an untouched plain layer, as generate() makes them, is replaced by one."""
    layers = cache.layers
    if cache.layer_class_to_replicate is not None:
        while len(layers) <= layer_idx:
            layers.append(cache.layer_class_to_replicate())
    layer = layers[layer_idx]
    if isinstance(layer, HiCILayer):
        if layer.config != config:
            raise ValueError("past_key_values was made for another HiCIConfig than that of this model")
        return layer
    if type(layer) is not DynamicLayer:
        raise ValueError(
            f"past_key_values has a {type(layer).__name__} in layer {layer_idx}; with HiCI pass a DynamicCache or none "
            "at all (cache_implementation 'static', 'quantized' and 'offloaded' are not supported)"
        )
    if layer.get_seq_length():
        raise ValueError("past_key_values holds tokens that were not given to HiCI; expected an empty cache")
    layers[layer_idx] = HiCILayer(config)
    return layers[layer_idx]
