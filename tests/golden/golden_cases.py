"""Reads reference fixtures by their manifests and builds this library's modules for them.

Nothing here knows a case by name: what a case needs follows from the reference function, its switches and the shapes of
its tensors. HiCI heads are not visible in shapes; all fixtures use 4.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hici_kernels.config import HiCIConfig
from hici_kernels.nn.global_integrator import GlobalIntegrator
from hici_kernels.nn.hici_attention import HiCIAttention
from hici_kernels.nn.local_constructor import LocalConstructor
from hici_kernels.rope import Rope

HICI_HEADS = 4
TRAIN = "forward_flashattn_hierarchical"
NOFLASH = "forward_noflashattn_hierarchical"
INFER = "forward_flashattn_hierarchical_inference"
WITH_CACHE = "forward_flashattn_hierarchical_with_cache"
GLOBAL_CACHE = "forward_flashattn_global_with_cache"
FULL = ("forward_flashattn_full", "forward_flashattn_inference")
SFT_INFER = "forward_hici_sft_inference"
MODEL = "model forward, labels"
LOCAL = ("LocalConstructorMulti", "LocalConstructor", "LocalConstructorFlash")
INTEGRATOR = ("GlobalIntegrator", "GlobalIntegratorShared")
FORMULA = ("LocalConstructorFlashPlus", "GlobalIntegrator_new")


@dataclass
class Case:
    """One manifest entry with its tensors; ``t`` merges the case file and its input file."""

    entry: dict[str, Any]
    manifest: dict[str, Any]
    t: dict[str, torch.Tensor]
    params: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        return self.entry["name"]

    @property
    def function(self) -> str:
        return self.entry["function"]

    @property
    def globals(self) -> dict[str, Any]:
        return self.entry.get("globals") or {}

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.entry.get("kwargs") or {}

    @property
    def hidden(self) -> torch.Tensor:
        return self.t["in.hidden_states"] if "in.hidden_states" in self.t else self.t["hidden_states"]

    @property
    def mask(self) -> torch.Tensor | None:
        return self.t.get("in.attention_mask")

    @property
    def is_qwen3(self) -> bool:
        return self.entry["reference"].startswith("qwen3")

    @property
    def is_sft(self) -> bool:
        return "_sft" in self.entry["reference"]

    @property
    def head_dim(self) -> int:
        return self.entry.get("head_dim", 16)

    @property
    def tolerance(self) -> float:
        """Of outputs: the unmodified source rounds local construction to bfloat16, the others are float32."""
        return 2e-2 if self.name.endswith("castkept") else 2e-5

    @property
    def empty(self) -> str:
        """What the reference's constructor gives for a segment without tokens."""
        described = self.manifest["param_files"].get(self.entry["params"], {}).get("desc", "")
        return "zero" if "LocalConstructorFlash" in described else "uniform"

    @property
    def mode(self) -> str:
        mode = self.globals.get("CAUSAL_CONTEXT_MODE", "none")
        if self.is_sft or (self.is_qwen3 and self.function == INFER):
            return "none"
        if self.is_qwen3 and mode not in ("none", "causal_gi", "causal_shift"):
            return "none"
        return mode

    @property
    def full_hici(self) -> bool:
        return self.function == INFER and bool(self.globals.get("USE_FULL_ATTN_WITH_HICI"))

    def segment_len(self, s: int) -> int:
        """The published cut of ``s`` tokens."""
        if self.function in (*FULL, SFT_INFER) or self.full_hici:
            return s
        by_ratio = int(s * self.globals.get("group_size_ratio", 0.25))
        if self.is_sft:
            return by_ratio if s % 4096 == 0 else _divisor_rule(s, by_ratio)
        if self.function in (TRAIN, INFER) and self.globals.get("USE_FIXED_SEGMENT_SIZE"):
            return min(self.globals["FIXED_SEGMENT_SIZE"], s)
        return max(1, by_ratio)

    def rope(self) -> Rope:
        given = self.entry.get("rope") or {}
        theta = given.get("theta", 1e6 if self.is_qwen3 else 1e4)
        return Rope.from_theta(theta, self.head_dim, factor=given.get("linear_factor", 1.0))

    def config(self, s: int, params: dict[str, torch.Tensor] | None = None, **overrides: Any) -> HiCIConfig:
        params = self.params if params is None else params
        no_slots = self.function in FULL or bool(self.globals.get("DISABLE_HICI_IN_PREFILL"))
        recurrence = self.kwargs.get("use_recurrence_cache", False) and self.kwargs.get("recurrence_size", 128)
        keep_slots = self.function == SFT_INFER and self.globals.get("INCLUDE_HICI_IN_KV_CACHE", True)
        values: dict[str, Any] = {
            "num_local_slots": params["local_constructor.memory_slots"].shape[0],
            "global_slots": params["global_integrator.global_queries"].shape[0],
            "num_heads": HICI_HEADS,
            **_widths(params),
            "segment_len": self.segment_len(s),
            "context_mode": self.mode,
            "use_global": not no_slots and self.kwargs.get("use_global_context", True),
            "use_local": not no_slots and self.kwargs.get("use_local_repr", True),
            "recurrence_len": int(recurrence),
            "single_segment": "off" if self.function == INFER and not self.full_hici else "on",
            "empty": self.empty,
            "decode": "slots" if keep_slots else "full",
        }
        return HiCIConfig(**{**values, **overrides})

    def layer(self, s: int, **overrides: Any) -> HiCIAttention:
        """The layer with the fixture's parameters; strict, so state-dict keys are the published ones."""
        layer = build_layer(self, self.config(s, **overrides), self.params)
        layer.load_state_dict(self.params, strict=True)
        return layer


