"""Does a model see its future? Answered by changing later tokens and looking at earlier logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks

#: largest relative change of a logit that rounding may cause (another kernel, another order of sums)
ROUNDING = 1e-5


@dataclass(frozen=True)
class Verdict:
    """``leaks``: whether any logit before the changed tokens moved by more than rounding.

    change: largest |difference| of a logit, over max(1, |logit|). at: the cuts that were tried. furthest: the largest
    distance found, in tokens, between a logit that moved and the first changed token; other cuts may show a larger one.
    """

    leaks: bool
    change: float
    furthest: int
    at: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "at": list(self.at)}

    def __str__(self) -> str:
        return f"leaks (logits move {self.furthest} tokens before a change)" if self.leaks else "no leak"


@torch.no_grad()
def leak_test(
    logits: Callable[[Tensor], Tensor],
    vocab_size: int,
    length: int,
    *,
    cuts: int = 4,
    seed: int = 0,
    limit: float = ROUNDING,
) -> Verdict:
    """Value perturbation: every token from a cut on is replaced; a causal model's logits before the cut stay.

    Args:
        logits: ids int64 [1, length] to logits [1, length, V].
        length: of the random text; use the length that is evaluated, because segments and routes depend on it.
        cuts: how many places are tried, spread over the text and well inside power-of-two segments; two more are near
            its end, where the last piece of the text is routed or summarised.

    Raises:
        ValueError: a logit is NaN: nothing can be said of it.

    A change reaches every path at once: slots, statistics, routes, masks. A verdict of "no leak" is about the cuts and
    the text that were tried.
    """
    _checks.integer("length", length, 2)
    _checks.integer("cuts", cuts, 1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (1, length), generator=generator)
    before = logits(ids)[0]
    if before.isnan().any():
        raise ValueError("logits must be numbers, got NaN")
    # one logit may be huge (or -inf, of a token that is ruled out): each is held against its own size
    scale = before.abs().clamp(min=1.0)
    # even and odd ones in turn: a leak may be between the two tokens of a pair only
    places = [length * (2 * i + 1) // (2 * cuts) + (37 if length > 8 * 37 else 1) + i % 2 for i in range(cuts)]
    places += [length - 1 - length // 64, length - 3]
    at = sorted({min(length - 1, max(1, place)) for place in places})
    change, furthest = 0.0, 0
    for cut in at:
        changed = ids.clone()
        step = torch.randint(1, vocab_size, (length - cut,), generator=generator)
        changed[0, cut:] = (ids[0, cut:] + step) % vocab_size
        after = logits(changed)[0, :cut]
        same = after == before[:cut]  # infinities included
        moved = torch.where(same, 0.0, (after - before[:cut]).abs() / scale[:cut]).nan_to_num(nan=torch.inf).amax(-1)
        change = max(change, float(moved.max()))
        where = (moved > limit).nonzero()[:, 0]
        if len(where):
            furthest = max(furthest, cut - int(where[0]))
    return Verdict(furthest > 0, change, furthest, tuple(at))
