"""Qwen3Moe with slots."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from .base import HiCIModel, register


class HiCIQwen3MoeConfig(Qwen3MoeConfig):
    """A Qwen3MoeConfig whose ``hici`` holds the fields of a :class:`HiCIConfig`."""

    model_type = "hici_qwen3_moe"
    hici: dict[str, Any] | None = None


class HiCIQwen3MoeForCausalLM(HiCIModel, Qwen3MoeForCausalLM):
    """Qwen3MoeForCausalLM, built with slots."""

    config_class = HiCIQwen3MoeConfig


register(HiCIQwen3MoeConfig, HiCIQwen3MoeForCausalLM)
