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
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .. import _checks
from ..config import HGAConfig
from ..kv.store import KVStore
from ..rope import Rope
from .layers import AppendedLayer
from .masks import Columns, new_tokens


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
        return dataclasses.replace(self.rope, inv_freq=self.rope.frequencies(device))

    def __deepcopy__(self, memo: Any) -> HGASettings:
        """Itself: caches and models that are copied still belong to each other."""
        return self


class HGAHistory:
    """The KVStore that all layers of one cache share; made by the first call, which knows batch, dtype and device."""

    def __init__(self, settings: HGASettings) -> None:
        self.settings = settings
        self.store: KVStore | None = None
        self.columns = Columns()
        self.used = 0  # layers that have been called: a model may stop early
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
            self._check_columns()
            tail = new_tokens(mask, q.shape[1], "HGA")
            self._mask = None if tail is None or bool(tail.all()) else tail
        impl = {} if settings.impl is None else {"impl": settings.impl}
        out = self.store.attend(index, q, k, v, attention_mask=self._mask, **impl)
        if index == 0:
            self.columns.append(q.shape[0], q.shape[1], self._mask)
        self.used = max(self.used, index + 1)
        return out

    def _check_columns(self) -> None:
        assert self.store is not None
        known, held = self.columns.tokens(self.store.batch), self.store.layer_lengths(0).tolist()
        if held != known:
            raise ValueError(
                f"past_key_values was given {known} tokens a row, its store holds {held}: shorten a cache with "
                "crop(-n), not by its store"
            )

    def __deepcopy__(self, memo: Any) -> HGAHistory:
        """A history of its own with the same content, in the same tier, by way of a file."""
        made = HGAHistory(self.settings)
        memo[id(self)] = made
        made.used = self.used
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
        self.store, self.columns, self._mask, self.used = None, Columns(), None, 0

    def crop(self, removed: int) -> None:
        if self.store is not None and removed:
            lengths = self.columns.tokens(self.store.batch, removed)
            used = range(self.used)
            held = torch.stack([self.store.layer_lengths(i) for i in used]).amin(0).tolist()
            if any(x > y for x, y in zip(lengths, held, strict=True)):
                raise ValueError(
                    f"a call that did not end left {held} tokens a row: crop() to no more, not to {lengths}"
                )
            for row, length in enumerate(lengths):
                self.store.rewind(length, row, layers=used)
            self.columns.crop(removed)

    def reorder(self, rows: Tensor) -> None:
        if self.store is not None:
            self.store.reorder(rows)
            self.columns.reorder(rows)


class HGALayer(AppendedLayer):
    """One layer's view of an :class:`HGAHistory`. The first layer passes on what concerns all of them."""

    method = "HGA"
    is_croppable = True

    def __init__(self, history: HGAHistory, index: int, leader: AppendedLayer | None) -> None:
        super().__init__(leader)
        self.history, self.index = history, index
        self.length = 0

    @property
    def count(self) -> int:
        return self.length

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Append and attend; shapes as of :meth:`KVStore.attend`."""
        self.begin(q.shape[1], mask)
        out = self.history.attend(self.index, q, k, v, mask)
        self.length += q.shape[1]
        return out

    def reset(self) -> None:
        self.length, self.skipped = 0, False
        if self.index == 0:
            self.history.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns (given as a negative number, as transformers does).

        Raises:
            ValueError: into what only some layers hold after a call that did not end. Nothing has changed then.
        """
        removed = self.removed(tokens_to_remove)
        if self.index == 0:
            self.history.crop(removed)
        self.length -= removed

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
        leader = None
        for attention, hook in hooks.items():
            self.layers[attention.layer_idx] = made = HGALayer(self.history, hook.index, leader)
            leader = leader or made

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
    leader = next((x for x in layers if isinstance(x, HGALayer)), None)
    layers[layer_idx] = HGALayer(HGAHistory(settings) if leader is None else leader.history, index, leader)
    return layers[layer_idx]
