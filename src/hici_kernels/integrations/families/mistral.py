"""Mistral with slots."""

from __future__ import annotations

from typing import Any

from transformers import MistralConfig, MistralForCausalLM

from .base import HiCIModel, register


class HiCIMistralConfig(MistralConfig):
    """A MistralConfig whose ``hici`` holds the fields of a :class:`HiCIConfig`."""

    model_type = "hici_mistral"
    hici: dict[str, Any] | None = None


class HiCIMistralForCausalLM(HiCIModel, MistralForCausalLM):
    """MistralForCausalLM, built with slots."""

    config_class = HiCIMistralConfig


register(HiCIMistralConfig, HiCIMistralForCausalLM)