def build_layer(case: Case, config: HiCIConfig, params: dict[str, torch.Tensor]) -> HiCIAttention:
    d = case.head_dim
    return HiCIAttention(
        params["q_proj.weight"].shape[1],
        params["q_proj.weight"].shape[0] // d,
        params["k_proj.weight"].shape[0] // d,
        d,
        config,
        rope=case.rope(),
        qk_norm_eps=1e-6 if "q_norm.weight" in params else None,
    )


def local_constructor(case: Case) -> LocalConstructor:
    """v1 is the single-headed constructor at full width; the Flash classes leave an empty segment at zero."""
    p = case.params
    slots, hidden = p["memory_slots"].shape
    heads = 1 if case.function == "LocalConstructor" else HICI_HEADS
    width = p["q_proj.weight"].shape[0] if "o_proj.weight" in p else None
    module = LocalConstructor(
        hidden, slots, heads, width, "zero" if case.function == "LocalConstructorFlash" else "uniform"
    )
    module.load_state_dict(p, strict=True)
    return module


def integrator(case: Case) -> GlobalIntegrator:
    p = case.params
    width = p["global_queries"].shape[1]
    shared = p["shared_compressor.0.weight"].shape[0] if "shared_compressor.0.weight" in p else None
    module = GlobalIntegrator(p["expand.weight"].shape[0], p["global_queries"].shape[0], HICI_HEADS, width, shared)
    module.load_state_dict(p, strict=True)
    return module


def _widths(params: dict[str, torch.Tensor]) -> dict[str, int | None]:
    shared = params.get("global_integrator.shared_compressor.0.weight")
    bottleneck = params["local_constructor.q_proj.weight"].shape[0]
    return {
        "bottleneck_dim": bottleneck if "local_constructor.o_proj.weight" in params else None,
        "compress_dim": params["global_integrator.global_queries"].shape[1],
        "shared_compress_dim": None if shared is None else shared.shape[0],
    }


def _divisor_rule(s: int, target: int) -> int:
    low, high = (10 if target >= 10 else 1), (s // 2 if s >= 20 else s)
    found = [g for g in range(low, high + 1) if s % g == 0]
    return min(found, key=lambda g: abs(g - target)) if found else s


def entries(directory: Path) -> list[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(directory, manifest, entry) of all cases."""
    found = []
    for path in sorted(directory.glob("manifest_*.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found += [(directory, manifest, entry) for entry in manifest["cases"]]
    return found


def holds(directory: Path, entry: dict[str, Any], *names: str) -> bool:
    """Whether a case's file stores one of these tensors."""
    with safe_open(directory / entry["file"], "pt") as file:
        return any(name in file.keys() for name in names)  # noqa: SIM118  (a file handle, not a dict)


def load(directory: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> Case:
    t = load_file(directory / entry["file"])
    if entry.get("inputs"):
        t = {**load_file(directory / f"{entry['inputs'].removesuffix('.safetensors')}.safetensors"), **t}
    if entry["params"].startswith("inline"):
        params = {k.removeprefix("param."): v for k, v in t.items() if k.startswith("param.")}
    else:
        params = load_file(directory / f"{entry['params'].removesuffix('.safetensors')}.safetensors")
    return Case(entry, manifest, t, params)
