"""Does the demo language model use long context?  Two measurements on packages it never saw.

    python benchmarks/quality/eval_demo_lm.py [--json result.json] [--record]

Paired: the same target bytes are scored once with 1024 and once with 8192 bytes before them, so that nothing but
context differs.  By position: mean loss in position bands of 16K windows, where other positions are other bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from train_demo_lm import blocked_causal, load_corpus

from hici_kernels.demo.lm import ByteLM

#: Position bands ``[first, last)`` of a 16K window, in bytes, each ending at the position that names it.
BANDS = {
    "0-256": (0, 256),
    "1K": (768, 1024),
    "2K": (1536, 2048),
    "4K": (3072, 4096),
    "8K": (6144, 8192),
    "16K": (12288, 16384),
}


def spread(held: dict[str, np.ndarray], length: int, count: int) -> list[tuple[str, int]]:
    """``(group, start)`` of about ``count`` windows of ``length`` bytes, evenly spaced, by the size of each group."""
    room = {g: len(s) - length for g, s in held.items() if len(s) > length}
    if not room:
        raise ValueError(f"length={length} exceeds every held-out stream")
    total = sum(room.values())
    out = []
    for g, r in room.items():
        n = max(1, round(count * r / total))
        out += [(g, int(x)) for x in np.linspace(0, r, n)]
    return out


def window(stream: np.ndarray, start: int, length: int) -> Tensor:
    """int64 ``[1, length]``."""
    return torch.from_numpy(stream[start : start + length].astype(np.int64))[None]


def mean_se(values: np.ndarray) -> dict[str, float]:
    """Mean and standard error over windows."""
    return {"mean": round(float(values.mean()), 4), "se": round(float(values.std(ddof=1) / len(values) ** 0.5), 4)}


def paired(
    model: ByteLM, held: dict[str, np.ndarray], short: int, long: int, targets: int, windows: int
) -> dict[str, object]:
    """Loss of the same ``targets`` bytes per window after ``short`` and after ``long`` preceding bytes."""
    picks = spread(held, long + targets, windows)
    lo, hi, groups = [], [], []
    for g, start in tqdm(picks, desc="paired", disable=None):
        ids = window(held[g], start, long + targets)
        # Entry t of nll scores byte t + 1, hence the last `targets` entries are the targets.
        hi.append(model.nll(ids, blocked_causal)[0, -targets:].mean().item())
        lo.append(model.nll(ids[:, long - short :], blocked_causal)[0, -targets:].mean().item())
        groups.append(g)
    a, b = np.array(lo), np.array(hi)
    by_group = {g: round(float((a - b)[[x == g for x in groups]].mean()), 4) for g in sorted(set(groups))}
    return {
        "short_context": short,
        "long_context": long,
        "target_bytes_per_window": targets,
        "windows": len(picks),
        "loss_short": mean_se(a),
        "loss_long": mean_se(b),
        "gap": mean_se(a - b),
        "windows_improved": round(float((a > b).mean()), 3),
        "gap_by_package": by_group,
    }


def by_position(model: ByteLM, held: dict[str, np.ndarray], length: int, windows: int) -> dict[str, object]:
    """Mean loss in the position bands of ``length``-byte windows."""
    picks = spread(held, length, windows)
    rows = []
    for g, start in tqdm(picks, desc="positions", disable=None):
        loss = model.nll(window(held[g], start, length), blocked_causal)[0].numpy()
        rows.append([loss[a : min(b, length - 1)].mean() for a, b in BANDS.values()])
    table = np.array(rows)
    return {
        "window": length,
        "windows": len(picks),
        "loss": {name: mean_se(table[:, i]) for i, name in enumerate(BANDS)},
    }


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, help="folder of byte_lm.safetensors; default: the shipped one")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--windows", type=int, default=200, help="paired windows")
    p.add_argument("--targets", type=int, default=512, help="target bytes per paired window")
    p.add_argument("--position-windows", type=int, default=32)
    p.add_argument("--short", type=int, default=1024)
    p.add_argument("--long", type=int, default=8192)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--json", type=Path, help="write the result here")
    p.add_argument("--record", action="store_true", help="store the result in the model's own byte_lm.json")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model = ByteLM.load(args.model, getattr(torch, args.dtype))
    _, held, about = load_corpus()
    known = model.record.get("data", {}).get("held_out_bytes")
    if known is not None and known != about["held_out_bytes"]:
        print("note: this interpreter's library is not the one the model was trained beside; its text may differ,")
        print("      and files that moved between versions may not be held out")
    result = {
        "dtype": args.dtype,
        "paired": paired(model, held, args.short, args.long, args.targets, args.windows),
        "by_position": by_position(model, held, 16384, args.position_windows),
    }
    pair, pos = result["paired"], result["by_position"]
    print(f"\nheld-out bytes, nats per byte ({pair['windows']} paired windows x {args.targets} bytes)")
    for label, key in (
        (f"{args.short} bytes of context", "loss_short"),
        (f"{args.long} bytes of context", "loss_long"),
    ):
        print(f"  {label:28s} {pair[key]['mean']:.4f} +- {pair[key]['se']:.4f}")
    print(f"  {'gap':28s} {pair['gap']['mean']:.4f} +- {pair['gap']['se']:.4f}")
    for g, v in pair["gap_by_package"].items():
        print(f"    {g:26s} {v:.4f}")
    print(f"\nby position in 16K windows ({pos['windows']} windows)")
    for name, v in pos["loss"].items():
        print(f"  up to {name:22s} {v['mean']:.4f} +- {v['se']:.4f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.record:
        folder = args.model
        if folder is None:
            import hici_kernels.demo.lm as lm

            folder = Path(lm.__file__).parent / "data"
        path = folder / "byte_lm.json"
        body = json.loads(path.read_text(encoding="utf-8"))
        body["training"]["evaluation"] = result
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
