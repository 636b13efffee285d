"""From 1K to 8K on real text, by every method, with the control and the leak test that the paper lacks.

    python benchmarks/quality/hici_extension.py --out DIR [--seeds 0,1] [--json FILE] [--chart FILE]

A byte-level model of the Llama architecture is trained dense at 1K on the Python standard library of the running
interpreter, then extended to 8K with the same number of steps of the same text by
    (a) position interpolation + LoRA alone: the control
    (b) LongLoRA's shifted short attention, the same LoRA
    (c) HiCI in every context mode, leaking ones included, the same LoRA on host and slots
    (d) nothing: dual chunk attention      (e) nothing: routed attention (HGA), also on top of (a)
and every model is read by the attention it was trained with and by plain full attention. One table: loss of the same
held-out bytes by context length, parameters added, seconds of training, and whether changing later bytes changes
earlier logits.

A loss through a mode that leaks is no language-model loss: such numbers are in brackets. "last byte" scores one byte
after a window that ends before it, and is valid for every mode.

About an hour on 2 cores with one seed; --base-steps and --steps scale it. Every step is resumable: run the
same command again after an interruption, also after kill -9; what is finished is read from DIR. DIR remembers the
arguments and refuses others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from train_demo_lm import batch_at, load_corpus

from hici_kernels import HGAConfig, HiCIConfig
from hici_kernels.bench.machine import describe
from hici_kernels.config import CONTEXT_MODES
from hici_kernels.evaluate.density import density_of
from hici_kernels.evaluate.leak import leak_test

SLOT_MODULES = ("local_constructor", "global_integrator")


@dataclass(frozen=True)
class Sizes:
    """Everything that decides a number; written to DIR/sizes.json."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 640
    base_context: int = 1024
    context: int = 8192
    base_steps: int = 600
    base_batch: int = 8
    steps: int = 60
    base_lr: float = 2e-3
    lr: float = 3e-4
    hici_lr: float = 3e-3
    hici_clip: float = 0.3
    warmup: int = 20
    lora_rank: int = 8
    lora_alpha: int = 16
    bottleneck: int = 64
    shared_compress: int = 32
    windows: int = 24
    targets: int = 256
    last_windows: int = 64
    corpus_bytes: int = 0  # 0 = all of it
    save_every: int = 20

    @property
    def factor(self) -> float:
        return self.context / self.base_context

    @property
    def segment_len(self) -> int:
        """The published ratio: a quarter of the training length."""
        return self.context // 4

    @property
    def lengths(self) -> list[int]:
        found, n = [], self.base_context
        while n <= self.context:
            found.append(n)
            n *= 2
        return found


