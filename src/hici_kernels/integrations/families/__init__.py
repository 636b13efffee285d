"""Model types that HiCI models are saved under: one short file per family."""

from __future__ import annotations

from .llama import HiCILlamaConfig
from .mistral import HiCIMistralConfig
from .qwen2 import HiCIQwen2Config
from .qwen3 import HiCIQwen3Config
from .qwen3_moe import HiCIQwen3MoeConfig

CONFIGS: tuple[type, ...] = (
    HiCILlamaConfig,
    HiCIMistralConfig,
    HiCIQwen2Config,
    HiCIQwen3Config,
    HiCIQwen3MoeConfig,
)


def hici_config_class(config_class: type) -> type | None:
    """The HiCI form of a configuration class, None for families that have no file here."""
    for candidate in CONFIGS:
        if config_class in (candidate, candidate.__mro__[1]):
            return candidate
    return None
