"""load_hici: a published checkpoint onto a base model."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import HiCIConfig
from ..nn.slot_attention import slot_modules
from .hici import CHILDREN, apply_hici, check_hici
from .host import Host, Note
from .published import Published, configuration, read
from .rope_scaling import apply_rope_scaling, linear_factor
from .save import shared_names


def load_hici(
    model_or_base: nn.Module | str | Path,
    path: str | Path | Sequence[str | Path],
    *,
    merge_lora: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Load a HiCI checkpoint onto its base model.

    Args:
        model_or_base: the base model, changed in place; or its directory or hub name, loaded by
            AutoModelForCausalLM.from_pretrained.
        path: a directory in either published layout, or weight files: ``adapter_model`` (LoRA, also on the slot
            modules) and ``trainable_params`` (embeddings, norms, slot modules), .safetensors or .bin; or a merged
            model directory with slots. Old names (global_memory.*, hierarchical_aggregator.*, local_queries, an
            integrator without o_proj) are understood. What was saved from a model without a head fits one with a head,
            and the other way round unless the file holds a head.
        merge_lora: add the LoRA products to the weights. False keeps them apart, through PEFT.
        overrides: fields of :class:`HiCIConfig` (num_memory_slots = num_local_slots), rope_factor, lora_alpha.

    Sizes are read from the tensors. What they cannot tell (num_heads, context_mode, segment rule, RoPE factor, and
    lora_alpha where there is LoRA) comes from ``hici_config.json``, ``config.json`` or ``adapter_config.json`` beside
    the weights, or from the call; rsLoRA and alpha patterns from ``adapter_config.json`` only. Embeddings are resized
    to the checkpoint's rows (new rows of an untied output embedding are the mean of the old ones, as in the published
    recipe). A head that the model ties to its embedding and the checkpoint holds apart, with other values, becomes a
    matrix of its own. Weights take the model's dtype.

    Returns:
        The model, or with LoRA kept apart a PeftModel around it.

    Raises:
        ValueError: something is missing, contradictory or does not fit the model, of the slot tensors any name or
            shape; the model is unchanged then. TypeError: rope_factor or lora_alpha is no number.
        FileNotFoundError. ImportError: LoRA kept apart without peft.
    """
    # a merged directory that is its own base brings everything but the slots by from_pretrained
    own_base = isinstance(model_or_base, (str, Path)) and isinstance(path, (str, Path)) and _same(model_or_base, path)
    found = read(path, slots_only=own_base)
    config, factor, alpha = configuration(found, overrides)
    if found.lora and not merge_lora:
        _need_peft()
    model = _base(model_or_base)
    host = Host.of(model)
    decoder = next(name for name, module in host.model.named_modules() if module is host.decoder)
    found.named_for(f"{decoder}." if decoder else "")
    head = _head_of_its_own(host, found)
    rows = _check_fits(host, found, config, factor, merge_lora, head)
    if factor != 1.0 and linear_factor(host) == 1.0:
        apply_rope_scaling(model, "linear", factor)
    apply_hici(model, config)
    _resize(host, rows)
    if head is not None:
        _untie(host)
    targets = dict(host.model.named_parameters())
    with torch.no_grad():
        for name, x in _named(host, found):
            targets[name].copy_(x)
        if merge_lora and alpha is not None:
            for module, pair in found.lora.items():
                weight = targets[f"{module}.weight"]
                delta = found.scale(module, alpha) * (pair["B"].float() @ pair["A"].float())
                weight.copy_((weight.float() + delta.to(weight.device)).to(weight.dtype))
    if found.lora and not merge_lora:
        assert alpha is not None
        return _with_adapter(model, found, alpha)
    return model


def _same(a: str | Path, b: str | Path) -> bool:
    return Path(a).exists() and Path(b).exists() and Path(a).samefile(b)


def _base(given: nn.Module | str | Path) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    from transformers import AutoModelForCausalLM

    from ..checkpoints import names

    directory = Path(given)
    if not directory.is_dir():
        return AutoModelForCausalLM.from_pretrained(given)
    # a merged directory may be its own base: its plain part is loaded, its slots follow
    import json

    from transformers import AutoConfig

    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    options = {}
    if str(content.get("model_type", "")).startswith("hici_"):
        kind = content["model_type"].removeprefix("hici_")
        plain = {k: v for k, v in content.items() if k not in ("model_type", "hici")}
        options["config"] = AutoConfig.for_model(kind, **plain)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    odd = [k for k in info["missing_keys"] if names.slot_parts(str(names.canonical(k))) is None]
    if odd:
        raise ValueError(f"{directory} lacks {sorted(odd)[0]}")
    return model


def _head_of_its_own(host: Host, found: Published) -> str | None:
    """The name of a head that the model ties to its embedding and the checkpoint gives apart; equal, it is dropped."""
    tied = shared_names(host.model)
    output = host.model.get_output_embeddings()
    head = next((f"{name}.weight" for name, m in host.model.named_modules() if m is output), None)
    if output is None or head is None or head not in found.base or head not in tied:
        return None
    embedding = found.base.get(tied[head])
    if embedding is not None and torch.equal(embedding, found.base[head]):
        del found.base[head]  # state dicts hold a shared matrix under both names
        return None
    return head


