"""hga_route: schema and shapes of the torch.library operation.

``super_keys`` belong to ``super_chunk`` > 0, and are formed anew where a caller keeps none. The first ``context``
queries only feed the maxima of routing="prefix": they are what a cache keeps of the open chunk, and get no route.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dispatch import select
from ..._library import register
from ..hga_summaries.supers import super_chunk_keys

ARGUMENTS = (
    "Tensor q, Tensor chunk_keys, Tensor group_keys, Tensor? positions, SymInt context, SymInt chunk_size, "
    "SymInt keep_first, SymInt keep_last, SymInt topk_chunks, SymInt topk_groups, str routing, SymInt route_block, "
    "str share, SymInt super_chunk, SymInt topk_supers, str impl"
)
NAMES = tuple(argument.split()[-1] for argument in ARGUMENTS.split(", "))[:-1]


def width(topk_groups: int, chunks: int, groups_per_chunk: int) -> int:
    """Entries of a route that can be used at all: a budget may be far larger than the text."""
    return torch.sym_min(topk_groups, chunks * groups_per_chunk)


def _forward(*arguments: Any) -> Tensor:
    # an argument left at its default may not be passed on
    given, impl, super_keys = arguments[: len(NAMES)], arguments[len(NAMES)], (*arguments, None)[len(NAMES) + 1]
    named = dict(zip(NAMES, given, strict=True))
    if super_keys is None and named["super_chunk"]:
        super_keys = super_chunk_keys(named["chunk_keys"], named["super_chunk"])
    return select("hga_route", impl, *given).forward(*given, super_keys)


def _forward_fake(*arguments: Any) -> Tensor:
    given = dict(zip(NAMES, arguments, strict=False))
    b, t, hq, _ = given["q"].shape
    w = width(given["topk_groups"], *given["group_keys"].shape[1:3])
    return given["q"].new_empty((b, t - given["context"], hq, w), dtype=torch.int32)


route_forward = register("hga_route", f"({ARGUMENTS}, Tensor? super_keys=None) -> Tensor", _forward, _forward_fake)
