"""transformers' Trainer with the recipe's two parameter groups, its clip, and checkpoints in the published layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..checkpoints import files, names
from ..integrations import save_hici
from .groups import HiCIClip, parameter_groups
from .recipe import Recipe

METRICS = "metrics.jsonl"


class _Watch(TrainerCallback):
    """After every step: did the clip act? At every log: one line of JSON."""

    def __init__(self, clip: HiCIClip, path: Path) -> None:
        self.clip, self.path = clip, path

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clip.take()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run goes on after its checkpoint: later lines are those of the run that was lost."""
        if state.is_world_process_zero and self.path.is_file():
            kept = []
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= state.global_step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    break  # cut off in the middle of a line
            files.write_text(self.path, "".join(kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class HiCITrainer(Trainer):
    """The loops, launching, logging and resuming are transformers'; see :class:`Recipe` for what is added."""

    optimizer: Any

    def __init__(self, model: nn.Module, recipe: Recipe, args: Any, **kwargs: Any) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self.recipe = recipe
        #: what is trained besides the tensors that the published layout always holds
        self.others = [
            plain
            for name, p in model.named_parameters()
            if p.requires_grad and not names.is_trainable(plain := _plain(name)) and not names.is_lora(plain)
        ]
        stage = 0
        if self.is_deepspeed_enabled:
            plugin = self.accelerator.state.deepspeed_plugin
            if "optimizer" in plugin.deepspeed_config:
                raise ValueError(
                    "the DeepSpeed configuration has its own 'optimizer', which would ignore hici_lr and hici_grad_clip"
                )
            if "scheduler" in plugin.deepspeed_config:
                raise ValueError("the DeepSpeed configuration has its own 'scheduler', which would ignore warmup_steps")
            stage = int(plugin.zero_stage)
            if stage == 0:
                raise ValueError("DeepSpeed without ZeRO is not supported: use ZeRO-2, ZeRO-3, FSDP2 or none")
            for p in self.model.parameters():
                if p.ndim == 0:  # DeepSpeed broadcasts parameters as bytes, which a scalar cannot be viewed as
                    p.data = p.data.reshape(1)
            if stage == 3:
                _gather_slots_whole(self.model)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("FSDP version 1 is not supported: its flat parameters hide which are HiCI's; use FSDP2")
        self.clip = HiCIClip(recipe.hici_grad_clip, partitioned=stage > 0)
        self.add_callback(_Watch(self.clip, Path(args.output_dir) / METRICS))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = (self.model if model is None else model).named_parameters()
            recipe = self.recipe
            groups = parameter_groups(named, recipe.learning_rate, recipe.hici_lr, recipe.weight_decay)
            made, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = made(groups, **settings)
            self.clip.attach(self.optimizer)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self.clip.measured())
        super().log(logs, *args, **kwargs)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: nothing that follows would be worth "
                "anything; checkpoints from before are kept. Try a lower learning_rate, hici_lr or max_grad_norm"
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What is trained, in the published layout. Sharded engines keep all weights in files of their own besides."""
        out = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        save_hici(self.model, out, also=self.others)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(out)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        directory = Path(resume_from_checkpoint)
        held: dict[str, torch.Tensor] = {}
        for stem in ("trainable_params", "adapter_model"):
            if (directory / f"{stem}.safetensors").is_file():
                for raw, x in files.read(directory / f"{stem}.safetensors"):
                    held[_plain(raw)] = x
        target = self.model if model is None else model
        with torch.no_grad():
            for name, p in target.named_parameters():
                if p.requires_grad:
                    found = held.get(_plain(name))
                    if found is None or found.shape != p.shape:
                        raise ValueError(f"{directory} does not hold {name} of shape {tuple(p.shape)}")
                    p.copy_(found)


def _plain(name: str) -> str:
    """One name for a tensor in the model and in the files."""
    found = names.canonical(name)
    assert found is not None
    if not names.is_lora(found):
        return found
    module, part = names.lora_parts(found)
    return f"{module}.lora_{part}"


def _gather_slots_whole(model: Any) -> None:
    """Slot modules read weights of their children directly: ZeRO-3 must gather a module's weights together."""
    from deepspeed.utils import set_z3_leaf_modules

    from ..nn import GlobalIntegrator, LocalConstructor

    set_z3_leaf_modules(model, [LocalConstructor, GlobalIntegrator])