def _check_fits(
    host: Host, found: Published, config: HiCIConfig, factor: float, merge_lora: bool, head: str | None
) -> int:
    """Everything that could fail later, before the model is touched; the embedding rows the checkpoint needs."""
    host.check_free("load_hici")
    check_hici(host)
    if len(found.slots) != len(host.attentions):
        raise ValueError(
            f"{found.source} holds slots for {len(found.slots)} layers, the model has {len(host.attentions)}"
        )
    hidden = found.slots[0]["local_constructor.memory_slots"].shape[1]
    if hidden != host.decoder.config.hidden_size:
        raise ValueError(f"{found.source} is for hidden size {hidden}, the model has {host.decoder.config.hidden_size}")
    current = linear_factor(host)
    if current != factor and current != 1.0:
        stated = "another kind of RoPE scaling" if current is None else f"RoPE factor {current}"
        raise ValueError(f"the model has {stated}, the checkpoint needs rope_factor {factor}")
    path = {id(module): name for name, module in host.model.named_modules()}
    empty = torch.empty(0)
    weights = dict(host.model.named_parameters())
    away = [name for name in found.base if name in weights and weights[name].device.type == "meta"]
    away += [
        f"{x}.weight" for x in found.lora if merge_lora and weights.get(f"{x}.weight", empty).device.type == "meta"
    ]
    if away:
        raise ValueError(
            f"{away[0]} of the model is offloaded, so {found.source} cannot be loaded into it: load it before the "
            "model is dispatched, or save the model with its slots and load that"
        )
    shapes = {name: p.shape for name, p in weights.items()}
    tied = {name: shapes[own] for name, own in shared_names(host.model).items()}
    if head is not None:
        shapes[head] = tied.pop(head)
    embedding: Any = host.model.get_input_embeddings()
    given = found.base.get(f"{path[id(embedding)]}.weight")
    rows = int((embedding.weight if given is None or given.ndim == 0 else given).shape[0])
    for end in (embedding, host.model.get_output_embeddings()):
        for name in () if end is None else [f"{path[id(end)]}.{n}" for n, _ in end.named_parameters()]:
            if name in shapes:  # a tied output has no parameter of its own
                shapes[name] = torch.Size((rows, *shapes[name][1:]))
    for name, x in found.base.items():
        _check_shape(found, name, x, shapes)
    with torch.device("meta"):
        made = nn.ModuleDict(dict(zip(CHILDREN, slot_modules(hidden, config), strict=True)))
    expected = {name: p.shape for name, p in made.named_parameters()}
    for i, tensors in found.slots.items():
        layer = path[id(host.attentions[i])]
        shapes |= {f"{layer}.{name}": shape for name, shape in expected.items()}
        for name in expected:
            if name not in tensors:
                raise ValueError(f"{found.source} lacks {layer}.{name} of shape {tuple(expected[name])}")
        for name, x in tensors.items():
            _check_shape(found, f"{layer}.{name}", x, shapes)
    # LoRA beside a weight that two modules share is beside one of them; added to it, it would be in both
    for module, pair in found.lora.items():
        if merge_lora and f"{module}.weight" in tied:
            raise ValueError(
                f"{found.source} holds LoRA for {module}, whose weight the model ties to another's: load it with "
                "merge_lora=False"
            )
        if f"{module}.weight" in tied:
            shapes[f"{module}.weight"] = tied[f"{module}.weight"]
        if f"{module}.weight" not in shapes:
            raise ValueError(f"{found.source} holds LoRA for {module}, which the model does not have")
        size = (pair["B"].shape[0], pair["A"].shape[1])
        if shapes[f"{module}.weight"] != size:
            raise ValueError(f"LoRA of {module} is for {size}, the model's is {tuple(shapes[f'{module}.weight'])}")
    return rows


def _check_shape(found: Published, name: str, x: Tensor, shapes: dict[str, torch.Size]) -> None:
    if name not in shapes:
        raise ValueError(f"{found.source} holds {name}, which the model does not have")
    if x.shape != shapes[name]:
        raise ValueError(f"{found.source}: {name} must have shape {tuple(shapes[name])}, got {tuple(x.shape)}")


def _resize(host: Host, rows: int) -> None:
    old = host.model.get_input_embeddings().weight
    if old.shape[0] == rows:
        return
    output = host.model.get_output_embeddings()
    tied = output is None or output.weight is old
    mean = None if tied else output.weight.detach().float().mean(0)
    before = old.shape[0]
    host.model.resize_token_embeddings(rows, mean_resizing=False)
    if mean is not None and rows > before:
        weight = host.model.get_output_embeddings().weight
        with torch.no_grad():
            weight[before:] = mean.to(weight)


def _untie(host: Host) -> None:
    """Give the head a matrix of its own, equal to the embedding it shared, for what training made of it apart."""
    output: Any = host.model.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.detach().clone(), output.weight.requires_grad)
    host.model.config.tie_word_embeddings = False
    host.notes.append(Note("load_hici", parted_head=True))
    host.model.all_tied_weights_keys = host.model.get_expanded_tied_weights_keys(all_submodels=True)


def _named(host: Host, found: Published) -> list[tuple[str, Tensor]]:
    path = {id(module): name for name, module in host.model.named_modules()}
    slots = [
        (f"{path[id(host.attentions[i])]}.{name}", x)
        for i, tensors in found.slots.items()
        for name, x in tensors.items()
    ]
    return [*found.base.items(), *slots]


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("keeping LoRA apart needs peft: pip install peft, or pass merge_lora=True") from error


def _with_adapter(model: nn.Module, found: Published, alpha: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    ranks = {re.escape(module): pair["A"].shape[0] for module, pair in found.lora.items()}
    rank = statistics.mode(ranks.values())
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={module: r for module, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(module): a for module, a in found.alphas.items()},
        use_rslora=bool(found.known.get("use_rslora")),
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(found.lora),
        # a model without a head cannot generate, which PEFT would ask it to
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    targets = dict(adapted.named_parameters())
    with torch.no_grad():
        for module, pair in found.lora.items():
            for part, x in pair.items():
                targets[f"base_model.model.{module}.lora_{part}.default.weight"].copy_(x)
    return adapted
