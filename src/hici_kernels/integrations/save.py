"""save_hici and merge_hici: what was trained, alone or together with its base."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import files, names
from .hici import config_of
from .host import Host
from .published import CONFIG_FILE
from .rope_scaling import linear_factor

# beginnings of LoRA that leave the weights beside it as they are
_BESIDE = (True, False, "gaussian", "eva", "orthogonal")


def save_hici(model: nn.Module, path: str | Path, *, also: Collection[str] = ()) -> None:
    """Save what HiCI training changes, in the published layout: a base model and this directory give the model again.

    Writes ``trainable_params.safetensors`` (embeddings, norms and slot modules, under the base model's names, in their
    own dtype), ``hici_config.json`` (what shapes cannot tell: the HiCIConfig and the RoPE factor) and, where the model
    carries LoRA, ``adapter_model.safetensors`` and ``adapter_config.json``. Also what an adapter trains as a whole
    (``modules_to_save``), every bias where it trains biases (``bias`` not "none"), and a head that the base model ties
    to its embedding and training has parted from it. Other weights are taken to be those of the base model and are
    not written.

    Args:
        also: names, as the base model has them, of further tensors that training changed. :func:`load_hici` takes them
            from the same file.

    Raises:
        ValueError: the model has no slots, more than one adapter, one that is not LoRA, changes the base model's
            weights where it begins (PiSSA, OLoRA and others) or is merged into them, RoPE scaling of another kind than
            linear, or no tensor of a name in ``also``; path holds an adapter that the model does not carry.
    """
    path = Path(path)
    host, config = Host.of(model), config_of(model)
    factor = linear_factor(host)
    if factor is None:
        raise ValueError("the checkpoint layout knows linear RoPE scaling only; the model has another kind")
    _check_adapters(model)
    tensors = host.model.state_dict()
    lora = _lora_config(model) if any(names.is_lora(raw) for raw in tensors) else None
    biases, wanted = getattr(lora, "bias", "none") != "none", set(also)
    wanted |= _parted_head(host)
    trainable: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for raw, x in tensors.items():
        name = names.canonical(raw)
        if name is None:
            continue
        if names.is_lora(name):
            module, part = names.lora_parts(name)
            adapter[f"{names.PEFT_PREFIX}{module}.lora_{part}.weight"] = x
        elif (
            names.is_trainable(name)
            or names.is_kept_whole(raw)
            or name in wanted
            or (biases and name.endswith(".bias"))
        ):
            trainable[name] = x
    absent = sorted(wanted - set(trainable))
    if absent:
        raise ValueError(f"also names {absent[0]!r}, which the model does not have")
    files.check_adapter(path, lora is not None)
    content = {"hici": config.to_dict(), "rope_factor": factor}
    files.clear_shards(path)
    files.write(path / "trainable_params.safetensors", trainable)
    files.write_text(path / CONFIG_FILE, json.dumps(content, indent=2) + "\n")
    if lora is not None:
        files.write(path / "adapter_model.safetensors", adapter)
        lora.save_pretrained(str(path))


def merge_hici(model: nn.Module, path: str | Path, keep_slots: bool) -> None:
    """Save the model with its LoRA added to the weights; the model itself stays as it is.

    Args:
        keep_slots: False: the slot modules are left out and what remains is a standard model of its family, for any
            engine, which computes full attention with the trained weights (the published evaluations do that). True:
            they are kept, as model type "hici_<family>", which AutoModelForCausalLM.from_pretrained loads once
            hici_kernels.integrations is imported, and :func:`load_hici` in any case.

    RoPE scaling stays in the config. Products are formed in float32 and rounded to the weights' dtype.

    Raises:
        TypeError, ValueError: keep_slots no bool; the model has no slots; its adapter is no plain LoRA on linear
            modules with weights of their own.
    """
    if not isinstance(keep_slots, bool):
        raise TypeError(f"keep_slots must be True or False, got {keep_slots!r}")
    path = Path(path)
    host, config = Host.of(model), config_of(model)
    _check_adapters(model, merged=True)
    merged = merged_weights(host.model)
    if not keep_slots:
        merged = {name: x for name, x in merged.items() if names.slot_parts(name) is None}
    host.model.save_pretrained(path, state_dict=merged)
    note = next(n for n in host.notes if n.method == "apply_hici")
    plain = note.config_class
    assert plain is not None
    written = copy.deepcopy(host.model.config)
    architecture: str = type(host.model).__name__
    if not keep_slots:
        written.__class__ = plain
        vars(written).pop("hici", None)
        architecture = architecture.removeprefix("HiCI")
    written.architectures = [architecture]
    if _parted_head(host):
        written.tie_word_embeddings = False
    written.save_pretrained(path)
    if keep_slots:
        files.write_text(
            path / CONFIG_FILE,
            json.dumps({"hici": config.to_dict(), "rope_factor": linear_factor(host)}, indent=2) + "\n",
        )


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict a model would have without adapters, their products added; nothing is changed in place."""
    merged: dict[str, Tensor] = {}
    tied = {names.canonical(a): names.canonical(b) for a, b in shared_names(model).items()}
    for raw, x in model.state_dict().items():
        name = names.canonical(raw)
        if name is not None and not names.is_lora(name):
            merged[name] = x
    for prefix, module in model.named_modules():
        layer: Any = module
        if hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight"):
            for kind, used in (("use_dora", layer.use_dora), ("lora_bias", getattr(layer, "lora_bias", {}))):
                if any(used.get(adapter) for adapter in layer.active_adapters):
                    raise ValueError(f"{prefix} has LoRA with {kind}=True, expected plain LoRA: its product is not all")
            if len(layer.lora_embedding_A):
                raise ValueError(f"{prefix} has LoRA on an embedding, expected it on linear modules only")
            name = f"{names.canonical(prefix + '.')}weight"
            if name not in merged or merged[name].ndim != 2:
                raise ValueError(f"{prefix} has LoRA on something else than a linear module's weight")
            if name in tied or name in tied.values():
                raise ValueError(f"{prefix} has LoRA and a weight tied to another module's, which would get it too")
            weight = merged[name]
            total = weight.float()
            for adapter in [] if layer.merged else layer.active_adapters:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                total = total + layer.scaling[adapter] * (b.float() @ a.float()).to(total.device)
            merged[name] = total.to(weight.dtype)
    return merged


