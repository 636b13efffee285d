"""Decode-sized calls: where a call of ours beats what one would write in PyTorch, and where it does not.

S new queries over C cached keys and the S new ones, at a Llama-3-8B layer, one document, causal:
    with slots:  attention(q, k, v, global_k, ..., local_v)       beside  torch.cat of slots and keys, then SDPA
    without:     attention(q, k, v)                               beside  SDPA on the keys alone
SDPA in the faster of two forms, enable_gqa=True or the query heads of a kv head as queries of it, for S > 1 with a mask
that was made beforehand. Bytes: q, k, v and slots once, out once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ImplError
from ..ops.attention.api import attention
from .attention import SLOTS, K, M, heads_part
from .case import Inputs
from .machine import spread
from .run import BRIEF, alternate, check
from .shapes import LLAMA3_8B, TINY, Layer, drawn

OURS, PLAIN = "hici_kernels", "PyTorch"
LONGEST = 65536


class Point(NamedTuple):
    """One size: ``queries`` new tokens after ``cached`` ones."""

    layer: Layer
    queries: int
    cached: int
    slots: bool
    dtype: torch.dtype


def points(suite: str) -> list[Point]:
    """The sizes of a suite, smallest first."""
    both = (torch.float32, torch.bfloat16)
    if suite == "quick":
        return [
            Point(TINY, s, c, slots, dtype)
            for dtype in both
            for slots in (True, False)
            for c in (0, 512)
            for s in (1, 8)
        ]
    if suite != "cpu":
        return []
    cached = (0, 64, 256, 1024, 4096, 16384, LONGEST)
    queries = (1, 2, 4, 8, 16, 32, 64)
    with_slots = [Point(LLAMA3_8B, s, c, True, dtype) for dtype in both for c in cached for s in queries]
    without = [Point(LLAMA3_8B, s, c, False, dtype) for dtype in both for c in cached for s in (1, 64)]
    return with_slots + without


def inputs(p: Point) -> Inputs:
    kv = (p.layer.hkv, p.layer.d)
    total = p.queries + p.cached
    found: Inputs = {
        "q": drawn(p.dtype, 0, 1, p.queries, p.layer.hq, p.layer.d),
        "k": drawn(p.dtype, 1, 1, total, *kv),
        "v": drawn(p.dtype, 2, 1, total, *kv),
    }
    if p.slots:
        shapes = ((1, K, *kv), (1, K, *kv), (1, 1, M, *kv), (1, 1, M, *kv))
        found |= {n: drawn(p.dtype, 3 + i, *shape) for i, (n, shape) in enumerate(zip(SLOTS, shapes, strict=True))}
    return found


def visible(p: Point) -> Tensor | None:
    """bool [S, keys]: every slot, and tokens up to the query itself. One query sees everything."""
    if p.queries == 1:
        return None
    keys = p.cached + p.queries + (K + M if p.slots else 0)
    return torch.ones(p.queries, keys, dtype=torch.bool).tril(keys - p.queries)


def composed(x: Inputs, mask: Tensor | None) -> Tensor:
    """[1, S, Hq, D] by PyTorch."""
    k, v = x["k"], x["v"]
    if "global_k" in x:
        k = torch.cat((x["global_k"], x["local_k"][:, 0], k), 1)
        v = torch.cat((x["global_v"], x["local_v"][:, 0], v), 1)
    q, k, v = (t.transpose(1, 2) for t in (x["q"], k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def folded(x: Inputs, mask: Tensor | None) -> Tensor:
    """The same, the query heads of a kv head as queries of it: keys are read once for all of them."""
    k, v = x["k"], x["v"]
    if "global_k" in x:
        k = torch.cat((x["global_k"], x["local_k"][:, 0], k), 1)
        v = torch.cat((x["global_v"], x["local_v"][:, 0], v), 1)
    b, s, hq, d = x["q"].shape
    hkv = k.shape[2]
    q = x["q"].view(b, s, hkv, hq // hkv, d).permute(0, 2, 3, 1, 4).reshape(b, hkv, -1, d)
    seen = None if mask is None else mask.repeat(hq // hkv, 1)
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen)
    return out.view(b, hkv, hq // hkv, s, d).permute(0, 3, 1, 2, 4).reshape(b, s, hq, d)


#: Forms of PyTorch's side; the faster one of a size is what ours is compared with.
FORMS = {"enable_gqa": composed, "heads as rows": folded}


def measure(p: Point, impl: str | None, rounds: int, ceilings: dict[str, Any]) -> dict[str, Any]:
    """One row of the table; a wrong result has no time."""
    x, mask, part = inputs(p), visible(p), heads_part(p.layer)
    seen = part.inputs(x)
    assert part.outputs is not None
    row: dict[str, Any] = {
        "queries": p.queries,
        "cached": p.cached,
        "slots": p.slots,
        "dtype": str(p.dtype).removeprefix("torch."),
        "checked": part.note,
        "sides": {},
    }
    sides = row["sides"]
    with torch.no_grad():
        truth = composed({n: t.double() for n, t in seen.items()}, mask)
        plain = composed(seen, mask)
        call = functools.partial(attention, **x, impl=impl)
        try:
            sides[OURS] = check([truth], [plain], part.outputs((call(),)), p.dtype)
        except ImplError as refused:
            sides[OURS] = {"correct": None, "error": str(refused)}
        runnable: dict[str, Callable[[], object]] = {OURS: call} if sides[OURS]["correct"] else {}
        for form, formula in FORMS.items():
            found = part.outputs((formula(x, mask),))
            sides[f"{PLAIN}, {form}"] = check([truth], [plain], found, p.dtype)
            runnable[f"{PLAIN}, {form}"] = functools.partial(formula, x, mask)
        size = p.dtype.itemsize * p.layer.d * (2 * p.queries * p.layer.hq + 2 * p.layer.hkv * (p.queries + p.cached))
        size += sum(x[n].nbytes for n in SLOTS if n in x)
        began = time.perf_counter()
        composed(x, mask)
        many = rounds if time.perf_counter() - began > BRIEF else 3 * rounds
        for name, times in alternate(runnable, many).items():
            sides[name] |= spread(times) | {"rounds": many}
            rate = size / sides[name]["median_s"]
            read = ceilings.get("read_bytes_per_s")
            sides[name] |= {"bytes_per_s": rate, "read_share": rate / read if read else None}
    row["bytes"] = size
    best = min(FORMS, key=lambda form: sides[f"{PLAIN}, {form}"]["median_s"])
    sides[PLAIN] = sides[f"{PLAIN}, {best}"] | {"form": best}
    if "median_s" in sides[OURS]:
        row["speedup"] = sides[PLAIN]["median_s"] / sides[OURS]["median_s"]
    return row


def losses(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sizes where PyTorch is faster."""
    return [r for r in rows if r.get("speedup", 1.0) < 1.0]


def longest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One query over the longest cache."""
    return [r for r in rows if r["cached"] == LONGEST and r["queries"] == 1]


def size_of(row: dict[str, Any]) -> str:
    """A row's size in words."""
    return f"{row['dtype']}, {'' if row['slots'] else 'no '}slots, S {row['queries']}, {row['cached']} cached"
