"""One training run from a model directory to a HiCI checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _checks
from ..checkpoints import extract, files
from ..integrations import versions
from .recipe import Recipe, engine_file

RESULT = "hici"
#: what may differ where a run goes on: nothing that was trained so far would have been trained otherwise
MAY_CHANGE = ("max_steps", "save_steps", "keep_checkpoints", "gradient_checkpointing")
#: bytes of a weight file that are read to know it again: so many pieces of so many bytes, evenly spread
_PIECES, _PIECE = 64, 1 << 14


def last_complete(out: Path, processes: int) -> Path | None:
    """The newest checkpoint that was written to its end; one that a killed run left half written is passed over.

    Raises:
        ValueError: all that are complete were written by another number of processes.
    """
    found, others = [], set()
    for path in out.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        ranks = 1 if (path / "rng_state.pth").is_file() else len(list(path.glob("rng_state_*.pth")))
        if number is None or state.get("global_step") != int(number[1]):
            continue
        if ranks == processes:
            found.append((int(number[1]), path))
        elif ranks:
            others.add(ranks)
    if others and not found:
        raise ValueError(
            f"the checkpoints in {out} are of {min(others)} processes, this run has {processes}: go on with as many, "
            "or start in another folder"
        )
    return max(found)[1] if found else None


def _check_folder(out: Path, about: dict[str, Any], resume: bool) -> None:
    """A run does not start among another's checkpoints, which a later one would go on from, and keeps its recipe."""
    if not any(out.glob("checkpoint-*")):
        return
    if not resume:
        raise ValueError(f"{out} holds checkpoints of an earlier run: start in another folder, or remove them")
    file = out / "recipe.json"
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name in about:
        if name not in MAY_CHANGE and name in before and before[name] != about[name]:
            raise ValueError(
                f"{out} holds a run with {name} = {before[name]!r}, this one has {about[name]!r}: go on with the same "
                "recipe and data, or start in another folder"
            )


