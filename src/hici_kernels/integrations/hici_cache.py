"""The cache layer of a HiCI attention layer in transformers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..config import HiCIConfig
from ..nn.hici_cache import HiCICache
from ..nn.slot_attention import SlotAttention
from .layers import AppendedLayer
from .masks import Columns, new_tokens


class HiCILayer(AppendedLayer):
    """Wraps the :class:`HiCICache` of one layer. What it holds follows from config.decode, see :func:`apply_hici`."""

    method = "HiCI"
    # crop() works as far as the cache can go back, but not into the first call, whose tokens the slots have read
    is_croppable = False

    def __init__(self, config: HiCIConfig, leader: AppendedLayer | None) -> None:
        super().__init__(leader)
        self.config = config
        self.cache: HiCICache | None = None
        self.columns = Columns()
        self.first = 0  # columns of the first call

    @property
    def count(self) -> int:
        return self.columns.count

    @torch.compiler.disable
    def attend(
        self, slots: SlotAttention, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Append tokens and attend, as of :meth:`SlotAttention.attend`; mask of the model."""
        self.begin(q.shape[1], mask)
        mask = new_tokens(mask, q.shape[1], "HiCI")
        if self.cache is None:
            self.cache = slots.new_cache(q.shape[0])
        self.cache.check(q.shape[0], slots)
        out = slots.attend(hidden, q, k, v, mask=mask, cache=self.cache)
        self.first = self.first or q.shape[1]
        self.columns.append(q.shape[0], q.shape[1], mask)
        return out

    def skippable(self, training: bool) -> bool:
        """Whether this call is a training step, which needs no cache."""
        return training and torch.is_grad_enabled() and self.count == 0

    def reset(self) -> None:
        self.cache, self.columns, self.first, self.skipped = None, Columns(), 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns (given as a negative number, as transformers does).

        Raises:
            ValueError: decode="segment" beyond the start of the open segment, "full" and "slots" into the first call,
                which is another computation than decoding. Nothing has changed then.
        """
        removed = self.removed(tokens_to_remove)
        if self.config.decode != "segment" and removed and self.columns.count - removed < self.first:
            raise ValueError(
                f"the first call on this cache gave {self.first} columns, which cannot be taken back in part with "
                f"decode={self.config.decode!r}: {removed} of {self.columns.count} were to go. Assisted decoding does "
                "this, and is not supported"
            )
        if self.cache is not None and removed:
            for row, length in enumerate(self.columns.tokens(self.cache.batch, removed)):
                self.cache.rewind(length, row)
            self.columns.crop(removed)

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
    layers[layer_idx] = HiCILayer(config, next((x for x in layers if isinstance(x, HiCILayer)), None))
    return layers[layer_idx]
