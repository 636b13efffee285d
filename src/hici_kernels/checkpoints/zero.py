"""Whole float32 weights out of the shards that DeepSpeed's ZeRO optimizer leaves, stages 1 to 3.

Stages 1 and 2 split each parameter group, flattened, into one piece per rank (padded at the end); stage 3 splits every
parameter into one piece per rank. The shapes are in the model-state files, in the order of flattening. Frozen
parameters are kept apart. The files are pickles of DeepSpeed: nothing in them is run, unknown classes become empty
shells that hold no weights.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files


class _Shell:
    """Stands for a class of the training program; takes any state and does nothing with it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __int__(self) -> int:
        """The number that an enumeration, such as the stage, was made from."""
        return int(self.args[0])

    def __setstate__(self, state: Any) -> None:
        pass


def find(run: Path) -> Path | None:
    """The newest ``global_step*`` directory of a run, or ``run`` itself if it is one."""
    if list(run.glob("*optim_states.pt")):
        return run
    latest = run / "latest"
    if latest.is_file():
        named = run / latest.read_text(encoding="utf-8").strip()
        if list(named.glob("*optim_states.pt")):
            return named
    steps = [p for p in run.glob("global_step*") if list(p.glob("*optim_states.pt"))]
    return max(steps, key=lambda p: int(re.sub(r"\D", "", p.name) or 0)) if steps else None


def weights(step: Path) -> dict[str, Tensor]:
    """Float32 tensors by name.

    Raises:
        ValueError: shards missing, of another optimizer, or that do not fit each other.
    """
    try:
        return _weights(step)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{step} is not laid out as ZeRO leaves it: {type(error).__name__} {error}") from error


def _weights(step: Path) -> dict[str, Tensor]:
    optimizers = [_load(p) for p in _ranked(step, "optim_states.pt")]
    models = [_load(p) for p in _ranked(step, "model_states.pt")]
    if not models:
        raise ValueError(f"{step} holds optimizer shards but no *_model_states.pt, which names the parameters")
    states = [o.get("optimizer_state_dict", {}) for o in optimizers]
    if any("zero_stage" not in s for s in states):
        raise ValueError(f"{step} holds no ZeRO optimizer state")
    stage, count = int(states[0]["zero_stage"]), states[0].get("partition_count", len(states))
    count = max(count) if isinstance(count, (list, tuple)) else int(count)
    if count != len(states):
        raise ValueError(f"{step} holds {len(states)} of {count} optimizer shards")
    if stage <= 2:
        found = _stage_2(states, models[0]["param_shapes"], step)
        frozen = models[0].get("frozen_param_fragments") or {}
        found |= {name: x.float() for name, x in frozen.items()}
    elif stage == 3:
        if len(models) != count:
            raise ValueError(f"{step} holds {len(models)} of {count} model shards")
        found = _stage_3(states, models, step)
    else:
        raise ValueError(f"{step} is of ZeRO stage {stage}, expected 1, 2 or 3")
    buffers = set(models[0].get("buffer_names") or ())
    module = models[0].get("module") or {}
    found |= {name: module[name].float() for name in buffers if isinstance(module.get(name), Tensor)}
    for name, same in _pairs(models[0].get("shared_params")):
        if same in found:
            found[name] = found[same]
    return found


def _stage_2(states: list[dict[str, Any]], shapes: list[dict[str, Any]], step: Path) -> dict[str, Tensor]:
    groups = [s["single_partition_of_fp32_groups"] for s in states]
    if any(len(g) != len(shapes) for g in groups):
        raise ValueError(f"{step}: {len(shapes)} parameter groups are named, the shards hold {len(groups[0])}")
    found = {}
    for i, named in enumerate(shapes):
        flat = torch.cat([g[i].flatten() for g in groups])
        at = 0
        for name, shape in named.items():
            size = math.prod(shape)
            if at + size > len(flat):
                raise ValueError(f"{step}: group {i} ends inside {name}")
            found[name] = flat[at : at + size].view(tuple(shape)).float()
            at += size
        # every rank's piece is aligned, so what is left over is less than one alignment unit per rank
        if len(flat) - at >= 2 * len(groups) * max(1, len(groups)) + 64:
            raise ValueError(f"{step}: group {i} holds {len(flat)} numbers, its parameters {at}")
    return found


def _stage_3(states: list[dict[str, Any]], models: list[dict[str, Any]], step: Path) -> dict[str, Tensor]:
    ranks = len(states)
    flats = [torch.cat([g.flatten() for g in s["fp32_flat_groups"]]) for s in states]
    found: dict[str, Tensor] = {}
    at = 0
    for named in models[0]["param_shapes"]:
        for name, shape in named.items():
            size = math.prod(shape)
            piece = -(-size // ranks)
            if at + piece > len(flats[0]):
                raise ValueError(f"{step}: the shards end inside {name}")
            found[name] = torch.cat([f[at : at + piece] for f in flats])[:size].view(tuple(shape)).float()
            at += piece
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        parts = [m["frozen_param_fragments"][name].flatten() for m in models]
        found[name] = torch.cat(parts)[: math.prod(shape)].view(tuple(shape)).float()
    return found


def _ranked(step: Path, ending: str) -> list[Path]:
    def rank(path: Path) -> int:
        numbers = re.search(r"zero_pp_rank_(\d+)", path.name)
        return int(numbers[1]) if numbers else 0

    return sorted(step.glob(f"*{ending}"), key=rank)


def _load(path: Path) -> dict[str, Any]:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # not a zip file (the oldest format, which cannot be listed), or a damaged one
        return files.load_plain(path)
    shells: list[Any] = [(type("Shell", (_Shell,), {}), name) for name in unknown if name.startswith("deepspeed.")]
    with torch.serialization.safe_globals(shells):
        return files.load_plain(path)


def _pairs(shared: Any) -> list[tuple[str, str]]:
    if isinstance(shared, dict):
        return list(shared.items())
    return [(a, b) for a, b in shared or ()]
