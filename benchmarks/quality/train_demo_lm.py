"""Train the byte-level demo language model on the Python standard library of the running interpreter.

    nice -n 19 python benchmarks/quality/train_demo_lm.py --minutes 82 --export

The run is a time budget: learning rate and context length follow the fraction of ``--minutes`` used, so the same
command finishes in the same time on any machine and learns more on a faster one.  Progress is checkpointed every
few minutes; ``--resume`` continues from the last checkpoint.  Data order depends on ``--seed`` and the step alone.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import platform
import shlex
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hici_kernels.demo.lm import ByteLM, ByteLMConfig

HERE = Path(__file__).resolve().parent
#: Groups (package, plus its tests) that are never trained on.
HELD_OUT = ("asyncio", "concurrent", "http", "json", "logging")
# Tables and generated text teach a language model of this size nothing but digits.
_SKIP_DIRS = {"site-packages", "__pycache__", "encodings", "pydoc_data", "cjkencodings", "Icons"}
_SKIP_FILES = ("_sysconfigdata", "stringprep.py", "html/entities.py", "re/_casefix.py", "keyword.py", "token.py")
# Test modules whose name does not say which module they test.
_TEST_OF = {
    "httplib": "http", "http_cookies": "http", "http_cookiejar": "http", "httpservers": "http",
    "concurrent_futures": "concurrent", "xml_etree": "xml", "xml_etree_c": "xml", "xml_dom_minicompat": "xml",
    "sax": "xml", "minidom": "xml", "pulldom": "xml", "datetimetester": "datetime", "pickletester": "pickle",
    "xmlrpc_net": "xmlrpc", "urllib2": "urllib", "urllib2net": "urllib", "urllib2_localnet": "urllib",
    "urllibnet": "urllib", "urlparse": "urllib", "urllib_response": "urllib",
}  # fmt: skip


def group_of(path: str) -> str:
    """The package or module a library file belongs to; a test belongs to what it tests."""
    parts = path.split("/")
    if parts[0] == "test" and len(parts) > 1:
        name = parts[1].removesuffix(".py").lstrip("_")
        name = name.removeprefix("test_")
        return _TEST_OF.get(name, name)
    name = parts[0].removesuffix(".py")
    return name.lstrip("_") or name


def library_files(root: Path) -> list[tuple[str, Path]]:
    """All source files worth reading under ``root`` as ``(posix path, file)``, ordered so that groups are contiguous.

    Inside a group the library comes before its tests.
    """
    found = []
    for file in root.rglob("*.py"):
        rel = file.relative_to(root)
        name = rel.as_posix()
        if not _SKIP_DIRS.isdisjoint(rel.parts) or name.startswith(_SKIP_FILES) or name.endswith("_tables.py"):
            continue
        found.append((name, file))
    return sorted(found, key=lambda item: (group_of(item[0]), item[0].startswith("test/"), item[0]))


def read_stream(files: Iterable[tuple[str, Path]]) -> np.ndarray:
    """Files joined into one uint8 array, each under a header line that names it."""
    parts = []
    for name, file in files:
        body = file.read_bytes().replace(b"\r\n", b"\n")
        parts.append(b"# file: " + name.encode() + b"\n" + body.rstrip(b"\n") + b"\n\n")
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def load_corpus(root: Path | None = None) -> tuple[np.ndarray, dict[str, np.ndarray], dict]:
    """Training bytes, held-out bytes by group, and a description of both.

    Args:
        root: the standard library; ``None`` means that of the running interpreter.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = library_files(root)
    if not files:
        raise ValueError(f"root={str(root)!r} holds no Python files")
    train = [f for f in files if group_of(f[0]) not in HELD_OUT]
    held = {g: read_stream(f for f in files if group_of(f[0]) == g) for g in HELD_OUT}
    listing = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {name}\n" for name, file in train)
    stream = read_stream(train)
    about = {
        "source": f"Python {platform.python_version()} standard library, *.py without site-packages and data tables",
        "train_files": len(train),
        "train_bytes": len(stream),
        "train_files_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "held_out": list(HELD_OUT),
        "held_out_note": "each held-out package leaves the training set together with its tests",
        "held_out_bytes": {g: len(s) for g, s in held.items()},
    }
    return stream, held, about


def batch_at(stream: np.ndarray, length: int, count: int, first_window: int, seed: int) -> Tensor:
    """Windows ``first_window ...`` of the endless deterministic order: int64 ``[count, length]``.

    Starts follow a golden-ratio sequence, which covers the stream evenly at every scale without keeping state, so a
    resumed run needs only the window counter.
    """
    n = first_window + np.arange(count)
    u = (n * 0.6180339887498949 + seed * 0.7548776662466927) % 1.0
    starts = (u * (len(stream) - length)).astype(np.int64)
    return torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))


