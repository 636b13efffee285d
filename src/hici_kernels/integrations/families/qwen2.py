"""Qwen2 with slots."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM

from .base import HiCIModel, register


class HiCIQwen2Config(Qwen2Config):
    """A Qwen2Config whose ``hici`` holds the fields of a :class:`HiCIConfig`."""

    model_type = "hici_qwen2"
    hici: dict[str, Any] | None = None


class HiCIQwen2ForCausalLM(HiCIModel, Qwen2ForCausalLM):
    """Qwen2ForCausalLM, built with slots."""

    config_class = HiCIQwen2Config


register(HiCIQwen2Config, HiCIQwen2ForCausalLM)