def _check_adapters(model: nn.Module, *, merged: bool = False) -> None:
    """That every adapter is LoRA, whose product this library knows, and (unless ``merged``) is beside its weight."""
    if not any(hasattr(m, "peft_config") for m in model.modules()):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for prefix, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            if not (hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")):
                raise ValueError(f"{prefix} has an adapter of type {type(module).__name__}, expected LoRA")
            if module.merged and not merged:
                raise ValueError(f"the adapter of {prefix} is merged into its weight: call unmerge_adapter() first")


def shared_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another module's, each with the name that parameter comes first under."""
    first: dict[int, str] = {}
    return {
        name: own
        for name, p in model.named_parameters(remove_duplicate=False)
        if (own := first.setdefault(id(p), name)) != name
    }


def _effective(module: Any) -> Any:
    """The module that computes: the active copy where an adapter keeps one whole."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies[module.active_adapters[0]]


def _parted_head(host: Host) -> set[str]:
    """The head's weight, where the base model ties it to the embedding and training has parted them."""
    output: Any = host.model.get_output_embeddings()
    tied = host.model.config.get_text_config().tie_word_embeddings or any(note.parted_head for note in host.notes)
    if output is None or not tied:
        return set()
    module = _effective(output)
    if module.weight is _effective(host.model.get_input_embeddings()).weight:
        return set()
    path = next(name for name, m in host.model.named_modules() if m is module)
    return {str(names.canonical(f"{path}.weight"))}


def _lora_config(model: nn.Module) -> Any:
    configs = getattr(model, "peft_config", {})
    if len(configs) != 1:
        raise ValueError(f"model must carry one adapter, got {len(configs)}")
    (lora,) = configs.values()
    if lora.init_lora_weights not in _BESIDE:
        raise ValueError(
            f"the adapter's init_lora_weights must be one of {_BESIDE}, got {lora.init_lora_weights!r}: it takes "
            "something out of the base model's weights, which the adapter alone does not tell. merge_hici keeps it"
        )
    return lora
