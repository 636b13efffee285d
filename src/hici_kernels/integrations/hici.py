"""apply_hici: segments and slots for an existing model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from .._dispatch import check_impl
from ..config import HiCIConfig
from ..nn.global_integrator import GlobalIntegrator
from ..nn.local_constructor import LocalConstructor
from ..nn.slot_attention import SlotAttention, slot_modules
from .families import hici_config_class
from .families.base import HiCIModel
from .hici_cache import HiCILayer, layer_of
from .host import (
    Host,
    Note,
    check_attention,
    check_servable,
    head_counts,
    is_sliding,
    offloaded_to,
    weights_of,
)
from .masks import only_tokens, register
from .packed import one_document

NAME = "hici"
CHILDREN = ("local_constructor", "global_integrator")


class HostedSlots(SlotAttention):
    """Slot attention with the projections and slot modules of a transformers attention module, adapters included."""

    def __init__(self, module: Any, config: HiCIConfig, impl: str | None) -> None:
        self.module, self.config, self.impl = module, config, impl
        self.hidden_size = int(module.config.hidden_size)
        _, self.num_kv_heads, self.head_dim = head_counts(module)
        # looked up in every call: an adapter may have replaced them
        self.k_proj: nn.Module = module.k_proj
        self.v_proj: nn.Module = module.v_proj
        self.local_constructor: LocalConstructor = module.local_constructor
        self.global_integrator: GlobalIntegrator = module.global_integrator


class HiCICall(NamedTuple):
    """What an attention module's hook hands to the attention function."""

    slots: HostedSlots
    leads: bool  # of the first layer
    hidden: Tensor
    layer: HiCILayer | None


class HiCIHook:
    """Before an attention module runs: keep its hidden states, find (or make) its layer of the cache."""

    def __init__(self, config: HiCIConfig, impl: str | None, index: int) -> None:
        self.config, self.impl, self.index = config, impl, index

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        check_attention(module, NAME)
        cache = kwargs.get("past_key_values")
        layer = None
        if cache is not None:
            layer = layer_of(cache, int(module.layer_idx), self.config)  # type: ignore[arg-type]
            layer.call()
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        slots = HostedSlots(module, self.config, self.impl)
        return args, {**kwargs, "hici": HiCICall(slots, self.index == 0, hidden, layer)}


def apply_hici(model: nn.Module, config: HiCIConfig, *, impl: str | None = None) -> nn.Module:
    """Give every attention layer of a model HiCI's segments and slots (arXiv 2603.20843), in place.

    Every attention module gets the children ``local_constructor`` and ``global_integrator`` (state-dict keys as
    published), new and trainable, in the dtype of its projections and on the device where these run (slots of a layer
    that accelerate offloads stay there); global_queries start from the largest embedding rows, as published. Nothing
    else is added or changed. Slots pass through the layer's own k_proj
    and v_proj, adapters included, without RoPE and without k_norm. :func:`load_hici` fills the slots from a checkpoint.

    Which tokens see what, and what a cache holds, by config.decode:
        "segment"  One semantics for training, prefill and decoding: a token sees the slots of the segments before its
                   own, recurrence_len tokens of the previous one, and its own segment up to itself. Any split of a text
                   into calls agrees to rounding. The cache holds the open segment, the recurrence, the slots and their
                   running statistics, and does not grow with the text. It cannot be cropped beyond the open segment.
        "full"     (published) The first call on an empty cache is the prefill, with segments and slots; every later
                   token attends to all cached tokens and to no slots. The cache holds all tokens. A prompt given in
                   pieces is therefore another computation than the same prompt at once.
        "slots"    (published for the fine-tuned models) The same, and G and all local slots of the prompt stay visible.

    config.cut defaults to "token" here: rows of a padded batch equal the rows alone.

    ``generate()`` works with greedy search, sampling, beams and left-padded batches; chunked prefill and conversations
    continued by more than one token need decode="segment" to mean the same as the whole text at once. Assisted and
    prompt-lookup decoding are refused: candidates would be read as part of the prompt, or close a segment. A training
    step (model.train(), gradients enabled) fills no cache. Packed documents: cu_seq_lens_q, or position_ids that
    restart (batch 1, no cache). model(..., hici_segment_len=n) cuts one call without a cache into other segments.

    Args:
        model: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE or any other decoder of transformers with k_proj and v_proj
            behind the attention interface, all layers with full attention; with or without an adapter around it.
        config: :class:`HiCIConfig`.
        impl: implementation of the operations.

    Returns:
        ``model``; :func:`restore` takes the change back. ``model.config.hici`` records the configuration. Models of
        the families named above are saved by save_pretrained as model type "hici_<family>", which
        AutoModelForCausalLM.from_pretrained loads once hici_kernels.integrations is imported.

    Raises:
        TypeError, ValueError: before anything has changed.
    """
    if not isinstance(config, HiCIConfig):
        raise TypeError(f"config must be a HiCIConfig, got {type(config).__name__}")
    check_impl(impl)
    config = config.with_default_cut("token")
    host = Host.of(model)
    host.check_free("apply_hici")
    check_hici(host)
    made = []
    attention: Any
    embedding: Any = host.model.get_input_embeddings()
    with weights_of(embedding):
        for attention in host.attentions:
            weight = attention.k_proj.weight
            # quantised projections hold integers
            dtype = weight.dtype if weight.is_floating_point() else host.model.dtype
            with torch.device(offloaded_to(attention.k_proj) or weight.device):
                constructor, integrator = slot_modules(int(attention.config.hidden_size), config, impl)
            made.append((constructor.to(dtype), integrator.to(dtype)))
            rows = embedding.weight
            if rows.device.type != "meta" and rows.shape[0] >= config.global_slots:
                integrator.init_queries(rows.to(integrator.global_queries.device))
    host.own_config(model)
    before = host.model.config.__class__
    changed = hici_config_class(before)
    note = Note("apply_hici", host.set_attention(NAME), children=CHILDREN, config_fields=("hici",), config_class=before)
    if changed is not None:
        host.model.config.__class__ = changed
        if changed is before:  # built as such by from_pretrained: its plain form is what restore() leaves
            note.config_class = before.__mro__[1]
            kinds = type(host.model).__mro__
            note.model_class = next(kind for kind in kinds if not issubclass(kind, HiCIModel))
    for index, (attention, (constructor, integrator)) in enumerate(zip(host.attentions, made, strict=True)):
        attention.local_constructor, attention.global_integrator = constructor, integrator
        note.handles.append(attention.register_forward_pre_hook(HiCIHook(config, impl, index), with_kwargs=True))
    host.model.config.hici = config.to_dict()
    host.notes.append(note)
    return model


