"""HGA on real text: what a budget saves, and what it costs in prediction quality."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import HGAConfig
from ..ops.hga_attention import HGAResult, hga_attention
from ..ops.hga_route import hga_route
from ..ops.hga_summaries import hga_summaries
from ..rope import Rope
from .counting import PairCount, StepBytes, count_pairs, dense_step_bytes, step_bytes
from .lm import ByteLM, dense_causal
from .text import Window

__all__ = [
    "BUDGETS",
    "FULL_LIMIT",
    "Budget",
    "ContextGain",
    "Pass",
    "Row",
    "context_gains",
    "full_budget_difference",
    "read_all_dense",
    "read_windows",
    "rope_of",
    "work_of",
]

#: ``advance(what is being read, work done since the last call)``.
Advance = Callable[[str, float], None]
# Time of a routed pass of the reference implementation over that of a dense one; sets the pace of the progress bar.
_ROUTED_WORK = 3.0
#: Largest allowed difference between dense attention and HGA with budgets that cover everything.
FULL_LIMIT = 1e-4


@dataclass(frozen=True)
class Budget:
    """A named configuration."""

    name: str
    config: HGAConfig

    @property
    def label(self) -> str:
        """Sinks + window chunks, picked chunks > opened groups."""
        c = self.config
        return f"{c.keep_first}+{c.keep_last} chunks, {c.topk_chunks}>{c.topk_groups}"


def _scaled(name: str, divisor: int) -> Budget:
    base = HGAConfig()
    return Budget(
        name,
        HGAConfig(
            keep_first=max(1, base.keep_first // divisor),
            keep_last=base.keep_last // divisor,
            topk_chunks=base.topk_chunks // divisor,
            topk_groups=base.topk_groups // divisor,
        ),
    )


#: The library default and fractions of it, because the default already covers three quarters of a 2K text; then one
#: that picks nothing and spends the tokens of "quarter" on a longer window, to show what the picking is worth.
BUDGETS = (
    _scaled("quarter", 4),
    _scaled("half", 2),
    _scaled("default", 1),
    Budget("window only", HGAConfig(keep_first=1, keep_last=4, topk_chunks=0, topk_groups=0)),
)


@dataclass
class Pass:
    """One reading of one window with one attention.

    Attributes:
        nll: [S - 1] nats of every byte after the first.
        seconds: wall time of the pass, all layers and the byte probabilities.
        pairs: summed over layers and heads; None for dense.
        step: bytes of the last decode step, summed over layers; None for dense.
        routes: per layer [1, S, Hq, Kg], kept on demand.
    """

    nll: Tensor
    seconds: float
    pairs: PairCount | None = None
    step: StepBytes | None = None
    routes: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class ContextGain:
    """Dense attention at one context: nats per byte on the target bytes, and how far below the shortest context's.

    Attributes:
        context: bytes in the window; windows: how many were read.
        loss: mean over the target bytes.
        gain, gain_error: loss at the shortest context minus this one's, and its standard error (paired).
    """

    context: int
    windows: int
    loss: float
    gain: float
    gain_error: float


@dataclass
class Row:
    """One line of the table: means over windows.

    Attributes:
        context: bytes in the window.
        attention: "dense" or the budget's name.
        config: None for dense.
        loss, loss_all: nats per byte over the target bytes, and over the whole window.
        gap, gap_all: the same minus dense.
        gap_error: standard error of ``gap``, from the paired differences of the target bytes.
        density: share of the causal pairs computed.
        scored: routing dot products as a share of the causal pairs.
        seconds: of one pass, median over windows.
        step: bytes of KV the last decode step reads, mean over windows.
        step_parts: the same by kind, empty for dense.
    """

    context: int
    attention: str
    config: HGAConfig | None
    windows: int
    loss: float
    loss_all: float
    gap: float
    gap_error: float
    gap_all: float
    density: float
    scored: float
    seconds: float
    step: float
    step_parts: dict[str, float]

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def rope_of(model: ByteLM) -> Rope:
    """The rotary frequencies of the model."""
    return Rope.from_theta(model.config.rope_theta, model.config.head_dim)


def read_dense(model: ByteLM, ids: Tensor) -> Pass:
    """Dense reading of ``ids [1, S]``."""
    start = time.perf_counter()
    nll = model.nll(ids)[0]
    return Pass(nll, time.perf_counter() - start)


def read_routed(model: ByteLM, ids: Tensor, config: HGAConfig) -> Pass:
    """Reading of ``ids [1, S]`` with HGA in every layer; the counts come from the routes that really ran."""
    rope = rope_of(model)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = hga_attention(q, k, v, config, rope=rope, return_routes=True)
        assert isinstance(result, HGAResult) and result.routes is not None
        kept.append((q[:, -1:], k, result.routes))
        return result.out

    start = time.perf_counter()
    nll = model.nll(ids, attend)[0]
    seconds = time.perf_counter() - start
    pairs, step = PairCount(0, 0, 0), StepBytes(0, 0, 0, 0)
    for q, k, routes in kept:
        pairs += count_pairs(routes, config)
        step += last_step(q, k, routes[:, -1:], config, rope)
    return Pass(nll, seconds, pairs, step, [routes for _, _, routes in kept])


def last_step(q: Tensor, k: Tensor, routes: Tensor, config: HGAConfig, rope: Rope) -> StepBytes:
    """Bytes that the decode step of the last token reads in one layer.

    Args:
        q: [1, 1, Hq, D] roped query of the last token.
        k: [1, S, Hkv, D] roped keys up to it.
        routes: [1, 1, Hq, Kg] what it opened.
    """
    length, kv_heads, head_dim = k.shape[1:]
    candidates = routes
    if config.topk_chunks and config.topk_groups:
        closed = (length - 1) // config.chunk_size * config.chunk_size
        chunk_keys, group_keys = hga_summaries(
            k[:, :closed], rope=rope, chunk_size=config.chunk_size, group_size=config.group_size
        )
        everything = dataclasses.replace(config, topk_groups=config.topk_chunks * config.groups_per_chunk)
        at = torch.full((1, 1), length - 1)
        candidates = hga_route(q, chunk_keys, group_keys, everything, positions=at)
    return step_bytes(
        routes,
        candidates,
        config,
        length=length,
        kv_heads=kv_heads,
        head_dim=head_dim,
        itemsize=k.element_size(),
    )


def full_budget_difference(model: ByteLM, ids: Tensor) -> tuple[float, float]:
    """(largest difference of any attention output, largest difference of any byte's nats) between dense and HGA
    whose budgets cover every chunk, over all layers, for ``ids [1, S]``."""
    base = HGAConfig()
    chunks = -(-ids.shape[1] // base.chunk_size)
    config = dataclasses.replace(base, topk_chunks=chunks, topk_groups=chunks * base.groups_per_chunk)
    rope = rope_of(model)
    worst = 0.0

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal worst
        out = hga_attention(q, k, v, config, rope=rope)
        worst = max(worst, float((out - dense_causal(layer, q, k, v)).abs().max()))
        return out

    loss = float((model.nll(ids, attend) - model.nll(ids)).abs().max())
    return worst, loss


def _row(
    model: ByteLM,
    context: int,
    name: str,
    config: HGAConfig | None,
    targets: int,
    got: Sequence[Pass],
    dense: list[Pass],
) -> Row:
    difference = torch.stack([p.nll[-targets:] - d.nll[-targets:] for p, d in zip(got, dense, strict=True)]).double()
    whole = torch.stack([p.nll - d.nll for p, d in zip(got, dense, strict=True)]).double()
    cfg = model.config
    itemsize = next(model.parameters()).element_size()
    full = cfg.num_hidden_layers * dense_step_bytes(
        length=context, kv_heads=cfg.num_key_value_heads, head_dim=cfg.head_dim, itemsize=itemsize
    )
    steps = [p.step for p in got if p.step is not None]
    pairs = sum((p.pairs for p in got if p.pairs is not None), PairCount(0, 0, 0))
    seconds = sorted(p.seconds for p in got)
    return Row(
        context=context,
        attention=name,
        config=config,
        windows=len(got),
        loss=float(torch.stack([p.nll[-targets:] for p in got]).double().mean()),
        loss_all=float(torch.stack([p.nll for p in got]).double().mean()),
        gap=float(difference.mean()),
        gap_error=float(difference.std() / difference.numel() ** 0.5),
        gap_all=float(whole.mean()),
        density=pairs.density if steps else 1.0,
        scored=pairs.scored / pairs.causal if steps else 0.0,
        seconds=seconds[len(seconds) // 2],
        step=sum(s.total for s in steps) / len(steps) if steps else float(full),
        step_parts={
            f.name: sum(getattr(s, f.name) for s in steps) / len(steps) for f in dataclasses.fields(StepBytes) if steps
        },
    )


def work_of(texts: int, contexts: Sequence[int], budgets: int) -> float:
    """Rough work of reading everything, in units of one dense pass over 1024 bytes."""
    return texts * sum((n / 1024) ** 2 for n in contexts) * (1 + _ROUTED_WORK * budgets)


def read_all_dense(
    model: ByteLM, texts: Sequence[Window], contexts: Sequence[int], *, seconds: float, advance: Advance
) -> list[dict[int, Pass]]:
    """Dense passes by context, one dictionary a window.

    A context of n bytes is the last n bytes of the window, so the last bytes are the same ones whatever the context.

    Args:
        texts: windows of at least max(contexts) bytes.
        seconds: no window after the first is begun that would, judged by the slowest so far, end later than this.
        advance: called with (what is about to be read, work done since the last call as in :func:`work_of`).
    """
    found: list[dict[int, Pass]] = []
    clock = _Clock(seconds)
    for window in texts:
        if found and not clock.fits_another():
            break
        found.append({})
        for n in contexts:
            advance(f"{window.source}, {n:,} bytes, dense", 0.0)
            found[-1][n] = read_dense(model, window.ids[:, -n:])
            advance(f"{window.source}, {n:,} bytes, dense", (n / 1024) ** 2)
        clock.lap()
    return found


def context_gains(dense: Sequence[dict[int, Pass]], targets: int) -> list[ContextGain]:
    """What every context gains over the shortest on the same ``targets`` bytes at the end of every window."""
    tails = {n: torch.stack([passes[n].nll[-targets:] for passes in dense]).double() for n in dense[0]}
    shortest = tails[min(tails)]
    found = []
    for n, tail in sorted(tails.items()):
        gain = shortest - tail
        error = float(gain.std() / gain.numel() ** 0.5)
        found.append(ContextGain(n, len(dense), float(tail.mean()), float(gain.mean()), error))
    return found


def read_windows(
    model: ByteLM,
    texts: Sequence[Window],
    dense: Sequence[dict[int, Pass]],
    budgets: Sequence[Budget],
    *,
    targets: int,
    seconds: float,
    advance: Advance,
    keep: tuple[int, str] | None = None,
) -> tuple[list[Row], list[Tensor]]:
    """Read the windows with every budget, at the contexts of ``dense``.

    Every row is over the same windows: more than one only if all of them can be read in time. If not even the first
    can, its contexts and budgets are read in their order as far as the time goes.

    Args:
        texts: the windows.
        dense: what :func:`read_all_dense` found of as many of them as it read.
        budgets: what to read with.
        targets: bytes at the end of the window whose loss is compared.
        seconds: no budget is begun later than this, and no further window that would, judged by the slowest so far,
            end later.
        advance: as for :func:`read_all_dense`.
        keep: (context, budget name) whose routes of the first window are returned.

    Returns:
        Rows in the order of the table, and the kept routes per layer [1, S, Hq, Kg] (empty if none are).
    """
    contexts = list(dense[0])
    got: dict[tuple[int, str], list[Pass]] = {}
    kept: list[Tensor] = []
    clock = _Clock(seconds)
    read = 0
    for window, _ in zip(texts, dense, strict=False):
        if read and not clock.fits_another():
            break
        for n in contexts:
            for budget in budgets:
                if read == 0 and clock.late():
                    continue
                advance(f"{window.source}, {n:,} bytes, {budget.name}", 0.0)
                reading = read_routed(model, window.ids[:, -n:], budget.config)
                advance(f"{window.source}, {n:,} bytes, {budget.name}", _ROUTED_WORK * (n / 1024) ** 2)
                if keep == (n, budget.name) and read == 0:
                    kept = reading.routes
                reading.routes = []
                got.setdefault((n, budget.name), []).append(reading)
        read += 1
        clock.lap()
    rows = []
    for n in contexts:
        base = [passes[n] for passes in dense[:read]]
        rows.append(_row(model, n, "dense", None, targets, base, base))
        for budget in budgets:
            if (n, budget.name) in got:
                rows.append(_row(model, n, budget.name, budget.config, targets, got[n, budget.name], base))
    return rows, kept


class _Clock:
    """Seconds since it was made, and whether another lap as long as the longest so far ends in time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began, self.longest = seconds, time.perf_counter(), 0.0
        self.last = self.began

    def lap(self) -> None:
        now = time.perf_counter()
        self.longest, self.last = max(self.longest, now - self.last), now

    def late(self) -> bool:
        return time.perf_counter() - self.began > self.seconds

    def fits_another(self) -> bool:
        return time.perf_counter() - self.began + self.longest <= self.seconds
