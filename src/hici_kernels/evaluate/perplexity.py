"""Perplexity over a token file: the published sliding protocol, and one that scores nothing but last tokens."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .. import _checks
from .._outputs import progress
from .models import Evaluated

PROTOCOLS = ("sliding", "last")
#: loss whose exponential is no float any more
_LARGEST = math.log(sys.float_info.max)


def sliding(
    evaluated: Evaluated, ids: np.ndarray, length: int, *, stride: int = 256, windows: int | None = None
) -> Any:
    """The published protocol: windows [start, start + L) for start in range(0, tokens - L, stride), every window scores
    all of its L - 1 shifted tokens, perplexity = exp(sum of losses / count).

    A token is scored up to L / stride times with different context, and short contexts weigh in. Through a mode that
    leaks, the number is no perplexity of a language model (the record says so).

    Args:
        windows: evenly spaced ones of these windows; None = all.
    """
    _check_length(ids, length)
    starts = _spread(list(range(0, len(ids) - length, stride)), windows)
    total, count, per = 0.0, 0, []
    for start in progress(starts, f"ppl {length}"):
        window = torch.from_numpy(ids[start : start + length].astype(np.int64))[None]
        loss = F.cross_entropy(evaluated.logits(window)[0, :-1], window[0, 1:].to(evaluated.device), reduction="none")
        total += float(loss.double().sum())
        count += loss.numel()
        per.append(float(loss.double().mean()))
    return _result("sliding", total / count, per, count, length, stride=stride)


def last_token(evaluated: Evaluated, ids: np.ndarray, length: int, *, windows: int = 64, seed: int = 0) -> Any:
    """The strict protocol: the loss of one token after exactly L tokens of context, which end where it begins.

    The model never gets to see the token, so the number is valid for every mode, leaking ones included.

    Args:
        windows: number of tokens scored, at places drawn by ``seed`` without repetition.
    """
    _check_length(ids, length)
    starts = np.random.default_rng(seed).permutation(len(ids) - length)[:windows]
    losses = []
    for start in progress(sorted(int(s) for s in starts), f"last {length}"):
        window = torch.from_numpy(ids[start : start + length].astype(np.int64))[None]
        target = torch.tensor([int(ids[start + length])], device=evaluated.device)
        losses.append(float(F.cross_entropy(evaluated.logits(window, keep=1)[0, -1:], target)))
    return _result("last", float(np.mean(losses)), losses, len(losses), length)


def _check_length(ids: np.ndarray, length: int) -> None:
    if len(ids) <= length:
        raise ValueError(f"data must hold more than {length} tokens, got {len(ids)}")


def _spread(starts: list[int], windows: int | None) -> list[int]:
    if windows is None or windows >= len(starts):
        return starts
    return [starts[i] for i in np.linspace(0, len(starts) - 1, windows).astype(int)]


def _result(protocol: str, loss: float, per: list[float], count: int, length: int, **more: Any) -> dict[str, Any]:
    # windows overlap, so this is a description of their spread and no confidence interval
    error = float(np.std(per, ddof=1) / math.sqrt(len(per))) if len(per) > 1 else None
    return {
        "protocol": protocol,
        "length": length,
        "loss": loss,
        "loss_se": error,
        "perplexity": math.exp(loss) if loss < _LARGEST else math.inf,
        "scored_tokens": count,
        "windows": len(per),
        **more,
    }


def run(
    evaluated: Evaluated,
    ids: np.ndarray,
    lengths: list[int],
    *,
    protocols: tuple[str, ...] = PROTOCOLS,
    stride: int = 256,
    windows: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Both protocols at every length."""
    _checks.integer("seed", seed, 0)
    for name in protocols:
        _checks.choice("protocol", name, PROTOCOLS)
    _checks.integer("stride", stride, 1)
    if windows is not None:
        _checks.integer("windows", windows, 1)
    rows = []
    for length in lengths:
        _checks.integer("length", length, 2)
        _check_length(ids, length)
    for length in lengths:
        head = evaluated.describe(length, seed)
        for protocol in protocols:
            if protocol == "sliding":
                row = sliding(evaluated, ids, length, stride=stride, windows=windows)
            else:
                row = last_token(evaluated, ids, length, windows=windows or 64, seed=seed)
            row["valid"] = protocol == "last" or not head["leak"]["leaks"]
            rows.append({**head, **row})
    return {"task": "perplexity", "rows": rows}
