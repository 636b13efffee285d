"""What strict routing costs or gains: every kind of routing on the shipped model, at equal density.

    python benchmarks/quality/hga_routing.py [--contexts 2048 ...] [--windows N] [--json FILE] [--chart FILE]

Texts are packages the model never saw; windows are chosen by a fixed rule (hici_kernels.demo.text.windows). Every
window is read with dense attention and with every kind of routing in all layers; the gap is nats per byte over the
second half of the window, routed minus dense, byte by byte on the same text. Printed are its mean over windows, the
standard error of that mean, and the lowest and highest window.

Kinds: "strict" (every query its own choice), "prefix" (running maximum over its chunk), "block" (the published
semantics: 16 queries choose together, later ones for earlier ones too), strict with one choice for the heads of a kv
head, strict with super-chunks, and none ("window": the opened tokens spent on a longer window instead). Density is the
share of causal pairs that were attended, counted from the routes. A "block" query opens fewer groups than its budget,
so "block, equal density" gets the budget at which it attends what "strict" attends; "block" is the same number as it
stands.

Every reading is kept in FILE.part as soon as it is made: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from hici_kernels import HGAConfig
from hici_kernels.demo.counting import PairCount, count_pairs
from hici_kernels.demo.hga_part import rope_of
from hici_kernels.demo.lm import ByteLM
from hici_kernels.demo.text import Window, held_out_streams, windows
from hici_kernels.ops.hga_attention import HGAResult, hga_attention

RESULTS = Path(__file__).resolve().parent.parent / "results"
#: Windows by context: fewer where a pass takes long.
WINDOWS = {2048: 16, 4096: 12, 8192: 8, 16384: 4, 32768: 3}
BUDGETS = {
    "default": HGAConfig(route_block=16),
    "quarter": HGAConfig(keep_first=1, keep_last=2, topk_chunks=4, topk_groups=8, route_block=16),
}
#: The default budget covers most of a shorter text.
SHORTEST = {"default": 32768, "quarter": 2048}
#: Chunks of a super-chunk; half of them survive.
SUPER = 4
EQUAL = "block, equal density"
KINDS = ("strict", "prefix", "block", EQUAL, "strict, shared by kv head", "strict, super-chunks", "window")


def config_of(kind: str, budget: HGAConfig, context: int) -> HGAConfig:
    """The configuration of one kind of routing; EQUAL is calibrated by the caller."""
    if kind == "window":
        extra = budget.topk_groups * budget.group_size // budget.chunk_size
        return dataclasses.replace(budget, keep_last=budget.keep_last + extra, topk_chunks=0, topk_groups=0)
    if kind == "strict, shared by kv head":
        return dataclasses.replace(budget, share="kv")
    if kind == "strict, super-chunks":
        kept = max(1, context // budget.chunk_size // SUPER // 2)
        return dataclasses.replace(budget, super_chunk=SUPER, topk_supers=kept)
    return dataclasses.replace(budget, routing=kind.split(",")[0])  # type: ignore[arg-type]


def read(model: ByteLM, window: Window, config: HGAConfig | None) -> dict[str, float]:
    """Loss over the second half of one window, pairs and seconds; ``config`` None = dense."""
    rope, pairs = rope_of(model), PairCount(0, 0, 0)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        nonlocal pairs
        assert config is not None
        result = hga_attention(q, k, v, config, rope=rope, return_routes=True)
        assert isinstance(result, HGAResult) and result.routes is not None
        pairs += count_pairs(result.routes, config)
        return result.out

    began = time.perf_counter()
    with torch.no_grad():
        nll = model.nll(window.ids, None if config is None else attend)[0]
    half = window.ids.shape[1] // 2
    found = {"loss": float(nll[-half:].double().mean()), "seconds": time.perf_counter() - began}
    return found if config is None else found | {"seen": pairs.seen, "causal": pairs.causal}


class Readings:
    """Readings made so far, one JSON line each; another model, text or program begins a new file."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.known: dict[str, dict[str, float]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # empty, or being written when the run was stopped
                    continue
                if entry["key"] == key:
                    self.known[entry["what"]] = entry["found"]

    def once(self, model: ByteLM, window: Window, config: HGAConfig | None) -> dict[str, float]:
        what = f"{window.source} {window.start} {window.ids.shape[1]} {config}"
        if what not in self.known:
            self.known[what] = read(model, window, config)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # the break comes first: what stands before may be half a line
                file.write("\n" + json.dumps({"key": self.key, "what": what, "found": self.known[what]}))
        return self.known[what]


