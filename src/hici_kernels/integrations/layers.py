"""What the cache layers of HGA and HiCI have in common: the attention function appends to them, not the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .masks import removed_columns


class AppendedLayer(CacheLayerMixin):
    """A layer of a cache that a method fills while it attends, in three steps of every call of the model.

    ``call`` by the hook of the attention module, ``update`` by the module, which gets back its new keys and values
    alone, ``begin`` by the attention function. Whoever leaves one out would attend over the new keys only, and whoever
    does one twice would append twice: both are errors.

    leader: the first such layer of the cache; None = this one is it. Columns are counted by every layer, so that a call
    that ended between two layers is noticed by the next one, before it changes anything if the layers are there.
    """

    method = ""
    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, leader: AppendedLayer | None) -> None:
        super().__init__()
        self.leader = leader
        self.others: list[AppendedLayer] = []  # of the leader: the rest
        if leader is not None:
            leader.others.append(self)
        self.is_initialized = True
        self.skipped = False
        self._called = False

    @property
    def count(self) -> int:
        """Columns this layer has been given."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def call(self) -> None:
        self._called = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._called:
            raise ValueError(
                f"past_key_values was filled by {self.method}, which the model no longer runs; expected an empty cache"
            )
        return key_states, value_states

    def begin(self, tokens: int, mask: Tensor | None) -> None:
        """Before ``tokens`` columns are appended; mask as of :func:`~.masks.token_mask`.

        Raises:
            ValueError: called twice by the model, or another history than the model counts. Nothing has changed then.
        """
        if not self._called:
            raise ValueError(f"{self.method} cannot serve a model whose layers attend twice in one call on a cache")
        self._called = False
        known = (tokens if mask is None else mask.shape[3 if mask.ndim == 4 else 1]) - tokens
        held = next((x.count for x in (self, *self.others) if x.count != known), known)
        if held != known:
            raise ValueError(
                f"past_key_values holds {held} columns in a layer and {known} in the first one: a call on it did not "
                "end. Take that call's columns back with crop(-n), or start with an empty cache"
            )

    def skip(self) -> None:
        """A training step went past this cache: it holds nothing and must not be used."""
        self.skipped = True

    def check_filled(self) -> None:
        if self.skipped:
            raise ValueError(
                "this cache comes from a training step, which fills none; call the model in eval mode or under "
                "torch.no_grad() to make one that can be continued"
            )

    def get_seq_length(self) -> int:
        return self.count

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.count + query_length, 0

    def removed(self, tokens_to_remove: int) -> int:
        """How many columns crop() takes from this layer: down to what the leader, cropped before, holds then."""
        if self.leader is None:
            return min(removed_columns(tokens_to_remove, self.count), self.count)
        return max(0, self.count - self.leader.count)
