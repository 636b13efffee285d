"""What the machine can do at most, measured in the run that is divided by it.

Native loops (csrc/cpu/ceilings.h) on every thread, for the path that serves the calls: multiply-adds of float32 on
operands in registers; products of bfloat16 (tile products on resident tiles where the path has AMX, else chains of
dpbf16 instructions); the kernels' own exp; one pass of reading. Beside them two PyTorch calls: a square matrix product
per dtype and a large copy.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import _native

MATMUL = 1024
STREAM_BYTES = 1 << 28
# A loop shorter than this is mostly the waking of its threads.
SHORTEST = 2e-2
RUNS = 5


def measure(dtypes: list[torch.dtype], stream_bytes: int = STREAM_BYTES, shortest: float = SHORTEST) -> dict[str, Any]:
    """Best of 5 of every ceiling; None for what this machine or path does not have.

    matmul_flops {dtype: FLOP/s}, copy_bytes_per_s (read + written), read_bytes_per_s, path, fma_flops, bfloat16_flops,
    bfloat16_products ("amx", "dpbf16" or None), exp_per_s.
    """
    found: dict[str, Any] = {"matmul_flops": {}, "matmul_size": MATMUL, "stream_bytes": stream_bytes}
    for dtype in dtypes:
        a, b = torch.randn(2, MATMUL, MATMUL).to(dtype)
        found["matmul_flops"][str(dtype)] = 2 * MATMUL**3 / best(functools.partial(torch.matmul, a, b))
    source = torch.ones(stream_bytes // 4)
    target = torch.empty_like(source)
    found["copy_bytes_per_s"] = 2 * source.nbytes / best(lambda: target.copy_(source))
    found |= {"path": None, "read_bytes_per_s": None, "fma_flops": None, "exp_per_s": None}
    found |= {"bfloat16_flops": None, "bfloat16_products": None}
    if _native.status() is None:
        where = _native.execution()
        library = _native.library()
        found["path"] = path_name()
        found["read_bytes_per_s"] = source.nbytes / best(lambda: library.ceiling_read(source, *where))
        found["fma_flops"] = _rate("fma", shortest)
        found["exp_per_s"] = _rate("exp", shortest)
        found["bfloat16_flops"] = _rate("bfloat16", shortest) or None
        found["bfloat16_products"] = str(library.ceiling_products(where[0])) or None
    return found


def path_name() -> str | None:
    """The instruction-set path that serves native calls now."""
    names = {number: name for name, number in _native.paths().items()}
    forced = _native.execution()[0]
    return names.get(forced, next(reversed(names.values()), None))


def product_rate(ceilings: dict[str, Any], dtype: torch.dtype) -> float:
    """FLOP/s that products of ``dtype`` can reach: the native loop, or the matrix product where there is none."""
    native = ceilings.get("bfloat16_flops") if dtype == torch.bfloat16 else None
    native = native or (ceilings.get("fma_flops") if dtype != torch.float64 else None)
    return float(native or ceilings["matmul_flops"][str(dtype)])


def product_loop(
    ceilings: dict[str, Any], dtype: torch.dtype, seconds: float
) -> tuple[Callable[[], float], float] | None:
    """The native loop behind :func:`product_rate` that takes about ``seconds``, and its FLOPs; None where none is."""
    work = "bfloat16" if dtype == torch.bfloat16 and ceilings.get("bfloat16_flops") else "fma"
    if dtype == torch.float64 or not ceilings.get("fma_flops"):
        return None
    where, loop, rounds = _native.execution(), _native.library().ceiling_loop, 1000
    each = loop(work, rounds, *where) / rounds
    rounds = max(1, round(seconds * product_rate(ceilings, dtype) / each))
    return functools.partial(loop, work, rounds, *where), each * rounds


def least_seconds(ceilings: dict[str, Any], dtype: torch.dtype, flops: float, exps: float, size: float) -> float:
    """The roofline: products and exponentials share the vector units, tiles work beside them; memory beside both."""
    products = flops / product_rate(ceilings, dtype)
    others = exps / ceilings["exp_per_s"] if exps and ceilings.get("exp_per_s") else 0.0
    tiles = dtype == torch.bfloat16 and ceilings.get("bfloat16_products") == "amx"
    compute = max(products, others) if tiles else products + others
    return max(compute, size / ceilings["copy_bytes_per_s"])


def best(call: Callable[[], object], runs: int = RUNS) -> float:
    """Fastest of ``runs`` calls after a first one, in seconds."""
    call()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _rate(work: str, shortest: float) -> float:
    """Work per second of a native loop, all threads together; 0 where the path has no such instruction."""
    where = _native.execution()
    loop = _native.library().ceiling_loop
    rounds, seconds = 1000, 0.0
    done = loop(work, rounds, *where)
    while done and seconds < shortest:
        rounds *= 4
        began = time.perf_counter()
        done = loop(work, rounds, *where)
        seconds = time.perf_counter() - began
    fastest = 0.0
    for _ in range(RUNS if done else 0):
        began = time.perf_counter()
        done = loop(work, rounds, *where)
        fastest = max(fastest, done / (time.perf_counter() - began))
    return fastest
