"""Wrong calls of global_stats and merge_attention: (id, call, exception, what the message must name)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hici_kernels import merge_attention
from hici_kernels.ops.global_stats import global_stats

Case = tuple[str, Callable[[], Any], type[Exception], str]


def local(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (2, 3, 4, 8), dtype=dtype)


def packed(*entries: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(entries, dtype=dtype)


def parts(n: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(1, 3, 2, 4, dtype=dtype) for _ in range(n)]


def lses(n: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(1, 2, 3, dtype=dtype) for _ in range(n)]


CASES: list[Case] = [
    (
        "stats-not-a-tensor",
        lambda: global_stats([[1.0]]),
        TypeError,
        r"local must be a tensor \[B, N, M, H\], got list",
    ),
    ("stats-dims", lambda: global_stats(local(3, 4, 8)), ValueError, r"local must be \[B, N, M, H\].*\(3, 4, 8\)"),
    ("stats-int", lambda: global_stats(local(dtype=torch.int64)), TypeError, "local must be float32.*int64"),
    ("stats-no-slots", lambda: global_stats(local(1, 2, 0, 4)), ValueError, "local must have at least 1 slot"),
    ("stats-no-channels", lambda: global_stats(local(1, 2, 3, 0)), ValueError, "local must have at least 1 channel"),
    ("stats-strides", lambda: global_stats(local().mT), ValueError, "local must be contiguous in its last dimension"),
    ("stats-causal", lambda: global_stats(local(), causal=1), TypeError, "causal must be a bool, got int 1"),
    ("stats-valid-list", lambda: global_stats(local(), valid=[True]), TypeError, "valid must be a tensor.*list"),
    (
        "stats-valid-dtype",
        lambda: global_stats(local(), valid=torch.ones(2, 3)),
        TypeError,
        "valid must be bool, got torch.float32",
    ),
    (
        "stats-valid-shape",
        lambda: global_stats(local(), valid=torch.ones(2, 4, dtype=torch.bool)),
        ValueError,
        r"valid must be \[B, N\] = \[2, 3\], got \[2, 4\]",
    ),
    (
        "stats-valid-device",
        lambda: global_stats(local(), valid=torch.ones(2, 3, dtype=torch.bool, device="meta")),
        ValueError,
        "valid is on meta, expected cpu",
    ),
    (
        "stats-packed-batch",
        lambda: global_stats(local(), cu_segments=packed(0, 3)),
        ValueError,
        "cu_segments needs batch 1.*batch 2",
    ),
    (
        "stats-packed-dtype",
        lambda: global_stats(local(1, 3, 4, 8), cu_segments=packed(0, 3, dtype=torch.int64)),
        TypeError,
        "cu_segments must be int32, got torch.int64",
    ),
    (
        "stats-packed-end",
        lambda: global_stats(local(1, 3, 4, 8), cu_segments=packed(0, 4)),
        ValueError,
        "cu_segments must run from 0 to 3, got 0 to 4",
    ),
    (
        "stats-packed-order",
        lambda: global_stats(local(1, 3, 4, 8), cu_segments=packed(0, 2, 1, 3)),
        ValueError,
        "cu_segments must not decrease, got 2 followed by 1",
    ),
    (
        "stats-packed-empty",
        lambda: global_stats(local(1, 0, 4, 8), cu_segments=packed()),
        ValueError,
        "cu_segments must have at least 1 entry",
    ),
    ("stats-impl", lambda: global_stats(local(), impl="fast"), ValueError, "impl must be None or one of.*'fast'"),
    ("stats-impl-missing", lambda: global_stats(local(), impl="cuda"), ValueError, "impl='cuda' cannot serve"),
    ("merge-tensor", lambda: merge_attention(parts()[0], lses()), TypeError, "outs must be a sequence.*got Tensor"),
    ("merge-nothing", lambda: merge_attention([], []), ValueError, "outs must hold at least 1 tensor, got 0"),
    ("merge-count", lambda: merge_attention(parts(), lses(1)), ValueError, r"lses must hold as many.*\(2\), got 1"),
    (
        "merge-dims",
        lambda: merge_attention([parts()[0][0]], lses(1)),
        ValueError,
        r"outs\[0\] must be \[B, S, H, D\].*\(3, 2, 4\)",
    ),
    (
        "merge-dtypes",
        lambda: merge_attention([*parts(1), *parts(1, torch.bfloat16)], lses()),
        TypeError,
        r"outs\[1\] has dtype torch.bfloat16, expected torch.float32",
    ),
    (
        "merge-shape",
        lambda: merge_attention([parts()[0], torch.zeros(1, 4, 2, 4)], lses()),
        ValueError,
        r"outs\[1\] must be .*\[1, 3, 2, 4\], got \[1, 4, 2, 4\]",
    ),
    (
        "merge-lse-shape",
        lambda: merge_attention(parts(1), [torch.zeros(1, 3, 2)]),
        ValueError,
        r"lses\[0\] must be \[B, H, S\] = \[1, 2, 3\], got \[1, 3, 2\]",
    ),
    (
        "merge-lse-dtype",
        lambda: merge_attention(parts(1, torch.bfloat16), lses(1, torch.bfloat16)),
        TypeError,
        r"lses\[0\] must be torch.float32.*got torch.bfloat16",
    ),
    (
        "merge-lse-device",
        lambda: merge_attention(parts(1), [lses(1)[0].to("meta")]),
        ValueError,
        r"lses\[0\] is on meta, expected cpu",
    ),
]
