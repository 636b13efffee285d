"""What an implementation launches, found out by calling it on CPU tensors with the launch taken out.

Nobody writes the types of a kernel's arguments down a second time: the implementation prepares its launch as always,
for the entry's configuration and architecture, and what it hands to Triton is taken down and specialised as Triton
does it: None and the integer 1 are constants, pointers and integers that are multiples of 16 are marked so. Results
hold whatever memory held; nobody reads them.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import tuning
from ..tuning import AotSignature, Entry
from ..tuning.chips import pretend
from ..tuning.given import backward_arguments
from ..tuning.lookup import trial

POINTERS = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


def recorded(entry: Entry, variant: str, call: Callable[[], object]) -> list[AotSignature]:
    """One signature per launch of ``call``, in order, for the entry's architecture and configuration."""
    found: list[AotSignature] = []

    def take(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(signature(kernel, variant, args, kwargs))

    with _launches(take), pretend(entry.arch), trial(entry.op, entry.configuration):
        call()
    return found


@contextlib.contextmanager
def _launches(take: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Every ``kernel[grid](...)`` of this process goes to ``take`` instead of a device."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        take(kernel, args, kwargs)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = launch


def signature(kernel: Any, variant: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AotSignature:
    """The launch ``kernel[grid](*args, **kwargs)`` as types and constants."""
    names = list(kernel.arg_names)
    options = {k: v for k, v in kwargs.items() if k not in names}
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    arguments: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible: list[str] = []
    for p in kernel.params:
        value = given.get(p.name, p.default)
        specialise = not p.do_not_specialize
        if p.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
            constexprs[p.name] = value
            continue
        arguments[p.name] = p.annotation_type or type_of(value)
        aligned = value.data_ptr() if isinstance(value, Tensor) else value if type(value) is int else 1
        if specialise and not p.do_not_specialize_on_alignment and aligned % 16 == 0:
            divisible.append(p.name)
    return AotSignature(kernel, variant, arguments, constexprs, tuple(divisible), options)


def type_of(value: Any) -> str:
    """Triton's type of a launch argument."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if type(value).__name__ == "TensorDescriptor":
        return f"tensordesc<{POINTERS[value.base.dtype].removeprefix('*')}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise ValueError(f"a kernel argument of type {type(value).__name__} has no Triton type known here")


def launches(op: str, entry: Entry) -> list[AotSignature]:
    """Everything the Triton implementation of ``op`` launches for an entry of one of its tables, once each."""
    module = importlib.import_module(f"hici_kernels.ops.{op}.triton")
    found: list[AotSignature] = []
    for variant, arguments in PROBLEMS[op](entry):
        if "_backward" not in entry.op:
            found += recorded(entry, variant, lambda a=arguments: module.forward(*a))  # type: ignore[misc]
            continue
        outs: list[Any] = []
        recorded(entry, variant, lambda a=arguments, o=outs: o.append(module.forward(*a)))  # type: ignore[misc]
        given = (outs[0],) if isinstance(outs[0], Tensor) else tuple(outs[0])
        everything = backward_arguments(op, given, arguments, torch.empty_like)
        found += recorded(entry, variant, lambda a=everything: module.backward(*a))  # type: ignore[misc]
    return found


Problems = Iterator[tuple[str, tuple[Any, ...]]]


def _thorough(entry: Entry) -> bool:
    """Whether an entry is compiled in the rarer variants too: one dtype and one width stand for all."""
    return entry.dtype == "bfloat16" and (entry.op.startswith("attention") or entry.head_dim in (4096, 128))


def _attention(entry: Entry) -> Problems:
    dtype, d = getattr(torch, entry.dtype), entry.head_dim
    b, hq, hkv, slots, m = 2, 8, 2, 4, 8
    length = max(entry.segment_len, 64)
    s, n = 2 * length, 2

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def tokens(b: int) -> tuple[Tensor, ...]:
        return empty(b, s, hq, d), empty(b, s, hkv, d), empty(b, s, hkv, d)

    def prefix(b: int, n: int) -> tuple[Tensor, ...]:
        return (*(empty(b, slots, hkv, d) for _ in "kv"), *(empty(b, n, m, hkv, d) for _ in "kv"))

    none: tuple[None, ...] = (None,) * 4
    masks = (torch.ones(b, n, dtype=torch.bool), torch.ones(b, s, dtype=torch.bool))
    yield "causal, slots", (*tokens(b), length, 0, *prefix(b, n), None, None, None, True, d**-0.5)
    if _thorough(entry):
        yield "all", (*tokens(b), length, 16, *prefix(b, n), *masks, None, True, d**-0.5)
        yield "full, no slots", (*tokens(b), length, 0, *none, None, None, None, False, d**-0.5)
        cu = torch.tensor([0, length, s], dtype=torch.int32)
        yield "packed", (*tokens(1), length, 0, *prefix(1, n), None, None, cu, True, d**-0.5)
        q, k, v = tokens(b)
        if entry.configuration.get("TMA"):
            # batch rows that are no whole number of token rows apart are no matrix: no descriptors
            row = s * hkv * d
            k, v = (empty(b, row + 16)[:, :row].unflatten(1, (s, hkv, d)) for _ in "kv")
            q = empty(b, s * hq * d + 16)[:, : s * hq * d].unflatten(1, (s, hq, d))
            yield "causal, slots, no descriptors", (q, k, v, length, 0, *prefix(b, n), None, None, None, True, d**-0.5)
        if entry.op == "attention":
            yield "one query", (q[:, -1:], k, v, 0, 0, *none, None, None, None, True, d**-0.5)


# Tensors without memory: what is computed around the launches costs nothing.
NOWHERE = "meta"


def _local_slots(entry: Entry) -> Problems:
    dtype, h = getattr(torch, entry.dtype), entry.head_dim
    b, e, n = 2, 512, 2
    length = max(entry.segment_len, 64)
    s = n * length

    def parameters(m: int, e: int) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device=NOWHERE) for shape in ((m, e), (e, h), (e, h)))

    hidden, mask = torch.empty(b, s, h, dtype=dtype, device=NOWHERE), torch.ones(b, s, dtype=torch.bool, device=NOWHERE)
    yield "8 heads, 8 slots", (hidden, *parameters(8, e), 8, length, n, None, None, "zero")
    # more rows than one block of them holds; keys and values computed first
    yield "32 heads, 8 slots", (hidden, *parameters(8, h), 32, length, n, None, None, "zero")
    yield "8 heads, 128 slots", (hidden, *parameters(128, e), 8, length, n, None, None, "zero")
    if _thorough(entry):
        cu = torch.tensor([0, length, s], dtype=torch.int32, device=NOWHERE)
        yield "mask", (hidden, *parameters(8, e), 8, length, n, mask, None, "uniform")
        yield "packed", (hidden[:1], *parameters(8, e), 8, length, n, None, cu, "zero")
        yield "128 slots, packed, mask", (hidden[:1], *parameters(128, e), 8, length, n, mask[:1], cu, "uniform")


def _global_stats(entry: Entry) -> Problems:
    dtype, h = getattr(torch, entry.dtype), entry.head_dim
    m = 8
    # few segments, then so many that they are cut into splits and pieces
    for b, n, size in ((2, max(entry.segment_len, 2), ""), (1, 512, "many segments, ")):
        local, valid = (
            torch.empty(b, n, m, h, dtype=dtype, device=NOWHERE),
            torch.ones(b, n, dtype=torch.bool, device=NOWHERE),
        )
        cu = torch.tensor([0, 1, n], dtype=torch.int32, device=NOWHERE)
        for causal in (False, True):
            kind = f"{size}{'causal' if causal else 'shared'}"
            yield kind, (local, causal, None, None)
            yield f"{kind}, valid", (local, causal, valid, None)
            yield f"{kind}, packed", (local[:1], causal, None, cu)


def _hga_summaries(entry: Entry) -> Problems:
    dtype, d = getattr(torch, entry.dtype), entry.head_dim
    k = torch.empty(2, 256, 8, d, dtype=dtype, device=NOWHERE)
    at = torch.empty(2, 256, dtype=torch.int64, device=NOWHERE)
    for half, what in ((d // 2, ""), (d // 4, ", half of the dims turn")):
        inv_freq = torch.empty(half, device=NOWHERE)
        yield f"consecutive{what}", (k, inv_freq, None, 64, 16)
        yield f"positions{what}", (k, inv_freq, at, 64, 16)


# of 64 chunks of history and more: chunk_size, keep_first, keep_last, topk_chunks, topk_groups
DEFAULT_BUDGETS = (64, 2, 8, 16, 32)
NO_WINDOW = (64, 2, 0, 16, 32)


def _hga_route(entry: Entry) -> Problems:
    from ..ops.hga_route.triton import serves_block

    dtype, d = getattr(torch, entry.dtype), entry.head_dim

    def call(
        t: int,
        n: int,
        budgets: tuple[int, ...],
        *rule: Any,
        positions: bool = False,
        heads: tuple[int, int] = (32, 8),
        d: int = d,
    ) -> tuple[Any, ...]:
        q = torch.empty(2, t, heads[0], d, dtype=dtype, device=NOWHERE)
        tables = (torch.empty(2, n, *x, heads[1], d, dtype=dtype, device=NOWHERE) for x in ((), (4,)))
        at = torch.empty(2, t, dtype=torch.int64, device=NOWHERE) if positions else None
        return (q, *tables, at, 0, *budgets, *rule, 0, 0, None)

    yield "strict, prefill", call(4096, 64, DEFAULT_BUDGETS, "strict", 64, "query")
    yield "strict, decode", call(1, 4096, DEFAULT_BUDGETS, "strict", 64, "query")
    if _thorough(entry):
        yield "strict, kv, decode", call(1, 4096, NO_WINDOW, "strict", 64, "kv", positions=True)
        yield "prefix", call(256, 64, DEFAULT_BUDGETS, "prefix", 64, "query")
        if serves_block(entry.arch):
            yield "block, kv, positions, no window", call(256, 64, NO_WINDOW, "block", 64, "kv", positions=True)
    if entry.dtype == "float32":
        # the most that tiles ask of shared memory and registers
        yield (
            "strict, 64 heads on one, head_dim 256",
            call(4096, 64, DEFAULT_BUDGETS, "strict", 64, "query", heads=(64, 1), d=256),
        )
        yield "prefix, head_dim 256", call(256, 64, DEFAULT_BUDGETS, "prefix", 64, "query", d=256)


def _hga_attention(entry: Entry) -> Problems:
    dtype, d = getattr(torch, entry.dtype), entry.head_dim

    def call(t: int, s: int, hkv: int, given: bool, scale: float) -> tuple[Any, ...]:
        q = torch.empty(2, t, 32, d, dtype=dtype, device=NOWHERE)
        k, v = (torch.empty(2, s, hkv, d, dtype=dtype, device=NOWHERE) for _ in "kv")
        inv_freq = torch.empty(d // 2, device=NOWHERE)
        mask = torch.empty(2, s, dtype=torch.bool, device=NOWHERE) if given else None
        # routes as a cache gives them: summaries and scores are other tables' business
        routes = torch.empty(2, t, 32, 32, dtype=torch.int32, device=NOWHERE)
        return (q, k, v, inv_freq, None, mask, routes, 16, *DEFAULT_BUDGETS, "strict", 64, "query", 0, 0, scale)

    yield "prefill", call(4096, 4096, 8, False, d**-0.5)
    # few rows: low tiles, and runs of keys
    yield "decode", call(1, 16384, 8, False, d**-0.5)
    if _thorough(entry):
        yield "mask, scale below 0", call(4096, 4096, 8, True, -1.0)


def _gather_rows(entry: Entry) -> Problems:
    # where an address ends is known on the host: 32 KiB pages, and pages of an odd number of words
    for row_bytes, what in ((entry.head_dim, "aligned"), (entry.head_dim + 4, "any word")):
        yield what, (torch.zeros(64, dtype=torch.int64), row_bytes, torch.device(NOWHERE))
    # what a device finds by itself: pages into slots of a bank, groups of 16 bfloat16 tokens from wherever they are
    found = (torch.empty(64, dtype=torch.int64, device=NOWHERE) for _ in range(2))
    memory = torch.empty(64, entry.head_dim, dtype=torch.uint8, device=NOWHERE)
    yield "into slots", (next(found), entry.head_dim, memory.device, True, memory, next(found))
    yield "groups", (torch.empty(64, dtype=torch.int64, device=NOWHERE), entry.head_dim // 8, memory.device, True)


PROBLEMS: dict[str, Callable[[Entry], Problems]] = {
    "attention": _attention,
    "local_slots": _local_slots,
    "global_stats": _global_stats,
    "hga_summaries": _hga_summaries,
    "hga_route": _hga_route,
    "hga_attention": _hga_attention,
    "gather_rows": _gather_rows,
}


def op_of(table: str) -> str:
    """The operation a table belongs to."""
    for op in PROBLEMS:
        if table.startswith(op):
            return op
    raise ValueError(f"table {table!r} belongs to none of {', '.join(PROBLEMS)}; tables: {', '.join(tuning.tables())}")
