"""The layer case: the published sequence of PyTorch operations is the same function as ours."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hici_kernels.bench import hici_layer
from hici_kernels.bench.case import FASTEST, PLAIN, Case
from hici_kernels.bench.run import measure
from hici_kernels.bench.shapes import Layer

CEILINGS = {"matmul_flops": {str(torch.float32): 1e11, str(torch.bfloat16): 1e11}, "copy_bytes_per_s": 1e10}
GROUPED = Layer("grouped", 32, 8, 4, 8)
EACH = Layer("one kv head each", 32, 4, 4, 8)
BUILDERS = (hici_layer.core, hici_layer.whole)


def case(build: object, layer: Layer = GROUPED, dtype: torch.dtype = torch.float32) -> Case:
    return build(layer, 96, 24, 16, 4, dtype)  # type: ignore[operator]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("layer", [GROUPED, EACH])
def test_both_sides_compute_the_same(build: object, layer: Layer) -> None:
    made = case(build, layer)
    x = made.rounded()
    truth = made.plain(made.wide(x))[0] if build is hici_layer.whole else made.plain(x)[0].double()
    found = made.call(x, "reference")[0]
    assert found.shape == truth.shape and float(truth.abs().max()) > 0.1
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-5)


def test_every_slot_matters() -> None:
    made = case(hici_layer.core)
    x = made.rounded()
    changed = dict(x, hidden=x["hidden"].clone())
    changed["hidden"][:, -1] += 1.0  # reaches the first token through the global slots alone
    difference = (made.call(changed, "reference")[0] - made.call(x, "reference")[0])[:, 0].abs().max()
    assert difference > 1e-4


@pytest.mark.parametrize("layer", [GROUPED, EACH])
def test_the_part_is_that_part_of_the_whole(layer: Layer) -> None:
    made = case(hici_layer.core, layer)
    x = made.wide(made.rounded())
    part = made.part
    assert part is not None and part.outputs is not None
    alone = made.plain(part.inputs(x))[0]
    assert alone.shape[2] == 2 * layer.hq // layer.hkv
    torch.testing.assert_close(alone, part.outputs(made.plain(x))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured(build: object, dtype: torch.dtype) -> None:
    row = measure(case(build, dtype=dtype), None, 7, CEILINGS, backward=False)
    assert set(row["sides"]) == {FASTEST, PLAIN} and set(row["served_by"]) == {*hici_layer.OPS}
    for side in row["sides"].values():
        assert side["correct"] is True and side["speedup"] > 0 and "resident_bytes" in side
    named = measure(case(build, dtype=dtype), ["reference"], 7, CEILINGS, backward=False)
    assert set(named["sides"]) == {"reference", PLAIN} and named["sides"]["reference"]["correct"]


@pytest.mark.parametrize("build", BUILDERS)
def test_a_wrong_layer_gets_no_speed(build: object) -> None:
    right = case(build)
    wrong = dataclasses.replace(right, call=lambda x, impl: tuple(1.01 * y for y in right.call(x, impl)))
    side = measure(wrong, None, 7, CEILINGS, backward=False)["sides"][FASTEST]
    assert side["correct"] is False and "median_s" not in side


def test_a_layer_wrong_at_its_full_size_alone_gets_no_speed() -> None:
    """The float64 check of the whole layer is a call of its own: the timed one is held against plain PyTorch."""
    small = hici_layer.CHECKED
    right = hici_layer.whole(EACH, 4 * small, 2 * small, 16, 4, torch.float32)

    def call(x: dict, impl: str | None) -> tuple:
        (out,) = right.call(x, impl)
        return (out * (1.01 if x["hidden"].shape[1] == 4 * small else 1.0),)

    side = measure(dataclasses.replace(right, call=call), None, 7, CEILINGS, backward=False)["sides"][FASTEST]
    assert side["correct"] is False and side["error_max"] <= side["error_allowed"]
    good = measure(right, None, 7, CEILINGS, backward=False)["sides"][FASTEST]
    assert good["correct"] is True and good["from_plain"] < side["from_plain"]


def test_an_implementation_that_cannot_serve_is_reported() -> None:
    side = measure(case(hici_layer.core), ["flash_attn"], 7, CEILINGS, backward=False)["sides"]["flash_attn"]
    assert "cannot serve" in side["error"] and "median_s" not in side