class BlockedCausal(torch.autograd.Function):
    """Dense causal attention by blocks of queries, keeping the probabilities for the backward pass.

    Some 1.5 times as fast as the fused CPU kernel here, whose backward pass recomputes the softmax, and the price
    (S * S / 2 probabilities per head) fits in memory at the contexts trained here.
    """

    BLOCK = 128

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, s, h, d = q.shape
        hk = k.shape[2]
        g, blk = h // hk, min(BlockedCausal.BLOCK, s)
        if s % blk:
            raise ValueError(f"sequence length must be a multiple of {blk}, got {s}")
        qf = (q * d**-0.5).view(b, s, hk, g, d).permute(0, 2, 1, 3, 4).reshape(b * hk, s * g, d)
        kf, vf = (x.permute(0, 2, 1, 3).reshape(b * hk, s, d) for x in (k, v))
        later = torch.ones(blk, blk, dtype=torch.bool).triu(1)[:, None, :]
        mask = torch.zeros(blk, 1, blk).masked_fill_(later, float("-inf")).to(q.dtype)
        out, probs = torch.empty_like(qf), []
        for lo in range(0, s, blk):
            hi = lo + blk
            p = torch.bmm(qf[:, lo * g : hi * g], kf[:, :hi].transpose(1, 2))
            p.view(b * hk, blk, g, hi)[..., lo:].add_(mask)
            torch.softmax(p, -1, out=p)
            out[:, lo * g : hi * g] = torch.bmm(p, vf[:, :hi])
            probs.append(p)
        ctx.save_for_backward(qf, kf, vf, *probs)
        ctx.shape = (b, s, h, hk, g, d, blk)
        return out.view(b, hk, s, g, d).permute(0, 2, 1, 3, 4).reshape(b, s, h, d)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qf, kf, vf, *probs = ctx.saved_tensors
        b, s, h, hk, g, d, blk = ctx.shape
        grad = grad.reshape(b, s, hk, g, d).permute(0, 2, 1, 3, 4).reshape(b * hk, s * g, d)
        dq, dk = torch.empty_like(qf), torch.zeros_like(kf, dtype=torch.float32)
        dv = torch.zeros_like(dk)
        for p, lo in zip(probs, range(0, s, blk), strict=True):
            hi = lo + blk
            rows = slice(lo * g, hi * g)
            dp = torch.bmm(grad[:, rows], vf[:, :hi].transpose(1, 2))
            dv[:, :hi] += torch.bmm(p.transpose(1, 2), grad[:, rows])
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, rows] = torch.bmm(ds, kf[:, :hi])
            dk[:, :hi] += torch.bmm(ds.transpose(1, 2), qf[:, rows])
        dq = (dq * d**-0.5).view(b, hk, s, g, d).permute(0, 2, 1, 3, 4).reshape(b, s, h, d)
        dk, dv = (x.view(b, hk, s, d).permute(0, 2, 1, 3).to(grad.dtype) for x in (dk, dv))
        return dq, dk, dv


