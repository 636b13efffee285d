"""apply_hga: routed long-context attention for an existing model, weights untouched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from .._dispatch import check_impl
from ..config import HGAConfig
from ..kv.layout import Layout
from ..kv.meter import TIERS
from ..kv.options import DEFAULT_HOST_BYTES, bank_slots, check_options
from ..kv.page_file import require_native
from ..kv.store import KVStore
from ..ops.hga_attention.api import hga_attention
from ..ops.hga_route.api import check_config
from .hga_cache import HGALayer, HGASettings, layer_of
from .host import Host, Note, check_attention, check_servable, head_counts, is_sliding, rope_of
from .masks import fused_attention, only_tokens, register
from .packed import one_document

NAME = "hga"


class HGACall(NamedTuple):
    """What an attention module's hook hands to the attention function."""

    settings: HGASettings
    leads: bool  # of the first layer served
    layer: HGALayer | None


class HGAHook:
    """Before an attention module runs: find (or make) its layer of the cache."""

    def __init__(self, settings: HGASettings, index: int) -> None:
        self.settings, self.index = settings, index

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        check_attention(module, NAME)
        cache = kwargs.get("past_key_values")
        layer = None
        if cache is not None:
            layer = layer_of(cache, int(module.layer_idx), self.index, self.settings)  # type: ignore[arg-type]
            layer.call()
        return args, {**kwargs, "hga": HGACall(self.settings, self.index == 0, layer)}


def apply_hga(
    model: nn.Module, config: HGAConfig, *, store: str = "device", impl: str | None = None, **store_options: Any
) -> nn.Module:
    """Route the attention of a model over its long history (HGA, arXiv 2606.30709), in place.

    Any decoder of transformers with RoPE (rotate-half, whole or leading dims; linear, Llama-3 and YaRN scaling are read
    from the model) and multi-head or grouped-query attention behind the attention interface. Layers with a sliding
    window stay as they are. No weight is added or changed. With budgets that cover the whole text, results equal the
    unmodified model's to rounding.

    ``generate()`` works with greedy search, sampling, beams, left-padded batches, chunked prefill, assisted and
    prompt-lookup decoding, and continued conversations (pass ``past_key_values`` on); every cache is a
    :class:`KVStore` behind it (:class:`HGACache` shows it). Training runs without a cache, gradients flow as of
    :func:`hga_attention`.

    Args:
        model: a transformers model, with or without an adapter around it.
        config: :class:`HGAConfig`.
        store: tier of the history: "device", "host" or "disk".
        impl: implementation of the operations.
        store_options: further arguments of :class:`KVStore`: device_bytes, host_bytes, path, cold_dtype, bank_pages,
            fetch, queue_depth, io, direct, prefetch. Sizes, batch, dtype and device are the model's.

    Returns:
        ``model``; :func:`restore` takes the change back. ``model.config.hga`` records it, so save_pretrained keeps it;
        from_pretrained gives the plain model, to which ``HGAConfig.from_dict(model.config.hga)`` can be applied.

    Unsupported, with an error: attention sinks, soft caps, RoPE whose frequencies change with the length ("dynamic",
    "longrope"), interleaved rotation, packed documents, static and quantized caches, attention dropout.

    Raises:
        TypeError, ValueError: before anything has changed, naming the argument, those of the store included.
        ImplError (a ValueError): store="disk" without the native library.
    """
    check_config(config)
    check_store(store, store_options)
    check_impl(impl)
    host = Host.of(model)
    host.check_free("apply_hga")
    served = [m for m in host.attentions if not is_sliding(m)]
    if not served:
        raise ValueError(f"every layer of {type(host.model).__name__} has a sliding window: nothing for HGA to do")
    sizes = {head_counts(m)[1:] for m in served}
    if len(sizes) > 1:
        raise ValueError(f"all layers must have the same kv heads and head dim, got {sorted(sizes)}")
    for attention in served:
        check_servable(attention, "HGA")
    rope = rope_of(host, served[0])
    for attention in served[1:]:
        other = rope_of(host, attention)
        if not torch.equal(other.inv_freq, rope.inv_freq):
            raise ValueError("all layers with full attention must rotate alike")
    kv_heads, head_dim = sizes.pop()
    if store == "disk":
        _check_bank(config, kv_heads, head_dim, **store_options)
    settings = HGASettings(config, rope, len(served), kv_heads, head_dim, store, dict(store_options), impl)
    host.own_config(model)
    note = Note("apply_hga", host.set_attention(NAME), config_fields=("hga",))
    for index, attention in enumerate(served):
        note.handles.append(attention.register_forward_pre_hook(HGAHook(settings, index), with_kwargs=True))
    note.config_before = {n: vars(host.model.config)[n] for n in note.config_fields if n in vars(host.model.config)}
    host.model.config.hga = config.to_dict()
    host.notes.append(note)
    return model


