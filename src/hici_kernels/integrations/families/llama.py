"""Llama with slots."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from .base import HiCIModel, register


class HiCILlamaConfig(LlamaConfig):
    """A LlamaConfig whose ``hici`` holds the fields of a :class:`HiCIConfig`."""

    model_type = "hici_llama"
    hici: dict[str, Any] | None = None


class HiCILlamaForCausalLM(HiCIModel, LlamaForCausalLM):
    """LlamaForCausalLM, built with slots."""

    config_class = HiCILlamaConfig


register(HiCILlamaConfig, HiCILlamaForCausalLM)
