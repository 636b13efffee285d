"""A published HiCI checkpoint read into memory: its tensors sorted, its sizes inferred, what is missing named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..checkpoints import files, names
from ..config import HiCIConfig

CONFIG_FILE = "hici_config.json"
# the tensors that sizes are read from
_SIZES = {
    "local_constructor.memory_slots": "M, H",
    "local_constructor.q_proj.weight": "E, H",
    "global_integrator.global_queries": "K, D",
    "global_integrator.shared_compressor.0.weight": "C, H",
}


@dataclass
class Published:
    """slots: per layer, name inside the attention module. base: other tensors by model name. lora: module -> A, B.

    decoder: what stands before ``layers`` in the names of the file: "model.", "" where it was saved without a head.
    """

    source: str
    decoder: str | None = None
    slots: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    lora: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)  # what saved configs say
    alphas: dict[str, float] = field(default_factory=dict)  # of modules whose LoRA has another than the rest

    def scale(self, module: str, alpha: float) -> float:
        """The factor of one module's LoRA product."""
        rank = self.lora[module]["A"].shape[0]
        return self.alphas.get(module, alpha) / (math.sqrt(rank) if self.known.get("use_rslora") else rank)

    def named_for(self, decoder: str) -> None:
        """Rename what the decoder holds to the names in a model that has its decoder at ``decoder``."""
        given = self.decoder
        if given is None or given == decoder:
            return

        def renamed(name: str) -> str:
            return f"{decoder}{name.removeprefix(given)}" if name.startswith(given) else name

        self.base = {renamed(name): x for name, x in self.base.items()}
        self.lora = {renamed(name): pair for name, pair in self.lora.items()}
        self.alphas = {renamed(name): alpha for name, alpha in self.alphas.items()}


def read(path: str | Path | Sequence[str | Path], *, slots_only: bool = False) -> Published:
    """Read a directory in either layout, one weight file, or several; ``slots_only`` leaves everything else unread.

    Raises:
        ValueError, OSError: naming the file and what is wrong with it.
    """
    given = [Path(path)] if isinstance(path, (str, Path)) else [Path(p) for p in path]
    for p in given:
        if not p.exists():
            raise FileNotFoundError(f"{p} does not exist")
    directory = given[0] if len(given) == 1 and given[0].is_dir() else None
    found = Published(", ".join(map(str, given)))
    if directory is None:
        sources = given
    else:
        parts = {stem: files.shards(directory, stem) for stem in ("trainable_params", "adapter_model")}
        if parts["adapter_model"] and not parts["trainable_params"]:
            raise ValueError(
                f"{directory} holds adapter_model but no trainable_params: the slot modules, embeddings and norms are "
                "in that file, and without it they would be random"
            )
        sources = [p for paths in parts.values() for p in paths]
        sources = sources or files.shards(directory, "model") or files.shards(directory, "pytorch_model")
        if not sources:
            raise ValueError(f"{directory} holds no trainable_params, adapter_model, model or pytorch_model weights")
    for source in sources:
        for raw, x in files.read(source, _is_slot if slots_only else None):
            _sort(found, raw, x, source)
    for folder in dict.fromkeys(p if p.is_dir() else p.parent for p in given):
        _saved_configs(found, folder, merged=directory is not None and not found.lora)
    _check(found)
    return found


def _is_slot(raw: str) -> bool:
    name = names.canonical(raw)
    return name is not None and names.slot_parts(name) is not None


def _sort(found: Published, raw: str, x: Tensor, source: Path) -> None:
    name = names.canonical(raw)
    if name is None:
        return
    if names.is_lora(name):
        module, part = names.lora_parts(name)
        found.lora.setdefault(module, {})[part] = x
        return
    slot = names.slot_parts(name)
    if slot is not None:
        decoder = names.decoder_prefix(name)
        if found.decoder not in (None, decoder):
            raise ValueError(f"{source} holds {raw} beside slots of another decoder, {found.decoder!r}")
        found.decoder = decoder
    target, key = (found.base, name) if slot is None else (found.slots.setdefault(slot[0], {}), slot[1])
    if key in target:
        raise ValueError(f"{source} holds {raw}, which another file or name gives as well")
    target[key] = x


