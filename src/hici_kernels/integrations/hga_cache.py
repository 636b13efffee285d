"""Caches of transformers whose layers keep their history in a KVStore."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .. import _checks
from ..config import HGAConfig
from ..kv.store import KVStore
from ..rope import Rope
from .masks import Columns, new_tokens, removed_columns


@dataclass(frozen=True, eq=False)
class HGASettings:
    """What :func:`apply_hga` was told and found: sizes, rotation, tier of the history and its limits."""

    config: HGAConfig
    rope: Rope
    layers: int
    kv_heads: int
    head_dim: int
    tier: str
    options: dict[str, Any] = field(default_factory=dict)
    impl: str | None = None

    def rope_on(self, device: torch.device) -> Rope:
        """The rotation, its frequencies where the model is now."""
        if self.rope.inv_freq.device == device:
            return self.rope
        return dataclasses.replace(self.rope, inv_freq=self.rope.inv_freq.to(device))

    def __deepcopy__(self, memo: Any) -> HGASettings:
        """Itself: caches and models that are copied still belong to each other."""
        return self


class HGAHistory:
    """The KVStore that all layers of one cache share; made by the first call, which knows batch, dtype and device."""

    def __init__(self, settings: HGASettings) -> None:
        self.settings = settings
        self.store: KVStore | None = None
        self.columns = Columns()
        self._mask: Tensor | None = None

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Append tokens [B, T, heads, D] to layer ``index`` and attend over its history; mask [B, columns so far]."""
        settings = self.settings
        if self.store is None:
            self.store = KVStore(
                settings.config,
                rope=settings.rope_on(q.device),
                layers=settings.layers,
                kv_heads=settings.kv_heads,
                head_dim=settings.head_dim,
                batch=q.shape[0],
                dtype=_checks.dtype_under_autocast(v),
                device=q.device,
                tier=settings.tier,
                **settings.options,
            )
        if index == 0:  # the mask is that of all layers: read it once
            tail = new_tokens(mask, q.shape[1], "HGA")
            self._mask = None if tail is None or bool(tail.all()) else tail
        impl = {} if settings.impl is None else {"impl": settings.impl}
        out = self.store.attend(index, q, k, v, attention_mask=self._mask, **impl)
        if index == 0:
            self.columns.append(q.shape[0], q.shape[1], self._mask)
        return out

    def __deepcopy__(self, memo: Any) -> HGAHistory:
        """A history of its own with the same content, in the same tier, by way of a file."""
        made = HGAHistory(self.settings)
        memo[id(self)] = made
        made.columns, made._mask = copy.deepcopy(self.columns, memo), copy.deepcopy(self._mask, memo)
        if self.store is not None:
            options = dict(self.settings.options)
            options.pop("cold_dtype", None)  # the file says it
            if "path" in options:
                options["directory"] = options.pop("path")
            with tempfile.TemporaryDirectory(dir=options.get("directory")) as folder:
                file = Path(folder) / "history"
                self.store.save(file)
                made.store = KVStore.load(file, device=self.store.device, tier=self.settings.tier, **options)
        return made

    def reset(self) -> None:
        if self.store is not None:
            self.store.close()
        self.store, self.columns, self._mask = None, Columns(), None

    def crop(self, removed: int) -> None:
        if self.store is not None and removed:
            for row, length in enumerate(self.columns.crop(removed, self.store.batch)):
                self.store.rewind(length, row)

    def reorder(self, rows: Tensor) -> None:
        if self.store is not None:
            self.store.reorder(rows)
            self.columns.reorder(rows)


class HGALayer(CacheLayerMixin):
    """One layer's view of an :class:`HGAHistory`. The first layer passes on what concerns all of them."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, history: HGAHistory, index: int) -> None:
        super().__init__()
        self.history, self.index = history, index
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone: the attention function appends them to the store."""
        return key_states, value_states

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Append and attend; shapes as of :meth:`KVStore.attend`."""
        out = self.history.attend(self.index, q, k, v, mask)
        self.length += q.shape[1]
        return out

    def skip(self) -> None:
        """A training step went past this cache: it holds nothing and must not be used."""
        self.length = -1

    def check_filled(self) -> None:
        if self.length < 0:
            raise ValueError(
                "this cache comes from a training step, which fills none; call the model in eval mode or under "
                "torch.no_grad() to make one that can be continued"
            )

    def get_seq_length(self) -> int:
        return max(self.length, 0)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.length = 0
        if self.index == 0:
            self.history.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns (given as a negative number, as transformers does)."""
        removed = removed_columns(tokens_to_remove, self.length)
        self.length = max(0, self.length - removed)
        if self.index == 0:
            self.history.crop(removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.index == 0:
            self.history.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.index == 0 and self.history.store is not None:
            self.history.reorder(torch.arange(self.history.store.batch)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.index == 0 and self.history.store is not None:
            self.history.reorder(torch.arange(self.history.store.batch).repeat_interleave(repeats))


class HGACache(DynamicCache):
    """A cache to hand to ``generate(past_key_values=...)`` or to the model, when its store is of interest.

    Without one, every call of ``generate`` makes its own. Layers that HGA leaves alone (sliding windows) keep their
    usual cache.

    Args:
        model: changed by :func:`apply_hga`.
    """

    def __init__(self, model: Any) -> None:
        from .hga import hooks_of

        hooks = hooks_of(model)
        super().__init__(config=next(iter(hooks)).config)
        self.history = HGAHistory(next(iter(hooks.values())).settings)
        attention: Any
        for attention, hook in hooks.items():
            self.layers[attention.layer_idx] = HGALayer(self.history, hook.index)

    @property
    def store(self) -> KVStore | None:
        """The history, None before the first call."""
        return self.history.store

    def stats(self) -> dict[str, Any]:
        """:meth:`KVStore.stats`; empty before the first call."""
        return {} if self.store is None else self.store.stats()

    def close(self) -> None:
        """Free the history and its files."""
        self.reset()

    def __enter__(self) -> HGACache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def layer_of(cache: Cache, layer_idx: int, index: int, settings: HGASettings) -> HGALayer:
    """The HGA layer of a cache; an untouched plain layer, as generate() makes them, is replaced by one."""
    layers = cache.layers
    if cache.layer_class_to_replicate is not None:
        while len(layers) <= layer_idx:
            layers.append(cache.layer_class_to_replicate())
    layer = layers[layer_idx]
    if isinstance(layer, HGALayer):
        if layer.history.settings is not settings:
            raise ValueError("past_key_values was made for another model, or before apply_hga was called again")
        return layer
    if type(layer) is not DynamicLayer:
        raise ValueError(
            f"past_key_values has a {type(layer).__name__} in layer {layer_idx}; with HGA pass an HGACache, a "
            "DynamicCache or none at all (cache_implementation 'static', 'quantized' and 'offloaded' are not supported)"
        )
    if layer.get_seq_length():
        raise ValueError("past_key_values holds tokens that were not given to HGA; expected an empty cache")
    history = next((x.history for x in layers if isinstance(x, HGALayer)), None) or HGAHistory(settings)
    layers[layer_idx] = HGALayer(history, index)
    return layers[layer_idx]
