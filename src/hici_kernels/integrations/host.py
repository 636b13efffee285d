"""What the integrations read of a transformers model, and what they note on it so that it can be taken back."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import StaticLayer

from ..rope import Rope

_NOTES = "_hici_kernels"


@dataclass
class Host:
    """The parts of a model that attention needs.

    model: the outermost transformers model (an adapter may be around it). decoder: the one with the layers.
    attentions: the attention modules of the layers that have one.
    """

    model: PreTrainedModel
    decoder: PreTrainedModel
    attentions: list[nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        outer = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        if outer is None:
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        decoders = [
            m for m in outer.modules() if isinstance(m, PreTrainedModel) and hasattr(m, "layers") and has_rotary(m)
        ]
        if len(decoders) != 1:
            raise ValueError(
                f"model must have one decoder with layers and rotary_emb, {type(outer).__name__} has {len(decoders)}"
            )
        found = [layer.self_attn for layer in decoders[0].layers if hasattr(layer, "self_attn")]
        attentions = [m for m in found if hasattr(m, "layer_idx") and hasattr(m, "head_dim")]
        odd = next((m for m in attentions if not hasattr(m, "config")), None)
        if odd is not None:
            raise ValueError(
                f"{type(outer).__name__} has layers with {type(odd).__name__}, which has no config to read"
            )
        if not attentions:
            raise ValueError(f"{type(outer).__name__} has no attention layers of the kind this library can serve")
        return cls(outer, decoders[0], attentions)

    @property
    def notes(self) -> list[Note]:
        return vars(self.model).setdefault(_NOTES, [])

    def check_free(self, method: str) -> None:
        """At most one method at a time may own a model's attention."""
        for note in self.notes:
            if note.attention is not None:
                raise ValueError(f"{method}: {note.method} is already applied to this model; call restore(model) first")

    def check_interface(self) -> None:
        if not type(self.decoder)._can_set_attn_implementation():
            raise ValueError(f"{type(self.decoder).__name__} does not use the attention interface of transformers")

    def own_config(self, model: nn.Module) -> None:
        """Give ``model``, of which this is the host, a configuration of its own: several may be made from one."""
        copies: dict[int, Any] = {}
        for module in model.modules():
            if isinstance(vars(module).get("config"), PreTrainedConfig):
                vars(module)["config"] = copy.deepcopy(vars(module)["config"], copies)

    def set_attention(self, name: str) -> str:
        """Make ``name`` the decoder's attention implementation and return the former one."""
        self.check_interface()
        before = self.decoder.config._attn_implementation
        self.decoder.set_attn_implementation(name)
        return before


@dataclass
class Note:
    """What a method changed on a model, as data (a copied model must not undo changes of the original)."""

    method: str
    attention: str | None = None  # attention implementation before
    handles: list[RemovableHandle] = field(default_factory=list)
    children: tuple[str, ...] = ()  # modules added to every attention module
    config_fields: tuple[str, ...] = ()  # added to the config
    config_before: dict[str, Any] = field(default_factory=dict)  # those of them that were there, with their values
    config_class: type | None = None  # of the config before
    model_class: type | None = None  # what restore leaves of a model that was built with slots
    rotary: nn.Module | None = None  # of the decoder before
    rope_parameters: dict[str, Any] | None = None
    parted_head: bool = False  # the head has a matrix of its own, which the base model ties to its embedding


def restore(model: nn.Module) -> nn.Module:
    """Take back everything that apply_hici, apply_hga and the baselines changed: the model is what it was, bit for bit.

    Its configuration stays a copy of its own, equal to the former one, which other models may share.

    Slots added by :func:`apply_hici` are dropped (save them first, :func:`save_hici`). A model that was not changed is
    returned as it is.

    Raises:
        TypeError: model is no transformers model.
    """
    host = Host.of(model)
    for note in reversed(host.notes):
        for handle in note.handles:
            handle.remove()
        for name in note.children:
            for attention in host.attentions:
                delattr(attention, name)
        if note.config_class is not None:
            host.model.config.__class__ = note.config_class
        if note.model_class is not None:
            host.model.__class__ = note.model_class
        for name in note.config_fields:
            vars(host.model.config).pop(name, None)
        vars(host.model.config).update(note.config_before)
        if note.rotary is not None:
            host.decoder.rotary_emb = note.rotary
            host.decoder.config.rope_parameters = note.rope_parameters
        if note.attention is not None:
            host.set_attention(note.attention)
    vars(host.model).pop(_NOTES, None)
    return model


def has_rotary(module: nn.Module) -> bool:
    return isinstance(getattr(module, "rotary_emb", None), nn.Module)


