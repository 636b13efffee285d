"""The usual draw: what passes, what does not, and that the first draw does not judge itself."""

from __future__ import annotations

import math

import pytest
import torch

from hici_kernels.testing import assert_usual, assert_usually_within, excess


def test_excess_is_error_over_budget() -> None:
    oracle = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = torch.tensor([1.0, 2.5])
    assert excess(oracle, plain, torch.tensor([1.0, 3.0])) == pytest.approx(1.0)
    assert excess(oracle, plain, torch.tensor([1.0, 2.0])) == 0
    nothing = torch.zeros(2, dtype=torch.float64)
    assert excess(nothing, nothing.float(), torch.tensor([0.0, 1e-30])) == math.inf
    assert excess(oracle, plain, torch.tensor([1.0, math.nan])) == math.inf


def test_the_median_decides_and_no_draw_may_be_far_off() -> None:
    assert_usual([{"x": 0.5}, {"x": 9.9}, {"x": 0.9}], "kept")
    assert_usual([{"x": 1.4}, {"x": 1.2}, {"x": 0.9}], "kept", most=1.5)
    for ratios in ([0.5, 10.0, 0.9], [1.1, 1.2, 0.1], [math.inf, 0.1, 0.1]):
        with pytest.raises(AssertionError, match="lost: x"):
            assert_usual([{"x": r} for r in ratios], "lost")


def test_nine_fresh_draws_judge_what_exceeded_the_budget() -> None:
    asked: list[int] = []

    def draw(i: int) -> dict[str, float]:
        asked.append(i)
        return {"lucky": 50.0 if i == 0 else 0.8, "fine": 0.2 if i == 0 else 99.0}

    assert_usually_within(draw, "a first draw of bad luck")
    assert asked == list(range(10))
    asked.clear()
    assert_usually_within(lambda i: asked.append(i) or {"x": 1.0}, "within at once")
    assert asked == [0]
    with pytest.raises(AssertionError, match="always over: x"):
        assert_usually_within(lambda i: {"x": 1.1}, "always over")
    with pytest.raises(AssertionError):
        assert_usually_within(lambda i: {"x": math.nan if i == 0 else 2.0}, "not a number")