def check_store(store: str, options: Mapping[str, Any]) -> None:
    """Whether a :class:`KVStore` of any model would take this tier and these options; nothing is made.

    Raises:
        TypeError, ValueError: naming the argument. ImplError: store="disk" without the native library.
    """
    _checks.choice("store", store, TIERS)
    parameters = inspect.signature(KVStore).parameters
    known = [name for name in inspect.signature(check_options).parameters if name != "tier"]
    for name, value in options.items():
        if name == "tier":
            raise ValueError(f"tier is the argument store here, got tier={value!r}")
        if name in parameters and name not in known:
            raise ValueError(f"{name} is the model's, expected no such store option, got {name}={value!r}")
        if name not in known:
            raise TypeError(f"{name!r} is not an option of KVStore, got {value!r}; options: {', '.join(known)}")
    check_options(tier=store, **{name: options.get(name, parameters[name].default) for name in known})
    if store == "disk":
        require_native()


def _check_bank(
    config: HGAConfig,
    kv_heads: int,
    head_dim: int,
    host_bytes: int | None = None,
    cold_dtype: torch.dtype | None = None,
    **_: Any,
) -> None:
    """Whether host_bytes holds a page of the smallest dtype: the model may be cast, and autocast be used, later."""
    smallest = min(_checks.FLOATS, key=lambda dtype: dtype.itemsize)
    layout = Layout(config.chunk_size, config.group_size, kv_heads, 0, head_dim, smallest, cold_dtype)
    bank_slots(DEFAULT_HOST_BYTES if host_bytes is None else host_bytes, layout.stride)


def hooks_of(model: nn.Module) -> dict[nn.Module, HGAHook]:
    """The attention modules that HGA serves, with their hooks."""
    found = {
        attention: hook
        for attention in Host.of(model).attentions
        for hook in attention._forward_pre_hooks.values()
        if isinstance(hook, HGAHook)
    }
    if not found:
        raise ValueError("model must have been changed by apply_hga")
    return found


def hga_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    hga: HGACall | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, T, D], key and value [B, Hkv, T, D], rotated; out [B, T, Hq, D]."""
    if hga is None:
        if is_sliding(module):
            rest = {"position_ids": position_ids, **kwargs}
            return fused_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest)
        raise ValueError("attention implementation 'hga' needs apply_hga(model, config)")
    if dropout:
        raise ValueError(f"HGA does not support attention dropout, got {dropout}")
    if kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("HGA does not support packed documents, got cu_seq_lens_q")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    usual = q.shape[-1] ** -0.5
    settings, leads, layer = hga
    if leads and attention_mask is None and (layer is not None or torch.compiler.is_compiling()):
        q = one_document(q, position_ids, "HGA")
    if layer is not None:
        layer.check_filled()
        if not (module.training and torch.is_grad_enabled() and layer.count == 0):
            # a store scales by D ** -0.5; a positive factor on q never changes a route
            q = q if scaling is None or scaling == usual else q * (scaling / usual)
            return layer.attend(q, k, v, attention_mask), None
        layer.skip()
    mask = only_tokens(attention_mask, q.shape[1], "HGA")
    out = hga_attention(
        q,
        k,
        v,
        settings.config,
        rope=settings.rope_on(q.device),
        attention_mask=mask,
        scale=scaling,
        impl=settings.impl,
    )
    assert isinstance(out, Tensor)
    return out, None


register(NAME, hga_forward)
