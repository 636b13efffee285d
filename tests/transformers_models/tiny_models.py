"""Small random models of every family, and the configurations the tests use."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from hici_kernels import HGAConfig, HiCIConfig

hf.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}

# name -> configuration class, further arguments
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, {}),
    "llama-mha": (hf.LlamaConfig, {"num_key_value_heads": 4}),
    "llama-linear": (hf.LlamaConfig, {"rope_parameters": LINEAR}),
    "llama-llama3": (hf.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-yarn": (hf.LlamaConfig, {"rope_parameters": YARN}),
    "mistral": (hf.MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen2-sliding": (hf.Qwen2Config, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 32}),
    "qwen3-moe": (hf.Qwen3MoeConfig, {"head_dim": 16, **MOE}),
    "gemma": (hf.GemmaConfig, {"head_dim": 16}),
    "gemma3": (
        hf.Gemma3TextConfig,
        {
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 25,
        },
    ),
    "granite": (hf.GraniteConfig, {"attention_multiplier": 0.1}),
    "olmo2": (hf.Olmo2Config, {}),
    "phi3": (hf.Phi3Config, {}),
    "stablelm-partial": (hf.StableLmConfig, {"partial_rotary_factor": 0.5}),
    "phi-partial": (hf.PhiConfig, {"partial_rotary_factor": 0.5}),
}
# chunks of 8 tokens, all of them opened: routed attention is then full attention
ALL = HGAConfig(chunk_size=8, group_size=4, keep_first=1, keep_last=2, topk_chunks=999, topk_groups=999)
FEW = HGAConfig(chunk_size=8, group_size=4, keep_first=1, keep_last=1, topk_chunks=2, topk_groups=2)
SLOTS: dict[str, Any] = {
    "num_local_slots": 5,
    "global_slots": 3,
    "num_heads": 4,
    "bottleneck_dim": 16,
    "shared_compress_dim": 8,
}


def tiny(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A model in eval mode whose weights are large enough that attention matters."""
    config_class, extra = FAMILIES[family]
    config = config_class(**{**SIZES, **extra, **overrides})
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embed" not in name:
                p.mul_(4)
    return model


def hici_config(**overrides: Any) -> HiCIConfig:
    return HiCIConfig(**{**SLOTS, "segment_len": 8, **overrides})


def slots_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if ("local_constructor" in n or "global_integrator" in n)}


@torch.no_grad()
def randomise_slots(model: nn.Module, seed: int = 7) -> Any:
    """Slots as large as tokens: fresh ones are nearly zero and would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in slots_of(model).items():
        if "lora_" not in name:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model


def prompt(rows: int = 2, length: int = 40, seed: int = 1) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, padding: int = 5) -> tuple[Tensor, Tensor]:
    """The same ids with the first ``padding`` columns of row 0 masked."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return ids, mask


def worst(a: Any, b: Any) -> float:
    """Largest difference of two tensors, or of the logits of two generate() results."""
    if isinstance(a, Tensor):
        return float((a.detach().float() - b.detach().float()).abs().max())
    return max(worst(x, y) for x, y in zip(a.logits, b.logits, strict=True))
