"""Context parallel HiCI: bytes on the wire beside ring attention's, after a check against one process.

    torchrun --nproc-per-node 2 benchmarks/distributed/context_parallel.py [--backend nccl] [--length N] [--json FILE]

Prints no traffic before outputs and gradients have been compared with one process at a small size. NCCL and GPUs take
the same code; times are medians of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hici_kernels import HiCIConfig, Rope
from hici_kernels.bench.machine import describe
from hici_kernels.distributed import (
    ContextParallel,
    apply_context_parallel,
    layer_traffic,
    remove_context_parallel,
    ring_traffic,
    traffic_table,
)
from hici_kernels.distributed.traffic import to_json
from hici_kernels.nn import HiCIAttention


def layer_of(config: HiCIConfig, hidden: int, heads: int, kv_heads: int, like: torch.Tensor) -> HiCIAttention:
    torch.manual_seed(0)
    dim = hidden // heads
    layer = HiCIAttention(hidden, heads, kv_heads, dim, config, rope=Rope.from_theta(1e6, dim))
    return layer.to(like.device, like.dtype)


def check(device: torch.device) -> float:
    """Largest relative difference between one process and the ranks, outputs and input gradients, float32."""
    config = HiCIConfig(segment_len=64, num_heads=4, bottleneck_dim=32, shared_compress_dim=16, recurrence_len=16)
    x = torch.randn(1, 500, 64, generator=torch.Generator().manual_seed(0)).to(device)
    layer = layer_of(config, 64, 4, 2, x)
    whole = x.clone().requires_grad_()
    out = layer(whole)
    out.square().sum().backward()
    exchange = ContextParallel(config)
    exchange.split(500)
    apply_context_parallel(layer, exchange)
    mine = exchange.shard(x).clone().requires_grad_()
    part = layer(mine)
    part.square().sum().backward()
    worst = 0.0
    for a, b in ((out.detach(), part.detach()), (whole.grad, mine.grad)):
        assert a is not None and b is not None
        if b.numel():
            worst = max(worst, float((exchange.shard(a) - b).abs().max() / a.abs().max()))
    remove_context_parallel(layer)
    found = torch.tensor(worst, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    p.add_argument("--length", type=int, default=8192, help="tokens of the whole sequence")
    p.add_argument("--segment-len", type=int, default=1024)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--mode", default="causal_shift")
    p.add_argument("--recurrence", type=int, default=0)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    dist.init_process_group(args.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if args.backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    try:
        worst = check(device)
        if worst > 1e-5:
            raise SystemExit(f"WRONG RESULT, no numbers: ranks differ from one process by {worst:.2e}")
        result = measure(args, device, ranks)
        result["check"] = worst
        if rank == 0:
            show(args, result)
    finally:
        dist.destroy_process_group()


def measure(args: argparse.Namespace, device: torch.device, ranks: int) -> dict[str, Any]:
    dtype = getattr(torch, args.dtype)
    config = HiCIConfig(segment_len=args.segment_len, context_mode=args.mode, recurrence_len=args.recurrence)
    exchange = ContextParallel(config)
    plan = exchange.split(args.length)
    mine = plan.columns(exchange.rank)
    x = torch.randn(1, mine.stop - mine.start, args.hidden, dtype=dtype, device=device, requires_grad=True)
    layer = layer_of(config, args.hidden, args.heads, args.kv_heads, x)
    apply_context_parallel(layer, exchange)
    times = []
    for _ in range(args.rounds + 1):
        dist.barrier()
        exchange.traffic.reset()
        start = time.perf_counter()
        layer(x).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        times.append(float(taken))
    head_dim = args.hidden // args.heads
    sizes = {"num_kv_heads": args.kv_heads, "head_dim": head_dim, "dtype": dtype}
    rows = {
        "HiCI, counted (rank 0)": dict(exchange.traffic.bytes),
        "HiCI, by formula": layer_traffic(plan, config, hidden_size=args.hidden, **sizes),
        "ring attention": ring_traffic(args.length, ranks, **sizes),
    }
    return {
        "traffic": to_json(rows),
        "ranks": ranks,
        "backend": args.backend,
        "step_s": {"median": statistics.median(times[1:]), "fastest": min(times[1:]), "slowest": max(times[1:])},
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "machine": describe(),
        "rows": rows,
    }


def show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    rows = result.pop("rows")
    step, where = result["step_s"], result["machine"]
    print(f"ranks equal one process: largest relative difference {result['check']:.1e}")
    print(f"{where['cpu']['model']}, torch {where['torch']}, {result['ranks']} ranks of {where['threads']} threads")
    print(f"{args.length} tokens, hidden {args.hidden}, {args.heads}/{args.kv_heads} heads, {args.mode}, {args.dtype}")
    print("bytes one rank receives in one layer, forward and backward:")
    print(traffic_table(rows))
    print(
        f"one layer, forward and backward: {1e3 * step['median']:.1f} ms "
        f"({1e3 * step['fastest']:.1f} to {1e3 * step['slowest']:.1f}, {args.rounds} rounds)"
    )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
