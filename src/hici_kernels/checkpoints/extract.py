"""From a training run to the two files of a published HiCI checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from . import files, fsdp, names, zero


def extract(
    run: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    also: Collection[str] = (),
    progress: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """Write ``adapter_model.safetensors`` and ``trainable_params.safetensors`` from the weights of a training run.

    The run is a directory with ZeRO shards (stages 1 to 3; ``latest`` or ``global_step*`` inside, or the step itself),
    a sharded torch.distributed checkpoint (FSDP), or plain weights (model or adapter files, sharded or not). Names with
    "lora" go to the adapter, without the adapter's name; embeddings, norms and slot modules to the other file, under
    the base model's names, scalars as scalars (DeepSpeed runs hold them as [1]), and everything that the run itself
    has in a ``trainable_params`` file. Other weights are taken to be those of the base model and left out, which
    ``progress`` is told. An ``adapter_config.json`` or ``hici_config.json`` of the run is copied; without one that of
    ``out`` is kept, which ``progress`` is told too.

    Args:
        dtype: of the written LoRA matrices; default as stored (float32 from ZeRO). Others are written as stored.
        also: names, as the base model has them, of further tensors that the run trained: into the second file.

    Returns:
        Number of tensors in each file.

    Raises:
        ValueError: no weights found, shards missing or damaged, more than one adapter, no slot modules or none of a
            name in ``also`` among them; ``out`` is ``run``, or holds an adapter that the run has not. Nothing has been
            written then.
    """
    run, out = Path(run), Path(out)
    if not run.is_dir():
        raise ValueError(f"{run} is not a directory")
    if out.resolve() == run.resolve():
        raise ValueError(f"out must be another directory than the run, got {str(out)!r}")
    say = progress or (lambda line: None)
    tensors, trained = _weights(run, say)
    left: list[str] = []
    adapter: dict[str, Tensor] = {}
    trainable: dict[str, Tensor] = {}
    for raw, x in tensors.items():
        name = names.canonical(raw)
        if name is None:
            continue
        if names.is_lora(name):
            module, part = names.lora_parts(name)
            name = f"{names.PEFT_PREFIX}{module}.lora_{part}.weight"
            target, x = adapter, x if dtype is None else x.to(dtype)
        elif names.is_trainable(name) or names.is_kept_whole(raw) or name in also or raw in trained:
            target, x = trainable, x.reshape(()) if name.endswith(".expand_scale_param") else x
        else:
            left.append(name)
            continue
        if name in target:
            raise ValueError(f"{run} holds {name} more than once: the run must carry one adapter")
        target[name] = x
    if not any(names.slot_parts(name) for name in trainable):
        raise ValueError(f"{run} holds {len(tensors)} tensors, but none of local_constructor or global_integrator")
    for name in also:
        if name not in trainable:
            raise ValueError(f"{run} holds no tensor {name!r}")
    files.check_adapter(out, bool(adapter))
    if left:
        say(f"left out, as of the base model: {len(left)} other tensors, first {left[0]}")
    counts = {"trainable_params": len(trainable)}
    files.clear_shards(out)
    files.write(out / "trainable_params.safetensors", trainable)
    if adapter:
        files.write(out / "adapter_model.safetensors", adapter)
        counts["adapter_model"] = len(adapter)
    for name in ("adapter_config.json", "hici_config.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, out / name)
        elif (out / name).is_file():
            say(f"kept, since the run has none: {out / name}")
    for what, count in counts.items():
        say(f"{what}.safetensors: {count} tensors")
    return counts


def _weights(run: Path, say: Callable[[str], None]) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors by name, and the names of those in the published layout already."""
    step = zero.find(run)
    if step is not None:
        say(f"ZeRO shards in {step}")
        return zero.weights(step), set()
    sharded = fsdp.find(run)
    if sharded is not None:
        say(f"sharded checkpoint in {sharded}")
        return fsdp.weights(sharded), set()
    found: dict[str, Tensor] = {}
    trained: set[str] = set()
    for stem in ("model", "pytorch_model", "adapter_model", "trainable_params"):
        for path in files.shards(run, stem):
            say(f"weights in {path}")
            held = dict(files.read(path))
            found |= held
            trained |= set(held) if stem == "trainable_params" else set()
    if not found:
        raise ValueError(
            f"{run} holds no weights this library knows: neither ZeRO shards (*optim_states.pt), nor a sharded "
            "checkpoint (.metadata), nor model, pytorch_model, adapter_model or trainable_params files"
        )
    return found, trained
