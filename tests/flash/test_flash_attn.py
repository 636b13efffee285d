"""impl="flash_attn" with a stand-in for the package: the same results and gradients as the reference.

The stand-in computes what the package documents, in plain torch, so what is proved here is everything on this side of
the package: cuts, layouts, slots, merging, and the gradients that the package does not know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import hici_kernels as hici
from hici_kernels import _dispatch
from hici_kernels.errors import ImplError
from hici_kernels.ops.attention import flash_attn
from hici_kernels.testing import assert_within_budget

NAMES = ("q", "k", "v", "global_k", "global_v", "local_k", "local_v")


def forget() -> None:
    _dispatch.load.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in where the real package would be, on the CPU and in any precision."""
    forget()
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake"))
    monkeypatch.setattr(flash_attn, "DEVICES", ("cpu",))
    monkeypatch.setattr(flash_attn, "DTYPES", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
    from flash_attn import flash_attn_interface

    yield flash_attn_interface
    forget()


def inputs(
    b: int, s: int, n: int, k: int = 4, m: int = 8, *, hq: int = 4, hkv: int = 2, d: int = 16, own: bool = False
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(s)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = {"q": normal(b, s, hq, d), "k": normal(b, s, hkv, d), "v": normal(b, s, hkv, d)}
    if k:
        shape = (b, n, k, hkv, d) if own else (b, k, hkv, d)
        x |= {"global_k": normal(*shape), "global_v": normal(*shape)}
    if m:
        x |= {"local_k": normal(b, n, m, hkv, d), "local_v": normal(b, n, m, hkv, d)}
    return x


def run(x: dict[str, Tensor], impl: str, through: str, **options: Any) -> list[Tensor]:
    """out, lse and the gradients of all inputs, of a loss through out, lse or both."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    out, lse = hici.attention(**leaves, return_lse=True, impl=impl, **options)
    g = torch.Generator().manual_seed(9)
    noise = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (out, lse)]
    pairs = {"out": [(out, noise[0])], "lse": [(lse, noise[1])], "both": [(out, noise[0]), (lse, noise[1])]}[through]
    grads = torch.autograd.grad([t for t, _ in pairs], list(leaves.values()), [w for _, w in pairs], allow_unused=True)
    whole = [torch.zeros_like(t) if w is None else w for t, w in zip(x.values(), grads, strict=True)]
    return [out.detach(), lse.detach(), *whole]


CASES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "ragged": (inputs(2, 45, 3), {"segment_len": 16}),
    "own globals": (inputs(2, 40, 3, own=True), {"segment_len": 16}),
    "globals only": (inputs(1, 32, 2, m=0), {"segment_len": 16}),
    "locals only": (inputs(2, 32, 2, k=0), {"segment_len": 16}),
    "no slots": (inputs(2, 45, 3, 0, 0), {"segment_len": 16}),
    "slots of length zero": (
        {**inputs(1, 20, 2, 0, 0), **{f"local_{x}": torch.zeros(1, 2, 0, 2, 16).double() for x in "kv"}},
        {"segment_len": 16},
    ),
    "full": (inputs(2, 45, 3), {"segment_len": 16, "causal": False}),
    "one segment, own scale": (inputs(1, 33, 1), {"scale": 0.4}),
    "one kv head": (inputs(1, 32, 2, hkv=1), {"segment_len": 16}),
    "prefix mask": (inputs(2, 45, 3), {"segment_len": 16, "prefix_mask": torch.tensor([False, True, True])}),
    "prefix mask per row": (
        inputs(2, 45, 3, own=True),
        {"segment_len": 16, "prefix_mask": torch.tensor([[False, True, True], [True, False, True]])},
    ),
    "packed": (
        inputs(1, 60, 6),
        {"segment_len": 16, "cu_seqlens": torch.tensor([0, 20, 55, 60], dtype=torch.int32)},
    ),
    "packed with an empty document": (
        inputs(1, 60, 6, own=True),
        {"segment_len": 16, "cu_seqlens": torch.tensor([0, 20, 20, 55, 60], dtype=torch.int32)},
    ),
    "packed, shared globals alone": (
        inputs(1, 60, 6, m=0),
        {"segment_len": 16, "cu_seqlens": torch.tensor([0, 20, 55, 60], dtype=torch.int32)},
    ),
    "packed, whole documents": (inputs(1, 60, 3), {"cu_seqlens": torch.tensor([0, 20, 20, 55, 60], dtype=torch.int32)}),
    "nothing": (inputs(1, 0, 0, 4, 0), {"segment_len": 16}),
}


@pytest.mark.parametrize("through", ["out", "lse", "both"])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_reference(package: ModuleType, case: str, through: str) -> None:
    x, options = CASES[case]
    expected, found = run(x, "reference", through, **options), run(x, "flash_attn", through, **options)
    for name, e, f in zip(("out", "lse", *x), expected, found, strict=True):
        assert f.dtype == e.dtype
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("through", ["out", "both"])
def test_within_the_error_budget(package: ModuleType, dtype: torch.dtype, through: str) -> None:
    x, options = CASES["ragged"]
    low = {name: t.to(dtype) for name, t in x.items()}
    oracle = run({name: t.double() for name, t in low.items()}, "reference", through, **options)
    plain, found = run(low, "reference", through, **options), run(low, "flash_attn", through, **options)
    for name, o, p, f in zip(("out", "lse", *x), oracle, plain, found, strict=True):
        assert_within_budget(o, f, p, f"{name} {dtype}")


def test_slots_nobody_sees_may_hold_anything(package: ModuleType) -> None:
    x, options = CASES["prefix mask"]
    poisoned = {name: t.clone() for name, t in x.items()}
    poisoned["local_k"][:, 0] = torch.nan
    poisoned["local_v"][:, 0] = torch.inf
    expected, found = run(x, "flash_attn", "both", **options), run(poisoned, "flash_attn", "both", **options)
    for e, f in zip(expected, found, strict=True):
        assert torch.equal(e, f)


def test_keys_and_values_are_read_where_they_are(package: ModuleType) -> None:
    x, options = CASES["ragged"]
    package.calls.clear()
    hici.attention(**x, impl="flash_attn", **options)
    tokens, slots = package.calls
    assert (tokens["k"], tokens["v"]) == (x["k"].data_ptr(), x["v"].data_ptr())
    assert tokens["causal"] and not slots["causal"]


def test_views_of_one_projection_are_read_in_place(package: ModuleType) -> None:
    fused = torch.randn(2, 45, 8, 16, dtype=torch.float64)
    q, k, v = fused.split((4, 2, 2), 2)
    package.calls.clear()
    found = hici.attention(q, k, v, segment_len=16, impl="flash_attn")
    assert package.calls[0]["k"] == k.data_ptr()
    torch.testing.assert_close(found, hici.attention(q, k, v, segment_len=16, impl="reference"))


def test_an_unused_lse_costs_no_further_calls(package: ModuleType) -> None:
    x, options = CASES["ragged"]
    package.calls.clear()
    run(x, "flash_attn", "out", **options)
    assert len(package.calls) == 2
    package.calls.clear()
    run(x, "flash_attn", "lse", **options)
    assert len(package.calls) == 4


def test_the_same_bits_twice(package: ModuleType) -> None:
    x, options = CASES["ragged"]
    low = {name: t.bfloat16() for name, t in x.items()}
    for a, b in zip(*(run(low, "flash_attn", "both", **options) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mask": ({"attention_mask": torch.ones(2, 32)}, "attention_mask"),
    "recurrence": ({"recurrence_len": 4}, "recurrence_len 4"),
    "decoding": ({"q": torch.zeros(2, 8, 4, 16)}, "q has 8 of the 32 positions"),
    "head_dim": ({n: torch.zeros(2, 32, 4, 12) for n in "qkv"}, "multiple of 8"),
    "large head": ({n: torch.zeros(2, 32, 4, 264) for n in "qkv"}, "at most 256"),
    "rows apart": ({"k": torch.zeros(2, 40, 4, 16)[:, :32]}, "k would have to be copied: its rows"),
    "crooked heads": ({"v": torch.zeros(2, 32, 4, 17)[..., 1:]}, "v would have to be copied: its heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_serve_is_refused_with_the_reason(package: ModuleType, case: str) -> None:
    change, reason = REFUSED[case]
    x = {n: torch.zeros(2, 32, 4, 16) for n in "qkv"} | {"segment_len": 16} | change
    with pytest.raises(ImplError, match=reason):
        hici.attention(**x, impl="flash_attn")
    hici.attention(**x)  # unnamed, another implementation takes it


def test_the_cpu_and_float32_are_refused(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = {n: torch.zeros(1, 32, 4, 16) for n in "qkv"}
    monkeypatch.setattr(flash_attn, "DTYPES", (torch.float16, torch.bfloat16))
    with pytest.raises(ImplError, match="float32"):
        hici.attention(**x, impl="flash_attn")
    monkeypatch.setattr(flash_attn, "DEVICES", ("cuda",))
    with pytest.raises(ImplError, match="CUDA tensors"):
        hici.attention(**x, impl="flash_attn")


def test_an_old_package_is_refused(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(package, "_flash_attn_varlen_backward")
    assert "2.7" in (flash_attn.unavailable() or "")


def test_absence_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert "hici-kernels[flash]" in (flash_attn.unavailable() or "")
    forget()