def measure(model: ByteLM, contexts: list[int], most: int | None, readings: Readings) -> list[dict]:
    streams = held_out_streams(model.record["data"]["held_out"])
    plan = [(s, b, k) for s in contexts for b in BUDGETS if s >= SHORTEST[b] for k in KINDS]
    rows = []
    for context, name, kind in tqdm(plan, desc="readings"):
        texts = windows(streams, context, min(WINDOWS[context], most or WINDOWS[context]))
        budget, config = BUDGETS[name], config_of(kind, BUDGETS[name], context)
        if kind == EQUAL:
            # from the first window: how many groups a query opens of those it may
            closed = dataclasses.replace(budget, topk_chunks=0, topk_groups=0)
            kinds = (closed, config_of("strict", budget, context), config_of("block", budget, context))
            none, strict, block = (readings.once(model, texts[0], x)["seen"] for x in kinds)
            ratio = (strict - none) / max(1, block - none)
            config = dataclasses.replace(config, topk_groups=max(2, round(budget.topk_groups * ratio)))
        dense = [readings.once(model, t, None) for t in texts]
        found = [readings.once(model, t, config) for t in texts]
        gaps = [x["loss"] - y["loss"] for x, y in zip(found, dense, strict=True)]
        rows.append(
            {
                "context": context,
                "budget": name,
                "kind": kind,
                "config": dataclasses.asdict(config),
                "windows": len(texts),
                "density": sum(x["seen"] for x in found) / sum(x["causal"] for x in found),
                "dense_loss": statistics.mean(x["loss"] for x in dense),
                "gap": statistics.mean(gaps),
                "gap_error": statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None,
                "gap_lowest": min(gaps),
                "gap_highest": max(gaps),
                "gaps": gaps,
            }
        )
    return rows


def against_strict(rows: list[dict]) -> list[dict]:
    """What each kind costs beyond strict routing, window by window."""
    found = []
    for row in rows:
        strict = next(
            x for x in rows if (x["context"], x["budget"], x["kind"]) == (row["context"], row["budget"], "strict")
        )
        more = [a - b for a, b in zip(row["gaps"], strict["gaps"], strict=True)]
        error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else None
        found.append(row | {"over_strict": statistics.mean(more), "over_strict_error": error})
    return found


def show(rows: list[dict]) -> None:
    print(f"{'context':>8} {'budget':8} {'kind':26} {'density':>8} {'gap to dense, nats/byte':>36} {'over strict':>20}")
    for r in rows:
        error = "" if r["gap_error"] is None else f" +- {r['gap_error']:.4f}"
        more = "" if r["over_strict_error"] is None else f" +- {r['over_strict_error']:.4f}"
        spread = f"[{r['gap_lowest']:+.4f}, {r['gap_highest']:+.4f}]"
        print(
            f"{r['context']:>8} {r['budget']:8} {r['kind']:26} {100 * r['density']:7.1f}% "
            f"{r['gap']:+.4f}{error} {spread:>20} {r['over_strict']:+10.4f}{more}"
        )


def draw(rows: list[dict], trained: int, path: Path) -> None:
    """Gap over context, one panel a budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = [b for b in BUDGETS if any(r["budget"] == b for r in rows)]
    figure, panels = pyplot.subplots(1, len(budgets), figsize=(6 * len(budgets), 4.5), squeeze=False, sharey=False)
    for panel, budget in zip(panels[0], budgets, strict=True):
        for i, kind in enumerate(KINDS):
            own = [r for r in rows if r["budget"] == budget and r["kind"] == kind]
            x = [r["context"] * (1 + 0.012 * (i - 3)) for r in own]
            errors = [r["gap_error"] or 0.0 for r in own]
            panel.errorbar(x, [r["gap"] for r in own], yerr=errors, marker="o", ms=4, lw=1.2, capsize=2, label=kind)
        panel.axhline(0, color="black", lw=0.8)
        panel.axvline(trained, color="grey", ls=":", lw=1)
        panel.text(trained, panel.get_ylim()[1], " trained length", va="top", fontsize=7, color="grey")
        panel.set_xscale("log", base=2)
        panel.set_xlabel("context, bytes")
        panel.set_ylabel("nats per byte above dense")
        panel.set_title(f"{budget} budget")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(WINDOWS), choices=list(WINDOWS))
    parser.add_argument("--windows", type=int, help="windows a context at most; default: as many as the table needs")
    parser.add_argument("--json", type=Path, default=RESULTS / "hga-routing-quality.json")
    parser.add_argument("--chart", type=Path, default=RESULTS / "hga-routing-quality.png")
    given = parser.parse_args()
    if given.windows is not None and given.windows < 1:
        parser.error(f"--windows must be at least 1, got {given.windows}")
    model = ByteLM.load()
    trained = max(map(int, model.record["tokens_by_context"]))
    key = hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    part = given.json.with_suffix(given.json.suffix + ".part")
    rows = against_strict(measure(model, sorted(given.contexts), given.windows, Readings(part, key)))
    show(rows)
    print(
        f"The model was trained on texts of up to {trained:,} bytes; dense attention itself is out of its depth beyond."
    )
    record = {"trained_length": trained, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draw(rows, trained, given.chart)
    part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
