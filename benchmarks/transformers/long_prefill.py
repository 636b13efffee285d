"""Time and memory of a long prefill and a decode: one layer of Qwen3-8B, dense beside HGA with its history in a tier.

    python benchmarks/transformers/long_prefill.py [--length 65536] [--new 256] [--sides dense,host,disk]
                                                   [--path DIR] [--json result.json]

One layer with random weights (36 layers cost 36 times as much). Every side runs in a process of its own, so that its
peak resident memory is its own; a small text is checked first: with budgets that cover it, HGA must give the dense
model's logits, at once and in pieces through the tier that is measured. Prefill is fed in pieces of --piece tokens, as
one would feed it to bound memory. Products per second are those of the layer's weights and of dense causal attention;
HGA is credited with the weights alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tqdm import tqdm

from hici_kernels import HGAConfig
from hici_kernels.bench.machine import describe, spread
from hici_kernels.integrations import HGACache, apply_hga, restore

#: host memory of the tier disk, a quarter of the history of 64K tokens
HOST_BYTES = 64 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model(dtype: torch.dtype) -> Any:
    """One layer of Qwen3-8B; a small vocabulary, which is not what is measured."""
    config = hf.Qwen3Config(
        vocab_size=512, hidden_size=4096, intermediate_size=12288, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(before)


def check(changed: Any, dtype: torch.dtype, store: str, options: dict[str, Any]) -> float:
    """Largest difference of logits with budgets that cover 300 tokens; an error stops the run."""
    ids = torch.randint(512, (1, 300), generator=torch.Generator().manual_seed(1))
    expected = changed(ids).logits.float()
    apply_hga(changed, HGAConfig(topk_chunks=99, topk_groups=999), store=store, **options)
    error = float((changed(ids).logits.float() - expected).abs().max())
    with HGACache(changed) as cache:
        parts = [changed(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 130), (130, 299), (299, 300))]
    error = max(error, float((torch.cat(parts, 1).float() - expected).abs().max()))
    restore(changed)
    limit = 1e-4 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
    if error > limit:
        raise SystemExit(f"HGA with covering budgets differs from the dense model by {error}")
    return error


def side(name: str, length: int, new: int, piece: int, dtype: str, path: str | None) -> dict[str, Any]:
    """One side, measured in this process."""
    found = model(DTYPES[dtype])
    row: dict[str, Any] = {"side": name}
    with torch.no_grad():
        if name != "dense":
            options: dict[str, Any] = {"path": path} if name == "disk" and path else {}
            if name == "disk":
                options["host_bytes"] = HOST_BYTES
            row["error_with_covering_budgets"] = check(found, DTYPES[dtype], name, options)
            apply_hga(found, HGAConfig(), store=name, **options)
        cache: Any = hf.DynamicCache(config=found.config) if name == "dense" else HGACache(found)
        ids = torch.randint(512, (1, length), generator=torch.Generator().manual_seed(2))
        held = _resident()
        began = time.perf_counter()
        for at in tqdm(range(0, length, piece), desc=f"{name}: prefill", disable=None):
            out = found(ids[:, at : at + piece], past_key_values=cache, logits_to_keep=1)
        row["prefill_s"] = time.perf_counter() - began
        row["prefill_flops"] = flops(found, length, dense=name == "dense")
        row["prefill_flops_per_s"] = row["prefill_flops"] / row["prefill_s"]
        times = []
        token = out.logits[:, -1:].argmax(-1)
        for _ in tqdm(range(new), desc=f"{name}: decode", disable=None):
            began = time.perf_counter()
            token = found(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - began)
        row["decode"] = spread(times)
        row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
        if name == "dense":
            row["history_bytes"] = {"device": sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)}
        else:
            row["history_bytes"] = cache.stats()["resident_bytes"]
            cache.close()
    return row


def flops(found: Any, length: int, dense: bool) -> int:
    """Of the layer's projections for ``length`` tokens, and of causal attention where it is dense."""
    weights = sum(p.numel() for p in found.model.layers.parameters() if p.ndim == 2)
    about = found.config
    pairs = length * (length + 1) // 2 if dense else 0
    return 2 * weights * length + 4 * pairs * about.num_attention_heads * about.head_dim * about.num_hidden_layers


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--piece", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--sides", default="dense,host,disk")
    parser.add_argument("--path", help="folder for the disk tier")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        row = side(options.one, options.length, options.new, options.piece, options.dtype, options.path)
        options.json.write_text(json.dumps(row), encoding="utf-8")
        return
    rows, began = [], time.perf_counter()
    for name in options.sides.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "row.json"
            arguments = {"--length": options.length, "--new": options.new, "--piece": options.piece,
                         "--dtype": options.dtype, "--one": name, "--json": file,
                         "--path": options.path or scratch,
                         "--threads": torch.get_num_threads()}  # fmt: skip
            flat = [str(x) for pair in arguments.items() for x in pair]
            done = subprocess.run([sys.executable, __file__, *flat], stderr=subprocess.PIPE, text=True)
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1]
                rows.append({"side": name, "error": last})
            else:
                rows.append(json.loads(file.read_text(encoding="utf-8")))
        show(rows[-1])
    result = {"machine": describe() | {"transformers": hf.__version__}, "length": options.length, "new": options.new,
              "piece": options.piece, "dtype": options.dtype,
              "total_s": time.perf_counter() - began, "rows": rows}  # fmt: skip
    print(f"{result['total_s']:.0f} s in total, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if any("error" in row for row in rows):
        raise SystemExit(1)


def show(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['side']:8} {row['error']}")
        return
    held = ", ".join(f"{tier} {size / 2**20:.0f} MiB" for tier, size in row["history_bytes"].items() if size)
    decode, peak = row["decode"], row["peak_bytes"] / 2**20
    print(
        f"{row['side']:8} prefill {row['prefill_s']:.1f} s ({row['prefill_flops_per_s'] / 1e9:.0f} GFLOP/s), "
        f"decode {1e3 * decode['median_s']:.1f} ms a token "
        f"({1e3 * decode['fastest_s']:.1f} - {1e3 * decode['slowest_s']:.1f}), peak {peak:.0f} MiB, "
        f"history {held}"
    )


if __name__ == "__main__":
    main()
