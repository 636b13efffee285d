"""Borrowed threads against own ones: `attention` alone, and right after a matrix product of torch.

    cmake -S . -B build/own -DHICI_OUTPUT=$PWD/build/own -DCMAKE_CXX_FLAGS=-DHICI_OWN_THREADS && cmake --build build/own
    python benchmarks/threads.py                              # threads of torch's OpenMP runtime
    python benchmarks/threads.py build/own/libhici_native.so  # threads of our own

bfloat16, 32/8 heads, D 128; microseconds a call, median of 15 [fastest, slowest].
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from hici_kernels import _native, attention

TOKENS = (64, 128, 256, 512, 1024)


def measure(s: int, product: bool) -> str:
    q, k, v = (torch.randn(1, s, heads, 128).bfloat16() for heads in (32, 8, 8))
    x, times = torch.randn(256, 256), []
    repeats = max(5, int(3e5 / (s * s / 2 + 500)))
    for i in range(16):  # the first round warms up
        spent = 0.0
        for _ in range(repeats):
            if product:
                x @ x
            began = time.perf_counter()
            attention(q, k, v, impl="cpu")
            spent += time.perf_counter() - began
        if i:
            times.append(spent / repeats * 1e6)
    return f"{statistics.median(times):.0f} [{min(times):.0f}, {max(times):.0f}]"


def main() -> None:
    if len(sys.argv) > 1:
        _native.PATH = Path(sys.argv[1]).resolve()
    borrowed = bool(_native.library().cpu_borrows_threads())
    print(f"{'borrowed' if borrowed else 'own'} threads, {torch.get_num_threads()} of them, torch {torch.__version__}")
    with torch.no_grad():
        for s in TOKENS:
            print(f"{s} tokens: alone {measure(s, False)}, after a torch product {measure(s, True)}", flush=True)


if __name__ == "__main__":
    main()
