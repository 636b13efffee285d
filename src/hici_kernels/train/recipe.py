"""What a training run is made of, apart from the model and the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import _checks
from ..config import HiCIConfig

ENGINES = ("plain", "fsdp2", "zero2", "zero3")
ROPE_RULES = ("ceil", "exact")
#: model types whose published recipe rounds the RoPE factor up
CEIL_TYPES = ("llama",)


@dataclass(frozen=True)
class Recipe:
    """The published recipe, field by field.

    context: tokens of one packed row. hici: fields of a :class:`HiCIConfig`; without a segment rule, segment_len is a
    quarter of context, or that of the checkpoint a run starts from. mixed_segments: segment lengths of which one is
    drawn for every row (a function of seed and row, so that recomputation and resuming draw the same one); empty =
    always segment_len.

    lora_r 0 = none, every parameter is trained. Otherwise LoRA (dropout 0, no biases) on every module whose name ends
    with one of lora_targets, those of HiCI included, and besides it every parameter whose name contains one of
    trainable. Slot modules are always trained.

    learning_rate for the host's parameters, hici_lr for the slot modules' own and their LoRA. max_grad_norm clips the
    gradient of all parameters, hici_grad_clip afterwards that of the slot modules alone; None = no clip.

    rope_factor None: context / (max_position_embeddings * factor the model has), at least 1, rounded up for Llama, as
    published. special_tokens: add [PAD], </s>, <s>, <unk> where the tokenizer lacks them; new embedding rows are the
    mean of the old ones; embeddings never shrink.

    dtype: of frozen weights, "float32" or "bfloat16"; trained ones are float32. precision of the computation:
    "float32", "bfloat16" (autocast), or None for bfloat16 on a GPU and with frozen weights of that dtype, and float32
    elsewhere.
    """

    context: int = 16384
    hici: Mapping[str, Any] = field(default_factory=dict)
    mixed_segments: tuple[int, ...] = ()
    lora_r: int = 8
    lora_alpha: int = 16
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    trainable: tuple[str, ...] = ("embed", "norm")
    learning_rate: float = 2e-5
    hici_lr: float = 2e-4
    max_grad_norm: float | None = 1.0
    hici_grad_clip: float | None = 0.3
    weight_decay: float = 0.0
    warmup_steps: int = 20
    max_steps: int = 1000
    batch_size: int = 1
    accumulation: int = 16
    rope_factor: float | None = None
    special_tokens: bool = True
    template: str = "[INST]{instruction}[/INST]"
    gradient_checkpointing: bool = True
    dtype: str = "float32"
    precision: str | None = None
    save_steps: int = 100
    keep_checkpoints: int = 2
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("mixed_segments", "lora_targets", "trainable"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                raise TypeError(f"{name} must be a list, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("lora_targets", "trainable"):
            for part in getattr(self, name):
                # an empty part is in every name
                if not isinstance(part, str) or not part:
                    raise TypeError(f"{name} must list names or parts of names, got {part!r}")
        for name, least in (("context", 2), ("lora_r", 0), ("lora_alpha", 1), ("warmup_steps", 0), ("max_steps", 1),
                            ("batch_size", 1), ("accumulation", 1), ("save_steps", 1), ("keep_checkpoints", 1),
                            ("seed", 0)):  # fmt: skip
            _checks.integer(name, getattr(self, name), least)
        for name in ("learning_rate", "hici_lr", "max_grad_norm", "hici_grad_clip", "rope_factor"):
            value = getattr(self, name)
            optional = name in ("max_grad_norm", "hici_grad_clip", "rope_factor")
            if value is None and optional:
                continue
            _checks.number(name, value)
            if value <= 0:
                raise ValueError(f"{name} must be positive{' or None' if optional else ''}, got {value}")
        _checks.number("weight_decay", self.weight_decay)
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        for name in ("special_tokens", "gradient_checkpointing"):
            _checks.boolean(name, getattr(self, name))
        for length in self.mixed_segments:
            _checks.integer("mixed_segments", length, 1)
        _checks.choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.precision is not None:
            _checks.choice("precision", self.precision, ("float32", "bfloat16"))
        if (self.dtype, self.precision) == ("bfloat16", "float32"):
            raise ValueError("precision must be 'bfloat16' or None with dtype 'bfloat16', got 'float32'")
        try:
            filled = "{instruction}" in self.template and bool(self.template.format(instruction=""))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            filled = False
        if not filled:
            raise ValueError(
                f"template must be a text with {{instruction}}, its only field, and other braces doubled, got "
                f"{self.template!r}"
            )
        if self.mixed_segments and min(self.mixed_segments) < self.config().recurrence_len:
            raise ValueError(
                f"mixed_segments must be at least hici's recurrence_len {self.config().recurrence_len}, got "
                f"{min(self.mixed_segments)}"
            )
        if self.config().segment_len is None:
            raise ValueError("hici needs a segment_len: rows are packed documents, which num_segments cannot cut")

    def config(self) -> HiCIConfig:
        """The slots and segments to train with."""
        values = dict(self.hici)
        if values.get("segment_len") is None and "num_segments" not in values:
            values["segment_len"] = math.ceil(self.context / 4)
        return HiCIConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Raises ValueError for a name that is no field."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"{name!r} is not a field of Recipe; fields: {', '.join(sorted(known))}")
        return cls(**values)


def engine_file(name: str) -> Path | None:
    """The configuration file of an engine, None for "plain" (one process, or data parallel).

    Raises:
        ValueError: no such engine.
    """
    _checks.choice("engine", name, ENGINES)
    return None if name == "plain" else Path(__file__).with_name("engines") / f"{name}.json"
