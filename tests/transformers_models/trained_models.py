"""A model as HiCI training leaves it, and what its checkpoints cannot tell."""

from __future__ import annotations

import pytest
import torch
from tiny_models import hici_config, prompt, randomise_slots, tiny

from hici_kernels.integrations import apply_hici

TOLERANCE = 1e-5
# what shapes cannot tell
SAID = {"num_heads": 4, "context_mode": "causal_shift", "segment_len": 8, "rope_factor": 1.0}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def trained(family="llama", rows=None, **sizes):
    """A model after "training": slots, LoRA on host and slots, new embedding rows, changed norms."""
    peft = pytest.importorskip("peft")
    model = tiny(family, **sizes)
    if rows is not None:
        mean = model.lm_head.weight.detach().float().mean(0)
        before = model.lm_head.weight.shape[0]
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            model.lm_head.weight[before:] = mean
    randomise_slots(apply_hici(model, hici_config()))
    torch.manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "embed" in name:
                p.add_(0.1 * torch.randn_like(p))
    return peft.get_peft_model(model, peft.LoraConfig(**LORA, init_lora_weights=False), autocast_adapter_dtype=False)


def logits(model, ids=None, **kwargs):
    with torch.no_grad():
        return model(input_ids=prompt() if ids is None else ids, use_cache=False, **kwargs).logits
