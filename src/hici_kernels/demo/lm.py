"""A small Llama-architecture decoder over raw bytes, with a hook that replaces its attention.

The model exists so that a sparse or hierarchical attention can be judged by what it costs in prediction
quality on real text, without a download: the shipped checkpoint has under three million parameters and was
trained on the Python standard library (``benchmarks/quality/train_demo_lm.py``).  Parameter names are those of
Hugging Face Llama/Qwen3 checkpoints, so the file can be read by anything that reads those.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attend", "ByteLM", "ByteLMConfig", "apply_rope", "dense_causal", "rope_tables"]

#: ``attend(layer_index, q, k, v) -> out`` with q and out ``[B, S, Hq, D]``, k and v ``[B, S, Hkv, D]``.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

_WEIGHTS = "byte_lm.safetensors"
_RECORD = "byte_lm.json"
# Bounds the fp32 logits of one step at 4096 x 256 x 4 bytes = 4 MiB per batch row, whatever the context length.
_LOGIT_CHUNK = 4096


@dataclass(frozen=True)
class ByteLMConfig:
    """Shape of a :class:`ByteLM`.

    Args:
        vocab_size: number of symbols; 256 for bytes.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU hidden layer.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: query heads Hq.
        num_key_value_heads: key/value heads Hkv; must divide Hq.
        head_dim: D, even because rotary embedding rotates pairs.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square before the root.
        qk_norm: normalise each query and key head (Qwen3 style) before the rotary embedding.
    """

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 480
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    qk_norm: bool = True

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "qk_norm" and not value > 0:
                raise ValueError(f"{f.name} must be positive, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")

    def to_dict(self) -> dict:
        """All fields as a plain dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ByteLMConfig:
        """The inverse of :meth:`to_dict`; an unknown key raises ValueError."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown ByteLMConfig fields: {sorted(unknown)}")
        return cls(**values)


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosine and sine tables ``[length, head_dim]`` (fp32) of the rotate-half rotary embedding."""
    inv = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inv)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, S, H, D]`` by the position tables ``[S, D]``; computes in fp32, keeps the dtype of ``x``."""
    lo, hi = x.float().chunk(2, dim=-1)
    turned = torch.cat((-hi, lo), dim=-1)
    return (x.float() * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def dense_causal(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention: q ``[B, S, Hq, D]``, k and v ``[B, S, Hkv, D]`` to ``[B, S, Hq, D]``."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)


class _RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension, in fp32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        xf = x.float()
        xf = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + self.eps)
        return (xf * self.weight.float()).to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, config: ByteLMConfig, layer_index: int) -> None:
        super().__init__()
        d, hd = config.hidden_size, config.head_dim
        self.layer_index = layer_index
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, hd
        self.q_proj = nn.Linear(d, self.heads * hd, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * hd, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * hd, bias=False)
        self.o_proj = nn.Linear(self.heads * hd, d, bias=False)
        self.q_norm = _RMSNorm(hd, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = _RMSNorm(hd, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, s, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, s, self.heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(b, s, self.kv_heads, self.head_dim))
        v = self.v_proj(x).view(b, s, self.kv_heads, self.head_dim)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x, cos, sin)
        out = attend(self.layer_index, q, k, v)
        if out.shape != q.shape:
            raise ValueError(f"attend must return a tensor of shape {tuple(q.shape)}, got {tuple(out.shape)}")
        return self.o_proj(out.reshape(*x.shape[:2], -1).to(v.dtype))


class _MLP(nn.Module):
    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: ByteLMConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = _RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config, layer_index)
        self.post_attention_layernorm = _RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Decoder(nn.Module):
    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _RMSNorm(config.hidden_size, config.rms_norm_eps)


class ByteLM(nn.Module):
    """Decoder-only byte language model with tied embeddings and replaceable attention.

    Args:
        config: the shape; :class:`ByteLMConfig` defaults when omitted.

    Attributes:
        config: the shape.
        record: what is known of the training run, an empty dictionary for a fresh model.
    """

    def __init__(self, config: ByteLMConfig | None = None) -> None:
        super().__init__()
        self.config = config if config is not None else ByteLMConfig()
        self.record: dict = {}
        self.model = _Decoder(self.config)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def _check(self, ids: Tensor) -> None:
        if ids.ndim != 2:
            raise ValueError(f"ids must be [B, S], got shape {tuple(ids.shape)}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be an integer tensor, got {ids.dtype}")

    def _run(self, ids: Tensor, attend: Attend | None, layers: int) -> tuple[Tensor, Tensor, Tensor]:
        self._check(ids)
        cfg = self.config
        cos, sin = rope_tables(ids.shape[1], cfg.head_dim, cfg.rope_theta, ids.device)
        # uint8 input is accepted because text arrives as bytes; nn.Embedding takes int32 and int64 alone.
        x = self.model.embed_tokens(ids.long())
        for layer in self.model.layers[:layers]:
            x = layer(x, cos, sin, attend if attend is not None else dense_causal)
        return x, cos, sin

    def features(self, ids: Tensor, attend: Attend | None = None) -> Tensor:
        """Final normalised hidden states ``[B, S, hidden_size]`` for ``ids [B, S]``."""
        x, _, _ = self._run(ids, attend, len(self.model.layers))
        return self.model.norm(x)

    def forward(self, ids: Tensor, attend: Attend | None = None) -> Tensor:
        """Next-byte logits ``[B, S, vocab_size]`` for ``ids [B, S]``.

        Args:
            ids: integer tensor of byte values.
            attend: replacement for the attention of every layer (see :data:`Attend`); q and k are already
                normalised and roped.  ``None`` means dense causal attention.
        """
        return F.linear(self.features(ids, attend), self.model.embed_tokens.weight)

    def nll(self, ids: Tensor, attend: Attend | None = None) -> Tensor:
        """Negative log likelihood of each next byte: ``[B, S - 1]``, fp32, in nats.

        Entry ``[b, t]`` is the cost of ``ids[b, t + 1]`` given ``ids[b, : t + 1]``.
        """
        self._check(ids)
        if ids.shape[1] < 2:
            raise ValueError(f"ids must hold at least 2 positions, got S={ids.shape[1]}")
        h, target = self.features(ids, attend)[:, :-1], ids[:, 1:].long()
        parts = []
        for s in range(0, target.shape[1], _LOGIT_CHUNK):
            logits = F.linear(h[:, s : s + _LOGIT_CHUNK], self.model.embed_tokens.weight).float()
            t = target[:, s : s + _LOGIT_CHUNK]
            parts.append(F.cross_entropy(logits.flatten(0, 1), t.flatten(), reduction="none").view_as(t))
        return torch.cat(parts, dim=1)

    def hidden_states(self, ids: Tensor, layer: int, attend: Attend | None = None) -> Tensor:
        """What layer ``layer``'s attention projections read: its input after the norm, ``[B, S, hidden_size]``."""
        chosen = self._layer(layer)
        x, _, _ = self._run(ids, attend, layer)
        return chosen.input_layernorm(x)

    def qkv(self, ids: Tensor, layer: int, attend: Attend | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What layer ``layer`` hands to ``attend``: roped q ``[B, S, Hq, D]``, roped k and v ``[B, S, Hkv, D]``."""
        x = self.hidden_states(ids, layer, attend)
        cos, sin = rope_tables(ids.shape[1], self.config.head_dim, self.config.rope_theta, ids.device)
        return self._layer(layer).self_attn.qkv(x, cos, sin)

    def _layer(self, index: int) -> _Layer:
        n = len(self.model.layers)
        if not 0 <= index < n:
            raise ValueError(f"layer must be in [0, {n}), got {index}")
        layer = self.model.layers[index]
        assert isinstance(layer, _Layer)
        return layer

    def save(self, folder: str | Path, record: dict | None = None) -> None:
        """Write ``byte_lm.safetensors`` (bf16) and ``byte_lm.json`` (config and ``record``) into ``folder``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in self.state_dict().items()}
        save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
        body = {"config": self.config.to_dict(), "training": self.record if record is None else record}
        (folder / _RECORD).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path | None = None, dtype: torch.dtype = torch.float32) -> ByteLM:
        """Read a checkpoint folder; ``None`` means the one shipped with the package.

        Args:
            path: folder holding ``byte_lm.safetensors`` and ``byte_lm.json``.
            dtype: floating-point type of the parameters (stored as bf16).
        """
        from safetensors.torch import load

        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}")
        root = resources.files(__package__).joinpath("data") if path is None else Path(path)
        for name in (_RECORD, _WEIGHTS):
            if not root.joinpath(name).is_file():
                raise ValueError(f"path={path!r}: no {name} in {root}")
        body = json.loads(root.joinpath(_RECORD).read_text(encoding="utf-8"))
        model = cls(ByteLMConfig.from_dict(body["config"]))
        model.load_state_dict(load(root.joinpath(_WEIGHTS).read_bytes()))
        model.record = body.get("training", {})
        return model.to(dtype).eval()
