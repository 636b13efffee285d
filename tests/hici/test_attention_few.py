"""attention in C++ for few queries over many keys (decode): nothing is packed, keys are split, heads share items."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hici_cases import random_mask
from torch import Tensor

from hici_kernels import _native, attention
from hici_kernels.testing import assert_usually_within, excess

PATHS = list(_native.paths())
pytestmark = pytest.mark.skipif(not PATHS, reason=str(_native.status()))
each_path = pytest.mark.parametrize("path", PATHS)
NAN = float("nan")


def call(seed: int, draw: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Up to 18 rows a kv head, so on both sides of the limit; keys up to several items' share."""
    rng = random.Random(seed)
    torch.manual_seed(seed + 1_000_003 * draw)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    group, hkv = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 16]), rng.choice([1, 2, 3, 8, 17])
    t = rng.randint(1, max(1, 18 // group))
    s = t + rng.choice([0, 1, 31, 32, 33, rng.randint(0, 300), 511, rng.randint(500, 1500)])
    d = rng.choice([1, 8, 15, 16, 17, 64, 65, 80, 128, 256])
    b = rng.choice([1, 1, 2, 5])
    segment_len = rng.choice([None, None, None, 100, 700])
    n = -(-s // segment_len) if segment_len else 1
    x = {
        "q": torch.randn(b, t, hkv * group, d),
        "k": torch.randn(b, s, hkv, d),
        "v": torch.randn(b, s, hkv, d),
    }
    if rng.random() < 0.6:
        m, k = rng.randint(0, 20), rng.randint(0, 6)
        x |= {name: torch.randn(b, k, hkv, d) for name in ("global_k", "global_v")}
        x |= {name: torch.randn(b, n, m, hkv, d) for name in ("local_k", "local_v")}
    options = {
        "segment_len": segment_len,
        "recurrence_len": rng.randint(0, segment_len) if segment_len else 0,
        "attention_mask": random_mask(rng, b, s) if rng.random() < 0.4 else None,
        "causal": rng.random() < 0.7,
        "scale": rng.choice([None, None, 0.3, -0.2]),
    }
    x = {name: y.to(dtype) for name, y in x.items()}
    mask = options["attention_mask"]
    if mask is not None:
        x["k"][mask == 0] = NAN
        x["v"][mask == 0] = NAN
    if rng.random() < 0.5:  # a cache with the heads outermost, and room left behind its tokens
        for name in ("k", "v"):
            memory = torch.full((b, hkv, s + 3, d), NAN, dtype=dtype)
            x[name] = memory[:, :, :s].copy_(x[name].transpose(1, 2)).transpose(1, 2)
    return x, options


def errors(x: dict[str, Tensor], options: dict[str, Any]) -> dict[str, float]:
    """Error / budget of out and lse."""
    wide = {name: y.double() for name, y in x.items()}
    truth = attention(**wide, **options, return_lse=True, impl="reference")
    plain = attention(**x, **options, return_lse=True, impl="reference")
    found = attention(**x, **options, return_lse=True, impl="cpu")
    return {name: excess(*three) for name, *three in zip(("out", "lse"), truth, plain, found, strict=True)}


@pytest.mark.parametrize("chunk", range(12))
def test_error_is_within_the_budget(chunk: int) -> None:
    for seed in range(12 * chunk, 12 * (chunk + 1)):
        for path in PATHS:
            with _native.path(path, direct=False):
                assert_usually_within(lambda i, seed=seed: errors(*call(seed, i)), f"seed {seed} on {path}")


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_no_number_of_threads(path: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, h, 64).to(dtype) for n, h in ((2, 24), (3000, 6), (3000, 6)))
    before = torch.get_num_threads()
    try:
        with _native.path(path):
            found = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append(attention(q, k, v, return_lse=True, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1])


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_future_changes_nothing(path: str, dtype: torch.dtype) -> None:
    """Other values, and values that are no numbers: rows with few queries do not multiply what they do not see."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, n, h, 48).to(dtype) for n, h in ((4, 8), (700, 2), (700, 2)))
    with _native.path(path, direct=False):
        before = attention(q, k, v, return_lse=True, impl="cpu")
        for value in (NAN, float("inf"), 3.0):
            k[:, -2:], v[:, -2:] = value, value
            out, lse = attention(q, k, v, return_lse=True, impl="cpu")
            assert torch.equal(out[:, :2], before[0][:, :2]) and torch.equal(lse[..., :2], before[1][..., :2])
            assert not torch.equal(out[:, 2:], before[0][:, 2:])


@each_path
@pytest.mark.parametrize("s", [3, 40, 1000])
def test_scores_beyond_every_number(path: str, s: int) -> None:
    """All -inf: out 0, lse -inf. One +inf: NaN, as inf - inf is; the other query keeps its numbers."""
    torch.manual_seed(2)
    q, k, v = (torch.rand(1, n, h, 32) for n, h in ((1, 4), (s, 2), (s, 2)))
    with _native.path(path, direct=False):
        out, lse = attention(1e20 * q, -1e20 * k, v, return_lse=True, impl="cpu")
        assert not out.any() and (lse == -torch.inf).all()
        usual = attention(q, k, v, impl="cpu")
        q[:, :, 3] = 1e20
        k[:, 1] *= 1e20
        out = attention(q, k, v, impl="cpu")
        assert out[:, :, 3].isnan().all() and out[:, :, :3].isfinite().all() and usual.isfinite().all()


@each_path
def test_large_scores_in_any_order_of_keys(path: str) -> None:
    """Levels that rise in every block, fall, or lie far above what later keys give."""
    torch.manual_seed(3)
    s, d = 900, 16
    for ramp in (torch.linspace(-80, 80, s), torch.linspace(80, -80, s), torch.randn(s) * 60):
        q, k, v = torch.ones(1, 1, 2, d), ramp[None, :, None, None].expand(1, s, 2, d) / 4, torch.randn(1, s, 2, d)
        with _native.path(path, direct=False):
            ratios = errors({"q": q, "k": k.contiguous(), "v": v}, {})
        assert max(ratios.values()) <= 1, ratios
