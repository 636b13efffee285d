"""One training step at 8K: HiCI beside dense attention and LongLoRA's shifted attention, seconds and memory.

    python benchmarks/quality/hici_step.py [--json FILE] [--context 8192] [--rounds 7] [--mode causal_shift]

The three models of benchmarks/quality/hici_extension.py, same weights, same LoRA, same bytes, in one process, taking
turns: forward, backward and AdamW on one row of float32. No seconds are printed before the loss and every gradient of
each method have been held against a float64 run of the same model with everything an eighth as long: in the usual of
nine draws they may err twice as much as the model does whose operations are plain PyTorch (gradients of slots are sums
that nearly cancel), or ALLOWED.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hici_extension import TINY, Sizes, build, nll, prepare, saved_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hici_kernels.bench.machine import describe, spread
from hici_kernels.bench.memory import kept_memory, peak_bytes
from hici_kernels.config import CONTEXT_MODES
from hici_kernels.testing.usual import assert_usually_within

ALLOWED = 1e-5  # of the largest gradient of a parameter: float32 through whole layers


def models(sizes: Sizes, mode: str) -> dict[str, nn.Module]:
    """The same weights under every method."""
    found = {}
    for name, training in (("dense", "lora"), ("shifted (S2)", "s2"), (f"HiCI {mode}", f"hici-{mode}")):
        found[name] = prepare(build(sizes, 0), sizes, training, 0)
        with torch.no_grad():  # LoRA starts at zero: half of its gradients would be
            for n, p in found[name].named_parameters():
                if "lora_B" in n:
                    p.normal_(0, 0.02)
    return found


def gradients(model: nn.Module, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = nll(model, ids).double().mean()
    loss.backward()
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """Every operation of this package by its reference."""
    with contextlib.ExitStack() as stack:
        for name in ("attention", "local_slots", "global_stats", "merge_attention"):
            module = importlib.import_module(f"hici_kernels.ops.{name}.op")
            chosen = module.select
            stack.enter_context(
                mock.patch.object(module, "select", lambda op, _, *rest, chosen=chosen: chosen(op, "reference", *rest))
            )
        yield


def check(model: nn.Module, length: int) -> tuple[float, bool]:
    """Largest difference of the loss and of any gradient from the float64 model, relative, on bytes of draw 0; whether
    the usual draw may differ so."""
    exact, errors = copy.deepcopy(model).double(), []

    def draw(i: int) -> dict[str, float]:
        ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(i))
        found, truth = (_numbers(*gradients(m, ids)) for m in (model, exact))
        with plain_pytorch():
            plain = _numbers(*gradients(model, ids))
        assert found.keys() == truth.keys() == plain.keys() and len(found) > 1
        ratios: dict[str, float] = {}
        worst = 0.0
        for name, x in truth.items():
            scale, ratios[name] = float(x.abs().max()), 0.0
            if scale > 1e-12:
                own, theirs = (float((y[name] - x).abs().max()) / scale for y in (found, plain))
                worst, ratios[name] = max(worst, own), own / max(2 * theirs, ALLOWED)
        errors.append(worst)
        return ratios

    try:
        assert_usually_within(draw, "a step")
    except AssertionError:
        return errors[0], False
    return errors[0], True


def _numbers(loss: float, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"": torch.tensor(loss, dtype=torch.float64), **grads}


def measure(sizes: Sizes, mode: str, rounds: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    steps = {}
    eighth = dataclasses.replace(sizes, context=sizes.context // 8, base_context=sizes.base_context // 8)
    small = models(eighth, mode)
    for name, model in models(sizes, mode).items():
        error, right = check(small[name], eighth.context)
        rows[name] = {"error": error, "correct": right}
        if not rows[name]["correct"]:
            continue
        trained = [p for p in model.parameters() if p.requires_grad]
        rows[name]["trained_parameters"] = sum(p.numel() for p in trained)
        steps[name] = (model, torch.optim.AdamW(trained, lr=1e-4))
    ids = torch.randint(0, 256, (1, sizes.context), generator=torch.Generator().manual_seed(0))

    def step(name: str) -> None:
        model, optimiser = steps[name]
        optimiser.zero_grad(set_to_none=True)
        nll(model, ids).mean().backward()
        optimiser.step()

    for name, (model, _) in steps.items():
        with saved_bytes(model) as kept:
            nll(model, ids)
        rows[name]["saved_bytes"] = sum(kept.values())
        step(name)
        rows[name]["peak_bytes"] = peak_bytes(lambda name=name: step(name))
    times: dict[str, list[float]] = {name: [] for name in steps}
    with kept_memory():
        for _ in range(rounds):
            for name in steps:
                began = time.perf_counter()
                step(name)
                times[name].append(time.perf_counter() - began)
    for name, found in times.items():
        rows[name] |= spread(found) | {"rounds": rounds}
    return {"machine": describe(), "sizes": dataclasses.asdict(sizes), "mode": mode, "rows": rows}


def show(result: dict[str, Any]) -> None:
    sizes, machine = result["sizes"], result["machine"]
    table = Table(
        "method", "step", "fastest-slowest", "times dense", "kept for backward", "peak", "error",
        title=f"One step, {sizes['context']} tokens, {sizes['layers']} layers of {sizes['hidden']}, float32",
        caption=f"{machine['cpu']['model']}; torch {machine['torch']}, {machine['threads']} threads",
    )  # fmt: skip
    dense = result["rows"].get("dense", {}).get("median_s")
    for name, row in result["rows"].items():
        if not row["correct"]:
            table.add_row(name, "wrong", *["-"] * 4, f"{row['error']:.1e}")
            continue
        peak = row["peak_bytes"]
        table.add_row(
            name,
            f"{row['median_s']:.2f} s",
            f"{row['fastest_s']:.2f}-{row['slowest_s']:.2f}",
            "-" if dense is None else f"{row['median_s'] / dense:.2f}",
            f"{row['saved_bytes'] / 2**20:.0f} MiB",
            "-" if peak is None else f"{peak / 2**20:.0f} MiB",
            f"{row['error']:.1e}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--context", type=int, default=Sizes.context)
    p.add_argument("--mode", choices=CONTEXT_MODES, default="causal_shift")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--tiny", action="store_true", help="proves the code, means nothing")
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    if a.context % 32 or a.rounds < 1:
        p.error("--context must be a multiple of 32 and --rounds at least 1")
    torch.set_num_threads(a.threads)
    result = measure(TINY if a.tiny else dataclasses.replace(Sizes(), context=a.context), a.mode, a.rounds)
    show(result)
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(row["correct"] for row in result["rows"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
