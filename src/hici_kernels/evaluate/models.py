"""Models to evaluate: a local directory or the shipped demo model, with one of the methods applied."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..config import LEAK_FREE_MODES, HGAConfig, HiCIConfig
from .density import density_of
from .leak import Verdict, leak_test
from .memory import memory_for
from .tokens import ByteTokenizer

METHODS = ("none", "hga", "hici", "dca")
DEMO = "demo"


@dataclass
class Evaluated:
    """A model, its tokenizer, and what every result must say about them."""

    model: nn.Module
    tokenizer: Any
    name: str
    method: str
    config: Any
    attention: str  # "method" or "full"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    @torch.no_grad()
    def logits(self, ids: Tensor, keep: int = 0) -> Tensor:
        """float32 logits [B, S, V] of ids [B, S], one forward without a cache; only the last ``keep`` if positive.

        Raises:
            ValueError: naming S, where that does not fit into memory.
        """
        with memory_for(ids.shape[1]):
            out = self.model(input_ids=ids.to(self.device), use_cache=False, logits_to_keep=keep)
            return out.logits.float()

    def leak(self, length: int, seed: int = 0) -> Verdict:
        """Whether logits depend on later tokens, by changing those (see :func:`leak_test`)."""
        return leak_test(self.logits, self.vocab_size, length, seed=seed)

    def describe(self, length: int, seed: int) -> dict[str, Any]:
        """Method, mode, leak, density, seed: the head of every result."""
        mode = self.config.context_mode if isinstance(self.config, HiCIConfig) else None
        with memory_for(length):
            verdict = self.leak(length, seed)
        return {
            "model": self.name,
            "method": self.method,
            "attention": self.attention,
            "mode": mode,
            "config": None if self.config is None else _plain(self.config),
            "leak": verdict.to_dict(),
            "density": density_of(self.method if self.attention == "method" else "none", self.config, length),
            "length": length,
            "seed": seed,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            **self.extra,
        }


def _plain(config: Any) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))


def open_model(
    model: str | Path,
    method: str = "none",
    *,
    config: dict[str, Any] | None = None,
    adapter: str | Path | None = None,
    attention: str = "method",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Evaluated:
    """A model ready to be evaluated.

    Args:
        model: a local directory, or "demo": the byte-level model that ships with the package.
        method: "none" = full attention; "hga", "dca" = training-free; "hici" = with the slots of ``adapter`` (or of the
            directory, when merged). For the demo model, "hici" adds untrained slots (for trying commands out).
        config: fields of HGAConfig, HiCIConfig or DCAConfig.
        attention: "method", or "full" = weights as loaded, plain full attention without slots or routes: how the
            published HiCI numbers were measured.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    _checks.choice("method", method, METHODS)
    _checks.choice("attention", attention, ("method", "full"))
    from ..integrations import DCAConfig, apply_dca, apply_hga, apply_hici, restore
    from ..integrations.chat import open_model as open_directory
    from ..integrations.hici import config_of

    if adapter is not None and method != "hici":
        raise ValueError(f"adapter is for method 'hici', got method={method!r} with {str(adapter)!r}")
    values = dict(config or {})
    extra = {} if adapter is None else {"adapter": str(adapter)}
    place = _checks.device("device", device)
    found: Any
    if str(model) == DEMO:
        if adapter is not None:
            raise ValueError("adapter cannot be combined with model='demo', which has none")
        found, tokenizer = demo_model(), ByteTokenizer()
        if dtype is not None:
            found = found.to(dtype)
        found = found.to(place)
        if method == "hici":
            apply_hici(found, HiCIConfig.from_dict(values))
        name = DEMO
    else:
        found, tokenizer = open_directory(
            model,
            method if method == "hici" else "none",
            config=values if method == "hici" else None,
            adapter=adapter,
            device=device,
            dtype=dtype,
        )
        name = str(model)
    used: Any = None
    if method == "hici":
        used = config_of(found)
        if attention == "full":
            restore(found)
    elif method == "hga":
        used = HGAConfig.from_dict(values)
        if attention == "method":
            apply_hga(found, used)
    elif method == "dca":
        window = int(found.config.max_position_embeddings)
        local = values.pop("local_len", window // 16)
        used = DCAConfig(values.pop("chunk_len", 3 * window // 4 - local), local)
        if values:
            raise ValueError(f"config of dca takes chunk_len and local_len, got {', '.join(values)}")
        if attention == "method":
            apply_dca(found, used)
    elif values:
        raise ValueError(f"config must be empty with method='none', got {', '.join(values)}")
    return Evaluated(found.eval(), tokenizer, name, method, used, attention, extra)


def demo_model() -> Any:
    """The shipped byte-level model as a model of transformers (its architecture and parameter names are Qwen3's)."""
    import transformers

    from ..demo.lm import ByteLM

    lm = ByteLM.load()
    c = lm.config
    config = transformers.Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.Qwen3ForCausalLM(config)
    missing, unexpected = model.load_state_dict(lm.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"the demo model does not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def leak_free(evaluated: Evaluated) -> bool | None:
    """What the method promises (the verdict of :meth:`Evaluated.leak` is what is measured); None = no promise."""
    if evaluated.attention == "full" or evaluated.method in ("none", "dca"):
        return True
    if isinstance(evaluated.config, HiCIConfig):
        return evaluated.config.context_mode in LEAK_FREE_MODES and evaluated.config.segment_len is not None
    if isinstance(evaluated.config, HGAConfig):
        return evaluated.config.routing in ("strict", "prefix")
    return None