def blocked_causal(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:class:`BlockedCausal` as an ``attend`` argument."""
    return BlockedCausal.apply(q, k, v)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by its nearest semi-orthogonal matrix (quintic Newton-Schulz).

    Equal-shaped matrices are stacked, because one batched product of ten 256 x 256 matrices costs little more than
    one of them.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "decay": decay})

    @staticmethod
    def orthogonalise(m: Tensor, rounds: int = 5) -> Tensor:
        x = m / (m.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        tall = x.shape[-2] > x.shape[-1]
        x = (x.mT if tall else x).bfloat16()
        for _ in range(rounds):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return (x.mT if tall else x).float()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(p.shape), []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buf.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(torch.lerp(p.grad, buf, group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, u in zip(params, self.orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(u, alpha=-group["lr"] * scale)


def plan(progress: float, step: int, tokens: int) -> tuple[int, int]:
    """Context length and windows of one step, given the fraction of the budget used.

    Short windows first (attention is the cost), some long ones from early on so that the rotary frequencies of long
    distances are never untrained, long ones alone in the last part.
    """
    if progress < 0.12:
        length = 1024
    elif progress < 0.52:
        length = 8192 if step % 8 == 0 else 2048
    else:
        length, tokens = 16384 if step % 5 == 0 else 8192, 2 * tokens
    return length, max(1, tokens // length)


def learning_rate(progress: float, step: int, warmup: int, floor: float = 0.02) -> float:
    """Multiplier of the peak rate: linear warm-up in steps, cosine in the fraction of the budget used."""
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return cosine * min(1.0, (step + 1) / warmup)


def make_optimisers(model: ByteLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    adam = torch.optim.AdamW(others, lr=args.lr_adam, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=args.lr_muon, decay=args.decay), adam]


@torch.no_grad()
def quick_eval(model: ByteLM, held: dict[str, np.ndarray], length: int, windows: int) -> float:
    """Mean held-out loss (nats per byte) of ``windows`` evenly spread windows of ``length`` bytes."""
    sizes = {g: len(s) for g, s in held.items()}
    losses = []
    for g, s in held.items():
        count = max(1, round(windows * sizes[g] / sum(sizes.values())))
        for start in np.linspace(0, len(s) - length, count).astype(int):
            ids = torch.from_numpy(s[start : start + length].astype(np.int64))[None]
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(model.nll(ids).mean().item())
    return float(np.mean(losses))


def save_checkpoint(path: Path, model: ByteLM, optimisers: list, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optim": [o.state_dict() for o in optimisers], "state": state}, part)
    # A kill while writing must not cost the previous checkpoint.
    part.replace(path)


def curve(log: Path) -> dict[str, list[float]]:
    """Training loss in nats per byte over tokens read, from the log of a run."""
    with log.open() as f:
        rows = list(csv.DictReader(f))
    return {key: [float(r[key]) for r in rows if r["train_loss"]] for key in ("tokens", "train_loss")}


def export(model: ByteLM, args: argparse.Namespace, state: dict, about: dict, held: dict[str, np.ndarray]) -> None:
    """Write the shipped files; figures that only the evaluation script can give are filled in by that script."""
    record = {
        "command": state["command"],
        "seed": args.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": args.threads,
        "optimiser": f"Muon (matrices, peak {args.lr_muon}) and AdamW (rest, peak {args.lr_adam}), bf16 autocast",
        "data": about,
        "steps": state["step"],
        "tokens": state["tokens"],
        "tokens_by_context": state["by_length"],
        "minutes": round(state["elapsed"] / 60, 1),
        "finished": state["elapsed"] >= args.minutes * 60,
        "held_out_loss_2k": round(quick_eval(model, held, 2048, 48), 4),
        "loss_curve": curve(args.out / "loss.csv"),
    }
    model.save(args.data_dir, record)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stream, held, about = load_corpus()
    print(json.dumps(about, indent=1), flush=True)
    config = ByteLMConfig(num_hidden_layers=args.layers, intermediate_size=args.intermediate)
    model = ByteLM(config)
    for name, p in model.named_parameters():
        # Residual branches start silent, so that depth costs nothing in the first steps.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(p)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimisers = make_optimisers(model, args)
    peaks = [o.param_groups[0]["lr"] for o in optimisers]
    command = f"python benchmarks/quality/{Path(__file__).name} {shlex.join(sys.argv[1:])}"
    state = {"step": 0, "tokens": 0, "windows": 0, "elapsed": 0.0, "by_length": {}, "command": command}
    ckpt, log = args.out / "checkpoint.pt", args.out / "loss.csv"
    if args.resume and ckpt.exists():
        saved = torch.load(ckpt, weights_only=True)
        model.load_state_dict(saved["model"])
        for o, s in zip(optimisers, saved["optim"], strict=True):
            o.load_state_dict(s)
        state = saved["state"]
        with log.open() as f:
            rows = [r for r in csv.reader(f) if r[0] == "step" or int(r[0]) <= state["step"]]
    else:
        rows = [["step", "minutes", "tokens", "context", "lr", "train_loss", "held_out_loss"]]
    args.out.mkdir(parents=True, exist_ok=True)
    with log.open("w", newline="") as f:
        csv.writer(f).writerows(rows)

    embed, budget = model.model.embed_tokens, args.minutes * 60
    last_save = last_export = state["elapsed"]
    pending: list[float] = []
    clock = time.perf_counter() - state["elapsed"]
    bar = tqdm(total=round(args.minutes, 1), unit="min", disable=None, mininterval=10)
    while state["elapsed"] < budget and (args.steps is None or state["step"] < args.steps):
        progress = state["elapsed"] / budget
        if args.steps is not None:
            progress = max(progress, state["step"] / args.steps)
        length, count = plan(progress, state["step"], args.batch_tokens)
        ids = batch_at(stream, length + 1, count, state["windows"], args.seed)
        factor = learning_rate(progress, state["step"], args.warmup)
        for o, peak in zip(optimisers, peaks, strict=True):
            o.param_groups[0]["lr"] = peak * factor
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(model.features(ids[:, :-1], blocked_causal), embed.weight)
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimisers:
            o.step()
            o.zero_grad(set_to_none=True)
        pending.append(loss.item())
        state["step"] += 1
        state["windows"] += count
        state["tokens"] += count * length
        state["by_length"][str(length)] = state["by_length"].get(str(length), 0) + count * length
        state["elapsed"] = time.perf_counter() - clock
        last = state["elapsed"] >= budget or state["step"] == args.steps
        if last or state["step"] % args.log_every == 0:
            due = last or state["step"] % args.eval_every == 0
            held_loss = f"{quick_eval(model, held, 2048, 24):.4f}" if due else ""
            minutes = state["elapsed"] / 60
            mean = sum(pending) / len(pending)
            pending.clear()
            row = [state["step"], f"{minutes:.2f}", state["tokens"], length, f"{factor:.4f}", f"{mean:.4f}", held_loss]
            with log.open("a", newline="") as f:
                csv.writer(f).writerow(row)
            print("step {} min {} tokens {} ctx {} lr {} loss {} held {}".format(*row), flush=True)
            bar.n = round(minutes, 1)
            bar.refresh()
        if state["elapsed"] - last_save > args.save_minutes * 60:
            save_checkpoint(ckpt, model, optimisers, state)
            last_save = state["elapsed"]
            if args.export and state["elapsed"] - last_export > args.export_minutes * 60:
                export(model, args, state, about, held)
                last_export = state["elapsed"]
    save_checkpoint(ckpt, model, optimisers, state)
    bar.close()
    if args.export:
        export(model, args, state, about, held)
        plot(log, args.results_dir)


def plot(log: Path, folder: Path) -> None:
    """Copy the loss log to ``folder`` and draw it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo_lm_loss.csv").write_text(log.read_text())
    with log.open() as f:
        rows = list(csv.DictReader(f))
    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    million = [int(r["tokens"]) / 1e6 for r in rows]
    ax.plot(million, [float(r["train_loss"]) for r in rows], lw=0.8, color="tab:blue", label="training batches")
    seen = [(m, float(r["held_out_loss"])) for m, r in zip(million, rows, strict=True) if r["held_out_loss"]]
    if seen:
        ax.plot(*zip(*seen, strict=True), "o-", ms=3, color="tab:orange", label="held-out packages, 2K windows")
    # Everything after the last short window belongs to the long-context part.
    short = [m for m, r in zip(million, rows, strict=True) if int(r["context"]) < 8192]
    if short and short[-1] < million[-1]:
        ax.axvline(short[-1], color="gray", ls="--", lw=0.8)
        place = {"transform": ax.get_xaxis_transform(), "fontsize": 8, "color": "gray"}
        ax.text(short[-1], 0.7, " 8K and 16K\n windows only", **place)
    ax.set(xlabel="million bytes trained on", ylabel="nats per byte", title="Byte-level demo model: training loss")
    ax.set_ylim(0.4, 2.5)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(folder / "demo_lm_loss.png", dpi=120)
    plt.close(fig)


def main() -> None:
    root = HERE.parent.parent
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=82.0, help="training time budget")
    p.add_argument("--steps", type=int, help="stop after this many steps (and follow them in the schedule)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--layers", type=int, default=5)
    p.add_argument("--intermediate", type=int, default=480)
    p.add_argument("--batch-tokens", type=int, default=8192, help="per step; doubled in the last part")
    p.add_argument("--lr-muon", type=float, default=0.02)
    p.add_argument("--lr-adam", type=float, default=3e-3)
    p.add_argument("--decay", type=float, default=0.02)
    p.add_argument("--warmup", type=int, default=60, help="steps")
    p.add_argument("--log-every", type=int, default=20, help="steps")
    p.add_argument("--eval-every", type=int, default=300, help="steps; a multiple of --log-every")
    p.add_argument("--save-minutes", type=float, default=3.0)
    p.add_argument("--export-minutes", type=float, default=12.0)
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    p.add_argument("--export", action="store_true", help="write the shipped files while training and at the end")
    p.add_argument("--out", type=Path, default=root / "build" / "demo_lm", help="checkpoint and log folder")
    p.add_argument("--data-dir", type=Path, default=root / "src" / "hici_kernels" / "demo" / "data")
    p.add_argument("--results-dir", type=Path, default=HERE / "results")
    p.add_argument("--plot-only", action="store_true", help="redraw the loss curve of the run in --out")
    args = p.parse_args()
    if args.plot_only:
        plot(args.out / "loss.csv", args.results_dir)
    else:
        train(args)


if __name__ == "__main__":
    main()