def _saved_configs(found: Published, folder: Path, merged: bool) -> None:
    for name in ("config.json", CONFIG_FILE, "adapter_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        if name == "adapter_config.json":
            found.known |= {key: content.get(key) for key in ("lora_alpha", "use_rslora")}
            found.alphas = _alphas(found, content.get("alpha_pattern") or {}, file)
            for kind in ("use_dora", "lora_bias", "target_parameters"):
                if content.get(kind):
                    raise ValueError(f"{file} has {kind} {content[kind]}, which is not supported")
        elif name == CONFIG_FILE:
            found.known |= content
        else:
            if content.get("hici"):
                found.known |= {"hici": content["hici"]}
            if merged:
                found.known |= _rope_of_config(content)


def _alphas(found: Published, patterns: dict[str, Any], file: Path) -> dict[str, float]:
    """The first pattern that is the end of a module's name decides, as in PEFT."""
    alphas: dict[str, float] = {}
    for pattern, alpha in patterns.items():
        try:
            ends = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise ValueError(f"{file}: alpha_pattern must map expressions to numbers, got {pattern!r}") from error
        _checks.number(f"alpha_pattern[{pattern!r}] of {file}", alpha)
        for module in filter(ends.match, found.lora):
            alphas.setdefault(module, float(alpha))
    return alphas


def _rope_of_config(content: dict[str, Any]) -> dict[str, Any]:
    """The linear factor a model config states; merged Llama checkpoints of the authors leave it out."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if content.get("hici") and kind == "default":
        return {"rope_factor": 1.0}
    return {"rope_factor": float(rope["factor"])} if kind == "linear" else {}


def _check(found: Published) -> None:
    if not found.slots:
        raise ValueError(f"{found.source} holds no tensors of local_constructor or global_integrator")
    layers = sorted(found.slots)
    if layers != list(range(len(layers))):
        raise ValueError(f"{found.source} holds slots for layers {layers}, expected 0..{layers[-1]} without gaps")
    for i, tensors in found.slots.items():
        if set(tensors) != set(found.slots[0]):
            odd = sorted(set(tensors) ^ set(found.slots[0]))[0]
            raise ValueError(f"{found.source}: layers 0 and {i} differ in {odd}")
    for i, tensors in found.slots.items():
        for name, layout in _SIZES.items():
            if name in tensors and tensors[name].ndim != 2:
                shape = tuple(tensors[name].shape)
                raise ValueError(f"{found.source}: {name} of layer {i} must be [{layout}], got shape {shape}")
        scale = tensors.get("global_integrator.expand_scale_param")
        if scale is not None and scale.numel() == 1:
            # DeepSpeed runs hold scalars as [1]
            tensors["global_integrator.expand_scale_param"] = scale.reshape(())
        queries = tensors.get("global_integrator.global_queries")
        if queries is not None and "global_integrator.o_proj.weight" not in tensors:
            # the first published version had none
            tensors["global_integrator.o_proj.weight"] = torch.eye(queries.shape[1], dtype=queries.dtype)
    for module, pair in found.lora.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{found.source} holds only one of the two LoRA matrices of {module}")
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
            raise ValueError(
                f"{found.source}: LoRA matrices of {module} must be A [rank, in] and B [out, rank], got shapes "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )


def configuration(found: Published, overrides: dict[str, Any]) -> tuple[HiCIConfig, float, float | None]:
    """HiCIConfig, RoPE factor and LoRA alpha, from shapes, saved configs and the call, in rising order of weight.

    Raises:
        ValueError: naming everything that shapes cannot tell and nobody has said; or what contradicts the shapes.
    """
    fields = set(HiCIConfig.__dataclass_fields__)
    given = dict(overrides)
    if "num_memory_slots" in given:  # the name of the published model cards
        given["num_local_slots"] = given.pop("num_memory_slots")
    unknown = set(given) - fields - {"rope_factor", "lora_alpha"}
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]!r} is neither a field of HiCIConfig nor rope_factor nor lora_alpha")
    saved = dict(found.known.get("hici") or {})
    if "num_memory_slots" in saved:
        saved["num_local_slots"] = saved.pop("num_memory_slots")
    if "segment_len" in given or "num_segments" in given:
        saved = {k: v for k, v in saved.items() if k not in ("segment_len", "num_segments")}
    shapes = _shapes(found)
    stated = saved | {k: v for k, v in given.items() if k in fields}
    width = shapes.pop("compress_dim")
    shared = shapes["shared_compress_dim"] or 0
    asked = stated.get("compress_dim") or shapes["bottleneck_dim"] or 512
    if max(asked, shared) != width:
        if stated.get("compress_dim") is not None:
            raise ValueError(f"compress_dim is {asked}, but the tensors of {found.source} have {width}")
        shapes["compress_dim"] = width
    for name, value in shapes.items():
        if name in stated and stated[name] != value and name != "compress_dim":
            raise ValueError(f"{name} is {stated[name]}, but the tensors of {found.source} have {value}")
    factor = given.get("rope_factor", found.known.get("rope_factor"))
    alpha = given.get("lora_alpha", found.known.get("lora_alpha"))
    missing = []
    if "num_heads" not in stated:
        missing.append("num_heads (heads of the slot modules; 8 in the published training scripts)")
    if "context_mode" not in stated:
        missing.append("context_mode (what slots a segment sees; 'none' or 'causal_gi' in the published code)")
    if "segment_len" not in stated and "num_segments" not in stated:
        missing.append("segment_len or num_segments (how a text is cut; num_segments=4 in the published code)")
    if factor is None:
        missing.append("rope_factor (linear position interpolation of the training run; 1.0 for none)")
    if found.lora and alpha is None:
        missing.append("lora_alpha (16 in the published training scripts; no adapter_config.json was found)")
    if missing:
        raise ValueError(
            f"the tensors of {found.source} cannot tell these, and no saved config does; pass them to the call: "
            + "; ".join(missing)
        )
    assert factor is not None
    for name, value in (("rope_factor", factor), ("lora_alpha", alpha)):
        if value is not None:
            _checks.number(name, value)
    if factor < 1:
        raise ValueError(f"rope_factor must be at least 1, got {factor}")
    config = HiCIConfig.from_dict({**stated, **shapes})
    # a saved config states its cut; only the call or that file count as a choice
    return (config if "cut" in stated else config.with_default_cut("token")), float(factor), alpha


def _shapes(found: Published) -> dict[str, Any]:
    tensors = found.slots[0]
    slots, queries = tensors.get("local_constructor.memory_slots"), tensors.get("global_integrator.global_queries")
    q = tensors.get("local_constructor.q_proj.weight")
    if slots is None or queries is None or q is None:
        raise ValueError(
            f"{found.source} lacks local_constructor.memory_slots, local_constructor.q_proj.weight or "
            "global_integrator.global_queries"
        )
    shared = tensors.get("global_integrator.shared_compressor.0.weight")
    # without the output projection only the full width makes sense
    bottleneck = "local_constructor.o_proj.weight" in tensors or q.shape[0] != slots.shape[1]
    return {
        "num_local_slots": slots.shape[0],
        "global_slots": queries.shape[0],
        "bottleneck_dim": q.shape[0] if bottleneck else None,
        "compress_dim": queries.shape[1],
        "shared_compress_dim": None if shared is None else shared.shape[0],
    }
