"""Run by test_aot.py in a process of its own, without the interpreter: a small kernel for every target, as JSON."""

import json

import torch
import triton
import triton.language as tl

from hici_kernels.aot import REQUIRED, run
from hici_kernels.aot.compile import compile_one, key_of
from hici_kernels.aot.record import recorded
from hici_kernels.aot.source import source_hash
from hici_kernels.tuning import AotSignature, Entry, architecture, configuration

SCALE = tl.constexpr(2.0)


@triton.jit
def scaled(x):
    return x * SCALE


@triton.jit
def product(a, b, out, n, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        left = tl.load(a + i[:, None] * n + j[None, :])
        right = tl.load(b + j[:, None] * SIZE + i[None, :])
        total += tl.dot(left, right)
    tl.store(out + i[:, None] * SIZE + i[None, :], scaled(total))


def record(arch, size, block, warps, stages, maxnreg=None):
    configuration = {"SIZE": size, "BLOCK": block, "num_warps": warps, "num_stages": stages}
    entry = Entry("probe", arch, size, 0, ("bfloat16",), configuration)
    signature = AotSignature(
        kernel=product,
        variant="probe",
        arguments={"a": "*bf16", "b": "*bf16", "out": "*fp32", "n": "i32"},
        constexprs=entry.constexprs,
        divisible=("a", "b", "out", "n"),
        options={"maxnreg": maxnreg} if maxnreg else None,
    )
    found = {"kernel": "product", "arch": arch, **compile_one(signature, entry)}
    exceptions = [{"where": {"kernel": "product", "arch": "sm_80"}, "spill_bytes": 1 << 20, "cost": "a test"}]
    return {
        **found,
        "key": key_of(signature, entry, triton.__version__),
        "verdict": run.verdict(found, []),
        "excused": run.verdict(found, exceptions),
    }


def launched():
    """What the recorder makes of a real launch, with an argument that is 1, one that is absent, and a view."""
    entry = Entry("probe", "sm_80", 64, 0, ("bfloat16",), {"SIZE": 64, "BLOCK": 32})
    seen = {}

    def call():
        seen["arch"] = architecture(torch.device("cpu"))
        found = configuration("probe", "sm_80", head_dim=1, segment_len=1, dtype="bfloat16")
        a, b = (torch.empty(64, 64, dtype=torch.bfloat16) for _ in "ab")
        product[(1,)](a, b.view(-1)[1:], torch.empty(64, 64), 24, **found, num_warps=8)
        product[(1,)](a, b, None, 1, **found)

    first, second = recorded(entry, "probe", call)
    return seen | {
        "first": [first.arguments, first.constexprs, first.divisible, first.options],
        "second": [second.arguments, second.constexprs, second.divisible, second.options],
    }


def missing(arch):
    """A signature that forgets a parameter."""
    entry = Entry("probe", arch, 64, 0, ("bfloat16",), {"SIZE": 64, "BLOCK": 32, "num_warps": 4, "num_stages": 2})
    return AotSignature(product, "probe", {"a": "*bf16", "b": "*bf16", "n": "i32"}, entry.constexprs)


if __name__ == "__main__":
    from hici_kernels.aot.compile import check

    try:
        check(missing("sm_80"))
        refused = ""
    except ValueError as error:
        refused = str(error)
    print(
        json.dumps(
            {
                "fits": {arch: record(arch, 64, 32, 4, 2) for arch in REQUIRED},
                "too large": record("sm_80", 256, 64, 8, 6),
                "spills": record("sm_80", 128, 32, 4, 2, maxnreg=64),
                "broken": record("sm_80", 48, 32, 4, 2),
                "again": record("sm_80", 64, 32, 4, 2)["key"],
                "other": record("sm_80", 64, 64, 4, 2)["key"],
                "sources": [source_hash(product), source_hash(scaled)],
                "refused": refused,
                "launched": launched(),
            }
        )
    )
