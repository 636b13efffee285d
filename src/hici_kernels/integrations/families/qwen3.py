"""Qwen3 with slots."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM

from .base import HiCIModel, register


class HiCIQwen3Config(Qwen3Config):
    """A Qwen3Config whose ``hici`` holds the fields of a :class:`HiCIConfig`."""

    model_type = "hici_qwen3"
    hici: dict[str, Any] | None = None


class HiCIQwen3ForCausalLM(HiCIModel, Qwen3ForCausalLM):
    """Qwen3ForCausalLM, built with slots."""

    config_class = HiCIQwen3Config


register(HiCIQwen3Config, HiCIQwen3ForCausalLM)