def offloaded_to(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module whose weights it keeps elsewhere, None for any other module."""
    for part in module.modules():
        found = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if found is not None and any(p.device.type == "meta" for p in part.parameters(recurse=False)):
            return torch.device(found)
    return None


@contextlib.contextmanager
def weights_of(module: nn.Module) -> Iterator[None]:
    """The weights of a module are at hand within, where accelerate keeps them elsewhere too."""
    if offloaded_to(module) is None:
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def head_counts(attention: nn.Module) -> tuple[int, int, int]:
    """Query heads, kv heads and head dim of an attention module."""
    config: Any = attention.config
    heads, dim = int(config.num_attention_heads), int(attention.head_dim)  # type: ignore[arg-type]
    groups = getattr(attention, "num_key_value_groups", None)
    kv = heads // int(groups) if isinstance(groups, int) else int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, kv, dim


def is_sliding(attention: nn.Module) -> bool:
    """Whether this layer attends within a sliding window (and so needs no long-context method)."""
    window = getattr(attention, "sliding_window", None)
    if window is None and getattr(attention, "layer_type", None) is None:
        config: Any = attention.config
        # Mistral keeps the window in its config only and uses it in every layer
        window = getattr(config, "sliding_window", None) if getattr(config, "layer_types", None) is None else None
    return window is not None


def check_attention(module: nn.Module, name: str) -> None:
    """Refuse to run where the model was given another attention function than the method's, which has hooks in it."""
    config: Any = module.config
    found = config._attn_implementation
    if found != name:
        raise ValueError(
            f"attention implementation must stay {name!r}, got {found!r}: call restore(model) to take it back"
        )


def check_growing(module: nn.Module, cache: Any, method: str) -> None:
    """Refuse a cache whose keys are a buffer of the final length: what is filled of it, attention is not told."""
    layers = getattr(cache, "layers", ())
    index = int(module.layer_idx)  # type: ignore[arg-type]
    if index < len(layers) and isinstance(layers[index], StaticLayer):
        raise ValueError(f"{method} needs a cache that grows, got {type(cache).__name__} with static layers")


def check_servable(attention: nn.Module, method: str) -> None:
    """Refuse attention that is more than a softmax over scaled products, rather than leave out what is more."""
    name = type(attention).__name__
    for attribute, what in (("sinks", "attention sinks"), ("attn_logit_softcapping", "a soft cap on its scores")):
        if getattr(attention, attribute, None) is not None:
            raise ValueError(f"{method} does not support {what}, which {name} has")
    config: Any = attention.config
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[attention.layer_idx] == "chunked_attention":
        raise ValueError(f"{method} needs attention over the whole text, {name} attends within chunks")
    if getattr(attention, "v_head_dim", attention.head_dim) != attention.head_dim:
        raise ValueError(
            f"{method} needs keys and values of one head dim, {name} has {attention.v_head_dim} for values"
        )
    if hasattr(attention, "prepare_dynamic_mask"):
        raise ValueError(f"{method} does not support masks that depend on the keys, which {name} makes")
    if getattr(attention, "is_kv_shared_layer", False):
        raise ValueError(f"{method} does not support layers that share keys and values, as {name} does")
    if getattr(attention, "is_causal", True) is False:
        raise ValueError(f"{method} needs causal attention, {name} is bidirectional")


def rope_of(host: Host, attention: nn.Module) -> Rope:
    """The rotation of one layer, read from the model (so every kind of frequency scaling is in it) and checked.

    The check rotates random vectors with the model's own function: a model that pairs dims in another way, or does not
    rotate this layer, is refused.
    """
    rotary: Any = host.decoder.rotary_emb
    layer_type = getattr(attention, "layer_type", None)
    per_type = not hasattr(rotary, "inv_freq")
    prefix = f"{layer_type}_" if per_type else ""
    inv_freq = getattr(rotary, f"{prefix}inv_freq", None)
    if inv_freq is None:
        raise ValueError(f"cannot read the RoPE frequencies of {type(rotary).__name__}")
    kind = getattr(rotary, "rope_type", "default")
    kind = kind.get(layer_type, "default") if isinstance(kind, dict) else kind
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"RoPE type {kind!r} changes its frequencies with the length, so cached keys and new ones would not fit; "
            "expected default, linear, llama3, yarn or proportional"
        )
    if getattr(attention, "use_rope", True) in (False, 0):
        raise ValueError(f"layer {attention.layer_idx} of {type(attention).__name__} does not rotate its keys")
    rope = Rope(inv_freq.detach().clone(), float(getattr(rotary, f"{prefix}attention_scaling", 1.0)))
    if inv_freq.device.type != "meta":
        _check_layout(rotary, attention, rope, layer_type if per_type else None)
    return rope


def _check_layout(rotary: Any, attention: nn.Module, rope: Rope, layer_type: str | None) -> None:
    module = type(attention).__module__
    apply = getattr(sys.modules[module], "apply_rotary_pos_emb", None)
    if apply is None:
        raise ValueError(f"cannot tell how {type(attention).__name__} rotates: {module} has no apply_rotary_pos_emb")
    device = rope.inv_freq.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 5, 2 * len(rope.inv_freq), generator=generator).to(device)
    at = torch.arange(0, 50, 10, device=device)[None]
    cos, sin = rotary(x, at) if layer_type is None else rotary(x, at, layer_type)
    theirs = apply(x, x, cos, sin)[0]
    ours = rope.rotate(x.transpose(1, 2), at).transpose(1, 2)
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-4):
        raise ValueError(
            f"{type(attention).__name__} rotates in another layout than rotate-half of the first "
            f"{2 * len(rope.inv_freq)} dims, which is not supported"
        )