def _content(directory: Path) -> str:
    """What tells a model or checkpoint from another, wherever it lies: names, sizes and samples of its weight files."""
    digest = hashlib.sha256()
    held = directory.iterdir() if directory.is_dir() else [directory]
    for path in sorted(p for p in held if p.suffix in files.SUFFIXES or p.name.endswith("config.json")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with open(path, "rb") as file:
            for i in range(_PIECES):
                file.seek(max(0, size - _PIECE) * i // (_PIECES - 1))
                digest.update(file.read(_PIECE))
                if size <= _PIECE:
                    break
    return digest.hexdigest()[:16]


def run(
    model: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    recipe: Recipe,
    *,
    kind: str = "text",
    engine: str = "plain",
    checkpoint: str | Path | None = None,
    resume: bool = True,
    report_to: str = "none",
) -> dict[str, Any]:
    """Train and write ``out/hici``, a checkpoint in the published layout for :func:`load_hici`.

    Run by one process, or by every process that torchrun or accelerate launch starts. ``out`` also gets the packed
    tokens (data/), recipe.json, metrics.jsonl (a line per step: loss, both learning rates, norms before and after
    HiCI's clip) and the newest checkpoints, from which a later call with ``resume`` goes on: same order of rows, same
    curve.

    Args:
        model: directory of the base model. data: files, see :func:`data.documents`. kind: "text" or "answers".
        engine: "plain" (also data parallel), "fsdp2", "zero2", "zero3" (both need deepspeed).
        checkpoint: a HiCI checkpoint to start from instead of new slots; its segment_len, too, unless ``recipe.hici``
            has one.
        resume: go on from what ``out`` holds. The recipe may then differ in max_steps, save_steps, keep_checkpoints and
            gradient_checkpointing alone; model, checkpoint, data and processes not at all. False: ``out`` must hold no
            checkpoints.
        report_to: "tensorboard" (out/runs), or another reporter of transformers.

    Returns:
        {"step", "loss" (of the last logged step), "result" (directory), "metrics" (file)}.

    Raises:
        ValueError, TypeError, FileNotFoundError: before any training; a loss that is no number ends it, with
            the checkpoints from before kept. RuntimeError: the clip did not act.
    """
    versions.check()
    _checks.boolean("resume", resume)
    config_file = engine_file(engine)
    model, out = Path(model), Path(out)
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} is not a model directory: it has no config.json")
    paths = [Path(p) for p in data]
    if not paths:
        raise ValueError("data must name at least one file")
    # as JSON gives it back
    about = json.loads(json.dumps({"kind": kind, **recipe.to_dict()}))
    about |= {"model": _content(model), "checkpoint": None if checkpoint is None else _content(Path(checkpoint))}
    _check_folder(out, about, resume)
    cpu = not torch.cuda.is_available()
    if engine == "fsdp2" and recipe.dtype != "float32":
        raise ValueError("engine fsdp2 needs dtype float32: all parameters of a layer are sharded as one type")

    from transformers import TrainerState, TrainingArguments

    from .data import PackedRows, collate, prepare
    from .model import build
    from .trainer import METRICS, HiCITrainer

    precision = recipe.precision or ("float32" if cpu and recipe.dtype == "float32" else "bfloat16")
    options: dict[str, Any] = {}
    if engine == "fsdp2":
        options = {"fsdp": True, "fsdp_config": str(config_file)}
    elif config_file is not None:
        options = {"deepspeed": str(config_file)}
    # built before the engine's settings are known to transformers, which would shard weights that slots start from
    trained, tokenizer = build(model, recipe, None if checkpoint is None else Path(checkpoint))
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm or 0.0,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=recipe.warmup_steps,
        bf16=precision == "bfloat16",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number would be logged as 0
        save_steps=recipe.save_steps,
        save_total_limit=recipe.keep_checkpoints,
        seed=recipe.seed,
        remove_unused_columns=False,
        report_to=[] if report_to == "none" else [report_to],
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        ddp_find_unused_parameters=False,
        **options,
    )
    slots, factor, lora = _about(trained)
    if slots["segment_len"] is None:
        raise ValueError(
            f"{checkpoint} cuts texts by num_segments, which rows of packed documents cannot be: give recipe.hici a "
            "segment_len"
        )
    files.check_adapter(out / RESULT, lora is not None)
    start = last_complete(out, args.world_size) if resume else None
    with args.main_process_first(local=False):
        rows = PackedRows(prepare(paths, kind, tokenizer, recipe, out / "data"), recipe, slots["segment_len"])
    about["data"] = rows.meta
    _check_folder(out, {"data": rows.meta}, resume)
    trainer = HiCITrainer(trained, recipe, args, train_dataset=rows, data_collator=collate, processing_class=tokenizer)
    if args.should_save:
        files.write_text(out / "recipe.json", json.dumps(about, indent=2) + "\n")
    if start is not None and int(start.name.removeprefix("checkpoint-")) >= recipe.max_steps:
        # a trainer that is resumed takes one more step before it looks whether it has come to the end
        trainer.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    trainer.accelerator.wait_for_everyone()
    result = out / RESULT
    if args.should_save:
        last = out / f"checkpoint-{trainer.state.global_step}"
        extract(last, result, also=trainer.others)
        files.write_text(
            result / "hici_config.json", json.dumps({"hici": slots, "rope_factor": factor}, indent=2) + "\n"
        )
        if lora is not None:
            lora.save_pretrained(str(result))
        tokenizer.save_pretrained(result)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "step": trainer.state.global_step,
        "loss": losses[-1] if losses else None,
        "result": str(result),
        "metrics": str(out / METRICS),
    }


def _about(model: Any) -> tuple[dict[str, Any], float | None, Any]:
    from ..integrations.host import Host
    from ..integrations.rope_scaling import linear_factor

    adapters = getattr(model, "peft_config", {})
    return dict(model.config.hici), linear_factor(Host.of(model)), next(iter(adapters.values()), None)
