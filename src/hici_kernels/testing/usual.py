"""Judging results whose largest error is luck: the budget in the usual draw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .tolerance import budget, error

#: Fresh draws that decide once a first one is over the budget.
DRAWS = 9
#: Of the budget, what no single draw may reach.
FAR = 10.0


def excess(oracle: Tensor, plain: Tensor, result: Tensor) -> float:
    """Error of ``result`` as a part of its budget: above 1 is over it, infinite where no error is allowed."""
    wrong, allowed = error(oracle, result), budget(oracle, plain, result.dtype)
    return 0.0 if wrong == 0 else wrong / allowed if allowed else math.inf


def assert_usual(draws: Sequence[Mapping[str, float]], what: str, most: float = 1.0) -> None:
    """AssertionError unless every result keeps the budget in the usual one of ``draws`` and is far off in none.

    The largest error of a few numbers, that of the plain computation as much as ours, is luck: in one draw of values
    of a hundred the plain computation errs by a small part of what it usually does, and the budget is too small. So
    the median of error / budget over the draws must be at most ``most``, and the largest below FAR.
    """
    for name in draws[0]:
        ratios = sorted(d[name] for d in draws)
        assert statistics.median(ratios) <= most and ratios[-1] < FAR, (
            f"{what}: {name}: error / budget of {len(ratios)} draws {ratios}"
        )


def assert_usually_within(draw: Callable[[int], Mapping[str, float]], what: str, most: float = 1.0) -> None:
    """``draw(i)`` gives error / budget by result for values of draw i. What exceeds it in draw 0 is judged by
    :func:`assert_usual` over draws 1 to DRAWS, fresh ones: the draw that raised the question does not answer it."""
    over = [name for name, ratio in draw(0).items() if not ratio <= 1]
    if over:
        draws = [draw(i) for i in range(1, DRAWS + 1)]
        assert_usual([{name: d[name] for name in over} for d in draws], what, most)
