"""Plain sentences about the numbers of a run, each true whichever way the numbers fell."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .hga_part import ContextGain, Row
from .hici_part import Timing

__all__ = ["context_sentences", "hga_sentences", "hici_sentences"]


def _times(factor: float) -> str:
    return f"{factor:.1f}" if factor < 10 else f"{factor:.0f}"


def context_sentences(gains: Sequence[ContextGain], targets: int) -> list[str]:
    """Whether more context lowers the loss of the same bytes."""
    if len(gains) < 2:
        return []
    helps = all(b.loss < a.loss for a, b in itertools.pairwise(gains))
    verdict = "More context helps" if helps else "More context did not help at every step on this text"
    first, *others = gains
    path = ", ".join(f"{g.loss:.4f} with {g.context:,} ({g.gain:+.4f} ±{g.gain_error:.4f} gained)" for g in others)
    windows = "one window" if first.windows == 1 else f"{first.windows} windows"
    return [
        f"{verdict}: dense loss on the same {targets:,} bytes of {windows}, in nats per byte, is "
        f"{first.loss:.4f} with {first.context:,} bytes of context, {path}."
    ]


def hga_sentences(rows: Sequence[Row], served_by: str) -> list[str]:
    """What a newcomer sees in the table of HGA."""
    dense = sorted((r for r in rows if r.config is None), key=lambda r: r.context)
    found = []
    last = dense[-1]
    picking = [r for r in rows if r.context == last.context and r.config is not None and r.config.topk_groups]
    if picking:
        best = min(picking, key=lambda r: abs(r.density - 0.1))
        found.append(
            f"At {last.context:,} bytes, budget {best.attention!r} computes {100 * best.density:.1f} % of the pairs "
            f"(and {100 * best.scored:.1f} % more dot products to choose them); its loss differs from dense by "
            f"{best.gap:+.4f} ±{best.gap_error:.4f} nats per byte."
        )
        found.append(
            f"A decode step there touches {best.step / 1e6:.2f} MB of cached keys and values instead of "
            f"{last.step / 1e6:.2f} MB, {_times(last.step / best.step)} times less; the budget is fixed, so the "
            "longer the text the larger this factor."
        )
        control = next((r for r in rows if r.context == last.context and r.config and not r.config.topk_groups), None)
        if control is not None:
            same = min(picking, key=lambda r: abs(r.density - control.density))
            word = "better" if same.loss < control.loss else "not better"
            found.append(
                f"Picking is {word} here than a longer window of the same size: {same.attention!r} has a gap of "
                f"{same.gap:+.4f}, {control.attention!r} of {control.gap:+.4f}, both at {100 * same.density:.1f} % "
                "of the pairs."
            )
        quick = [r for r in picking if r.seconds < last.seconds]
        if quick:
            first = min(quick, key=lambda r: r.seconds)
            found.append(
                f"Time: {first.attention!r} reads the text in {first.seconds:.1f} s, dense in {last.seconds:.1f} s."
            )
        else:
            near = min(picking, key=lambda r: r.seconds)
            found.append(
                f"Time: fewer pairs are not fewer seconds yet. HGA is served by its {served_by!r} implementation here "
                f"({near.seconds:.1f} s at best, dense {last.seconds:.1f} s, by torch's fused kernel)."
            )
    return found


def hici_sentences(rows: Sequence[Timing]) -> list[str]:
    """Which side won, op by op."""
    found = []
    for r in rows:
        ratio = r.seconds / r.plain_seconds
        if ratio > 1.1:
            speed = f"plain PyTorch is {_times(ratio)} times faster than the {r.impl!r} implementation serving it"
        elif ratio < 1 / 1.1:
            speed = f"{_times(1 / ratio)} times faster than plain PyTorch (served by {r.impl!r})"
        else:
            speed = f"as fast as plain PyTorch (served by {r.impl!r})"
        memory = ""
        if r.memory and r.plain_memory:
            share = r.plain_memory / r.memory
            side = f"{_times(share)} times less" if share >= 1 else f"{_times(1 / share)} times more"
            memory = f", peak memory {side}" if max(share, 1 / share) > 1.1 else ", the same peak memory"
        found.append(f"{r.op}, {r.length:,} bytes: {speed}{memory}.")
    return found