#: what the tests run: every code path, no meaning
TINY = Sizes(
    hidden=32, layers=1, heads=2, kv_heads=1, intermediate=32, base_context=64, context=256, base_steps=4, base_batch=2,
    steps=3, warmup=1, bottleneck=8, shared_compress=4, windows=2, targets=16, last_windows=2, corpus_bytes=20000,
    save_every=1,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table: whose weights, read by which attention."""

    name: str
    weights: str  # "base" or the name of a training
    reading: str  # "trained", "full", "dca", "hga"


TRAININGS = ("lora", "s2", *(f"hici-{mode}" for mode in CONTEXT_MODES))
CONTROL = "(a) interpolation + LoRA"
ROWS = (
    Row("base, nothing done", "base", "full"),
    Row("base, position interpolation", "base-pi", "full"),
    Row(CONTROL, "lora", "full"),
    Row("(b) LongLoRA S2, full attention", "s2", "full"),
    *(
        row
        for mode in CONTEXT_MODES
        for row in (
            Row(f"(c) HiCI {mode}, slots", f"hici-{mode}", "trained"),
            Row(f"(c) HiCI {mode}, full attention", f"hici-{mode}", "full"),
        )
    ),
    Row("(d) dual chunk attention", "base", "dca"),
    Row("(e) HGA on base", "base", "hga"),
    Row("(e) HGA on (a)", "lora", "hga"),
)


def build(sizes: Sizes, seed: int) -> Any:
    """The model, untrained."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.base_context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def hici_config(sizes: Sizes, mode: str) -> HiCIConfig:
    return HiCIConfig(
        segment_len=sizes.segment_len,
        context_mode=mode,
        bottleneck_dim=sizes.bottleneck,
        shared_compress_dim=sizes.shared_compress,
        num_heads=4,
        cut="index",
    )


def hga_config(sizes: Sizes) -> HGAConfig:
    """The default budgets at 8K; smaller in proportion at smaller sizes."""
    if sizes.context >= 4096:
        return HGAConfig()
    return HGAConfig(chunk_size=16, group_size=8, keep_first=1, keep_last=2, topk_chunks=2, topk_groups=2)


def prepare(base: Any, sizes: Sizes, training: str, seed: int) -> nn.Module:
    """``base`` with what a training adds: scaled positions, attention, LoRA, trainable embeddings and norms."""
    import peft

    from hici_kernels.integrations import apply_hici, apply_rope_scaling, apply_shifted

    torch.manual_seed(seed + 1)
    apply_rope_scaling(base, "linear", sizes.factor)
    if training == "s2":
        apply_shifted(base, sizes.segment_len)
    elif training.startswith("hici-"):
        apply_hici(base, hici_config(sizes, training.removeprefix("hici-")))
    # the published rule: names by suffix, so LoRA lands on the slots' projections too
    lora = peft.LoraConfig(
        r=sizes.lora_rank,
        lora_alpha=sizes.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, lora)
    for name, p in model.named_parameters():
        if any(part in name for part in ("embed", "norm", *SLOT_MODULES)):
            p.requires_grad_(True)
    return model


def groups(model: nn.Module, sizes: Sizes, training: str) -> list[dict[str, Any]]:
    """Parameter groups: slots at hici_lr, everything else trainable at lr."""
    if training == "base":
        return [{"params": list(model.parameters()), "lr": sizes.base_lr, "peak": sizes.base_lr}]
    slots, host = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (slots if any(part in name for part in SLOT_MODULES) else host).append(p)
    found = [{"params": host, "lr": sizes.lr, "peak": sizes.lr}]
    if slots:
        found.append({"params": slots, "lr": sizes.hici_lr, "peak": sizes.hici_lr})
    return found


def train(folder: Path, sizes: Sizes, training: str, seed: int, stream: np.ndarray) -> dict[str, Any]:
    """Train (or finish training, or find trained) one model; its record. Weights are in folder/<training>/state.pt."""
    base = build(sizes, seed)
    if training != "base":
        base.load_state_dict(torch.load(folder / "base" / "state.pt", weights_only=True)["model"])
    before = sum(p.numel() for p in base.parameters())
    model = base if training == "base" else prepare(base, sizes, training, seed)
    added = sum(p.numel() for p in model.parameters()) - before
    parts = groups(model, sizes, training)
    optimiser = torch.optim.AdamW(parts, betas=(0.9, 0.95), weight_decay=0.0)
    path = folder / training / "state.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"step": 0, "losses": [], "step_s": [], "added": added}
    if path.is_file():
        held = torch.load(path, weights_only=True)
        model.load_state_dict(held["model"])
        optimiser.load_state_dict(held["optimiser"])
        record = held["record"]
    steps, batch, length = sizes.steps, 1, sizes.context
    if training == "base":
        steps, batch, length = sizes.base_steps, sizes.base_batch, sizes.base_context
    # the base has read the front of the same endless order of windows
    offset = 0 if training == "base" else 10**6
    model.train()
    bar = tqdm(range(record["step"], steps), initial=record["step"], total=steps, desc=training, disable=None)
    for step in bar:
        start = time.perf_counter()
        ids = batch_at(stream, length, batch, offset + step * batch, seed)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * schedule(step, steps, sizes.warmup, training == "base")
        optimiser.zero_grad(set_to_none=True)
        if step == 0:
            with saved_bytes(model) as kept:
                loss = nll(model, ids).mean()
            record["saved_bytes"] = sum(kept.values())
        else:
            loss = nll(model, ids).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
        if len(optimiser.param_groups) > 1:
            nn.utils.clip_grad_norm_(optimiser.param_groups[1]["params"], sizes.hici_clip)
        optimiser.step()
        record["losses"].append(loss.item())
        record["step_s"].append(time.perf_counter() - start)
        record["step"] = step + 1
        bar.set_postfix(loss=f"{record['losses'][-1]:.3f}")
        if not math.isfinite(record["losses"][-1]):
            raise ValueError(f"{training}: the loss of step {step} is {record['losses'][-1]}")
        if (step + 1) % sizes.save_every == 0 or step + 1 == steps:
            save(path, {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "record": record})
    return record


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that the forward pass keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def save(path: Path, state: dict[str, Any]) -> None:
    """All or nothing: an interruption leaves the former file."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def schedule(step: int, steps: int, warmup: int, decay: bool) -> float:
    """Linear warm-up, then constant (the published recipe), or a cosine to a tenth for the base."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)) if decay else 1.0)


def nll(model: nn.Module, ids: Tensor, last: int | None = None) -> Tensor:
    """Loss of every next byte, [B, S - 1], or of the last ``last`` ones."""
    keep = 0 if last is None else last + 1
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.float()
    targets = ids[:, 1:] if last is None else ids[:, ids.shape[1] - last :]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view(ids.shape[0], -1)


def open_row(folder: Path, sizes: Sizes, row: Row, seed: int) -> nn.Module:
    """The model of a row, in eval mode."""
    from hici_kernels.integrations import DCAConfig, apply_dca, apply_hga, apply_rope_scaling, restore

    base = build(sizes, seed)
    base.load_state_dict(torch.load(folder / "base" / "state.pt", weights_only=True)["model"])
    model: nn.Module = base
    if row.weights in TRAININGS:
        model = prepare(base, sizes, row.weights, seed)
        model.load_state_dict(torch.load(folder / row.weights / "state.pt", weights_only=True)["model"])
    if row.reading != "trained" and row.weights in TRAININGS:
        restore(model)  # takes the scaled positions back too
        apply_rope_scaling(model, "linear", sizes.factor)
    elif row.weights == "base-pi":
        apply_rope_scaling(model, "linear", sizes.factor)
    if row.reading == "dca":
        local = sizes.base_context // 16
        apply_dca(model, DCAConfig(3 * sizes.base_context // 4 - local, local))
    elif row.reading == "hga":
        apply_hga(model, hga_config(sizes))
    return model.eval()


@torch.no_grad()
def evaluate(folder: Path, sizes: Sizes, row: Row, seed: int, held: np.ndarray) -> dict[str, Any]:
    """Loss by context length over the same targets, the loss of last bytes, and the leak verdict."""
    name = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
    path = folder / "rows" / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    start = time.perf_counter()
    model = open_row(folder, sizes, row, seed)
    ends = np.linspace(sizes.context, len(held) - 1, sizes.windows).astype(int)
    losses: dict[str, Any] = {}
    for length in sizes.lengths:
        per = [float(nll(model, window(held, int(e), length), sizes.targets).mean()) for e in ends]
        losses[str(length)] = mean_se(per)
    ends = np.linspace(sizes.context, len(held) - 1, sizes.last_windows).astype(int)
    last = []
    for e in ends:
        logits = model(input_ids=window(held, int(e), sizes.context), use_cache=False, logits_to_keep=1).logits
        last.append(float(F.cross_entropy(logits[0, -1:].float(), torch.tensor([int(held[e])]))))
    verdict = leak_test(lambda ids: model(input_ids=ids, use_cache=False).logits.float(), 256, sizes.context, seed=seed)
    mode = row.weights.removeprefix("hici-") if row.reading == "trained" else None
    config: Any = hici_config(sizes, mode) if mode else hga_config(sizes)
    method = "hici" if mode else "hga" if row.reading == "hga" else "none"
    result = {
        "row": row.name,
        "weights": row.weights,
        "reading": row.reading,
        "seed": seed,
        "loss": losses,
        "last_byte": mean_se(last),
        "leak": verdict.to_dict(),
        "density": density_of(method, config, sizes.context),
        "evaluation_s": time.perf_counter() - start,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return result


def window(stream: np.ndarray, end: int, length: int) -> Tensor:
    """int64 [1, length]: the bytes before ``end``."""
    return torch.from_numpy(stream[end - length : end].astype(np.int64))[None]


def mean_se(values: list[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "se": error}


def check_folder(out: Path, sizes: Sizes) -> None:
    """A folder belongs to one set of sizes."""
    path, wanted = out / "sizes.json", dataclasses.asdict(sizes)
    out.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        if held != wanted:
            other = [f"{k}={held.get(k)}" for k in wanted if held.get(k) != wanted[k]]
            raise ValueError(f"--out {out} holds a run with other sizes: {', '.join(other)}")
    else:
        path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def run(out: Path, sizes: Sizes, seeds: list[int]) -> dict[str, Any]:
    """All trainings and all rows of all seeds; what is there already is not computed again."""
    check_folder(out, sizes)
    stream, packages, about = load_corpus()
    held = np.concatenate(list(packages.values()))
    if sizes.corpus_bytes:
        stream, held = stream[: sizes.corpus_bytes], held[: sizes.corpus_bytes]
    trained, rows = [], []
    for seed in seeds:
        folder = out / f"seed{seed}"
        for training in ("base", *TRAININGS):
            record = train(folder, sizes, training, seed, stream)
            trained.append(
                {
                    "training": training,
                    "seed": seed,
                    "parameters_added": record["added"],
                    "steps": record["step"],
                    "seconds": sum(record["step_s"]),
                    "step_median_s": statistics.median(record["step_s"]),
                    "step_fastest_s": min(record["step_s"]),
                    "step_slowest_s": max(record["step_s"]),
                    "saved_bytes": record["saved_bytes"],
                    "losses": record["losses"],
                }
            )
        for row in tqdm(ROWS, desc="evaluation", disable=None):
            rows.append(evaluate(folder, sizes, row, seed, held))
    return {
        "sizes": dataclasses.asdict(sizes),
        "seeds": seeds,
        "text": about,
        "machine": describe(),
        "trainings": trained,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown. Means over seeds; a loss through a leak is in brackets."""
    lengths = Sizes(**result["sizes"]).lengths
    costs = {(t["training"], t["seed"]): t for t in result["trainings"]}
    far_end = lengths[-1]
    difference = f"at {far_end} minus (a)"
    titles = ["method", *(f"loss at {n}" for n in lengths), difference, "last byte", "added", "seconds", "leak test"]
    lines = [
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
    ]
    control = {r["seed"]: r["loss"][str(far_end)]["mean"] for r in result["rows"] if r["row"] == CONTROL}
    for row in ROWS:
        mine = [r for r in result["rows"] if r["row"] == row.name]
        leaks = any(r["leak"]["leaks"] for r in mine)
        cells = []
        for n in lengths:
            text = across([r["loss"][str(n)] for r in mine])
            cells.append(f"[{text}]" if leaks else text)
        text = ", ".join(f"{r['loss'][str(far_end)]['mean'] - control[r['seed']]:+.4f}" for r in mine)
        cells.append(f"[{text}]" if leaks else text)
        cells.append(across([r["last_byte"] for r in mine]))
        cost = [costs[row.weights, r["seed"]] for r in mine] if row.weights in TRAININGS else []
        cells.append(f"{cost[0]['parameters_added']:,}" if cost else "0")
        cells.append(f"{statistics.fmean(c['steps'] * c['step_fastest_s'] for c in cost):.0f}" if cost else "0")
        far = max(r["leak"]["furthest"] for r in mine)
        cells.append(f"LEAKS, at least {far} bytes early" if leaks else "no leak")
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"Seeds {', '.join(map(str, result['seeds']))}, means over them; nats per byte, ± standard error over windows. "
        "All rows read the same windows, so that differences are surer than that; each seed's stands by itself. "
        "Seconds are those of the fastest step, as often: a run that shares its machine has no others."
    )
    lines.append("")
    lines.append("| training | step, median | fastest to slowest | kept for the backward pass |")
    lines.append("|---|---|---|---|")
    for t in result["trainings"]:
        spread = f"{t['step_fastest_s']:.3f} to {t['step_slowest_s']:.3f} s"
        kept = f"{t['saved_bytes'] / 2**20:.1f} MiB"
        lines.append(f"| {t['training']}, seed {t['seed']} | {t['step_median_s']:.3f} s | {spread} | {kept} |")
    return "\n".join(lines)


def across(found: list[dict[str, Any]]) -> str:
    errors = [f["se"] for f in found if f["se"] is not None]
    error = f" ± {math.sqrt(sum(e * e for e in errors)) / len(errors):.4f}" if errors else ""
    return f"{statistics.fmean(f['mean'] for f in found):.4f}{error}"


def chart(result: dict[str, Any], path: Path) -> None:
    """Loss over context length, one line per row; rows that leak are dotted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    lengths = Sizes(**result["sizes"]).lengths
    for i, row in enumerate(ROWS):
        mine = [r for r in result["rows"] if r["row"] == row.name]
        leaks = any(r["leak"]["leaks"] for r in mine)
        means = [statistics.fmean(r["loss"][str(n)]["mean"] for r in mine) for n in lengths]
        style = {"ls": ":" if leaks else "-", "marker": "osD^v"[i % 5], "color": f"C{i % 10}", "ms": 4}
        ax.plot(lengths, means, label=row.name + (" (leaks)" if leaks else ""), **style)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="bytes of context", ylabel="nats per byte, same held-out bytes")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder of checkpoints and results; resumed if it exists")
    p.add_argument("--seeds", default="0", help="separated by commas")
    p.add_argument("--base-steps", type=int, default=Sizes.base_steps)
    p.add_argument("--steps", type=int, default=Sizes.steps, help="of every extension")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--tiny", action="store_true", help="seconds instead of an hour; proves the code, means nothing")
    p.add_argument("--json", type=Path)
    p.add_argument("--chart", type=Path)
    args = p.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        sizes = TINY if args.tiny else dataclasses.replace(Sizes(), base_steps=args.base_steps, steps=args.steps)
        result = run(args.out, sizes, [int(s) for s in args.seeds.split(",")])
    except ValueError as error:
        print(f"hici_extension: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    text = table(result)
    print(text)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    json_path = args.json or args.out / "result.json"
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.chart is not None:
        chart(result, args.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