def check_hici(host: Host) -> None:
    """Whether HiCI can serve every attention layer of a model."""
    host.check_interface()
    for attention in host.attentions:
        name = type(attention).__name__
        check_servable(attention, "HiCI")
        if is_sliding(attention):
            raise ValueError(f"HiCI needs full attention in every layer, layer {attention.layer_idx} has a window")
        if not hasattr(attention, "k_proj") or not hasattr(attention, "v_proj"):
            raise ValueError(f"HiCI projects slots with k_proj and v_proj, which {name} does not have")
        if any(hasattr(attention, child) for child in CHILDREN):
            raise ValueError(f"{name} already has {' and '.join(CHILDREN)}")


def config_of(model: nn.Module) -> HiCIConfig:
    """The configuration a model was changed with."""
    for attention in Host.of(model).attentions:
        for hook in attention._forward_pre_hooks.values():
            if isinstance(hook, HiCIHook):
                return hook.config
    raise ValueError("model must have been changed by apply_hici")


def hici_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    hici: HiCICall | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    hici_segment_len: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, T, D], key and value [B, Hkv, T, D], rotated; out [B, T, Hq, D].

    hici_segment_len: for this call of the model instead of config.segment_len; not with a cache. An argument, so that
    every layer and every recomputation under gradient checkpointing cuts alike.
    """
    if hici is None:
        raise ValueError("attention implementation 'hici' needs apply_hici(model, config)")
    if dropout:
        raise ValueError(f"HiCI does not support attention dropout, got {dropout}")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    usual = q.shape[-1] ** -0.5
    if scaling is not None and scaling != usual:
        q = q * (scaling / usual)
    slots, leads, hidden, layer = hici
    if hici_segment_len is not None:
        _checks.integer("hici_segment_len", hici_segment_len, 1)
        if layer is not None and not layer.skippable(module.training):
            raise ValueError("hici_segment_len is for training: a cache was made for the segment_len of the model")
        slots.config = replace(slots.config, segment_len=hici_segment_len)
    plain = attention_mask is None and cu_seq_lens_q is None
    if leads and plain and (layer is not None or torch.compiler.is_compiling()):
        q = one_document(q, position_ids, "HiCI")
    if layer is not None:
        layer.check_filled()
        if not layer.skippable(module.training):
            if cu_seq_lens_q is not None:
                raise ValueError("cu_seq_lens_q cannot be combined with a cache: pass use_cache=False")
            return layer.attend(slots, hidden, q, k, v, attention_mask).unflatten(-1, q.shape[2:]), None
        layer.skip()
    if attention_mask is not None and attention_mask.ndim == 4:
        # made by transformers because positions restart; any other mask of this kind is refused below
        restarts = _restarts(position_ids, hidden)
        if restarts is not None and (not leads or _is_packed(attention_mask, restarts)):
            attention_mask, cu_seq_lens_q = None, restarts if cu_seq_lens_q is None else cu_seq_lens_q
    mask, total = only_tokens(attention_mask, q.shape[1], "HiCI"), None
    if cu_seq_lens_q is not None:
        total = slots.check_packed(hidden, cu_seq_lens_q, mask, None, kwargs.get("total_segments"))
        cu_seq_lens_q = cu_seq_lens_q.to(device=hidden.device, dtype=torch.int32)
    out = slots.attend(hidden, q, k, v, mask=mask, cu_seqlens=cu_seq_lens_q, total_segments=total)
    return out.unflatten(-1, q.shape[2:]), None


def _restarts(position_ids: Tensor | None, hidden: Tensor) -> Tensor | None:
    """int32 [docs+1] of packed documents whose positions restart, None where that is not what the mask says."""
    if position_ids is None or hidden.shape[0] != 1:
        return None
    at = position_ids[0].cpu()
    starts = (at.diff() != 1).nonzero()[:, 0] + 1
    if not len(starts) or bool((at[starts] != 0).any()):
        return None
    ends = torch.tensor([0, len(at)])
    return torch.cat((ends[:1], starts, ends[1:])).to(torch.int32)


def _is_packed(mask: Tensor, cu_seqlens: Tensor) -> bool:
    """Whether a bool mask [1, 1, S, S] is that of documents [docs+1], each causal, and not one of the caller's own."""
    if mask.dtype != torch.bool or mask.shape[:2] != (1, 1):
        return False
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        rows = mask[0, 0, start:stop]
        own = rows[:, start:stop]
        if bool(rows[:, :start].any() | rows[:, stop:].any()) or not torch.equal(own, torch.ones_like(own).tril()):
            return False
    return True


register(NAME, hici_forward)
