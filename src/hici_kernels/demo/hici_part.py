"""HiCI's three ops on hidden states of the demo model: right, how fast, how much memory, beside plain PyTorch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch
from ..bench.machine import spread
from ..bench.memory import peak_bytes
from ..bench.run import alternate
from ..config import HiCIConfig
from ..errors import ImplError
from ..ops.attention import attention
from ..ops.global_stats import global_stats
from ..ops.local_slots import local_slots
from ..testing import tolerance
from .lm import ByteLM

__all__ = ["LAYER", "Inputs", "Timing", "compare", "make_inputs", "serving"]

#: Layer whose inputs are used: the middle one, where states are neither raw bytes nor ready answers.
LAYER = 2


@dataclass(frozen=True)
class Inputs:
    """What one HiCI layer computes with, for one text in N segments of ``segment_len`` bytes.

    Attributes:
        hidden: [1, S, H] hidden states of the model.
        slot_queries: [M, E]; k_weight, v_weight: [E, H], random.
        local: [1, N, M, H] slots of every segment, projected back to the hidden width.
        q, k, v: [1, S, Hq, D], [1, S, Hkv, D] roped, of the same layer.
        global_k, global_v: [1, N, K, Hkv, D]; local_k, local_v: [1, N, M, Hkv, D]: slots of the previous segment,
            so that nothing of the future is seen ("causal_shift").
        prefix_mask: bool [N], False for the first segment, which has no previous one.
    """

    segment_len: int
    num_heads: int
    hidden: Tensor
    slot_queries: Tensor
    k_weight: Tensor
    v_weight: Tensor
    local: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    global_k: Tensor
    global_v: Tensor
    local_k: Tensor
    local_v: Tensor
    prefix_mask: Tensor

    def double(self) -> Inputs:
        """The same numbers in float64."""
        changed = {
            f.name: getattr(self, f.name).double()
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor) and getattr(self, f.name).is_floating_point()
        }
        return dataclasses.replace(self, **changed)


@dataclass
class Timing:
    """One op on one size.

    Attributes:
        op: its name.
        length, segment_len: bytes of text, and per segment.
        impl: implementation that serves the call by itself.
        error: largest difference from the float64 reference of the op; plain_error: of plain PyTorch.
        allowed: max(2 plain_error, 2 eps max|reference|).
        seconds, plain_seconds: median; spread, plain_spread: largest minus smallest.
        memory, plain_memory: peak bytes above the inputs; None if not measurable.
    """

    op: str
    length: int
    segment_len: int
    impl: str
    error: float
    plain_error: float
    allowed: float
    seconds: float
    spread: float
    plain_seconds: float
    plain_spread: float
    memory: int | None
    plain_memory: int | None

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def make_inputs(model: ByteLM, ids: Tensor, segment_len: int, seed: int = 0) -> Inputs:
    """Hidden states of the model and random slot parameters.

    Args:
        ids: [1, S], S a multiple of segment_len.
        seed: of the parameters (slot queries, projections and the mixing of the five statistics into K slots).
    """
    config = HiCIConfig(segment_len=segment_len)
    hidden = model.hidden_states(ids, LAYER)
    q, k, v = model.qkv(ids, LAYER)
    width, slots = model.config.hidden_size, config.num_local_slots
    inner = config.bottleneck_dim or width
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=hidden.dtype) / columns**0.5

    slot_queries = normal(slots, inner) * inner**0.5
    k_weight, v_weight, back = normal(inner, width), normal(inner, width), normal(width, inner)
    mix = normal(config.global_slots, 5)
    local = F.linear(
        local_slots(hidden, slot_queries, k_weight, v_weight, num_heads=config.num_heads, segment_len=segment_len), back
    )
    top = torch.einsum("ks,bnsh->bnkh", mix, global_stats(local, causal=True))
    weights = dict(model.model.layers[LAYER].named_parameters())

    def shifted(x: Tensor, name: str) -> Tensor:
        y = F.linear(x, weights[f"self_attn.{name}.weight"]).unflatten(
            -1, (model.config.num_key_value_heads, model.config.head_dim)
        )
        return torch.cat((torch.zeros_like(y[:, :1]), y[:, :-1]), 1)

    prefix_mask = torch.ones(local.shape[1], dtype=torch.bool)
    prefix_mask[0] = False
    return Inputs(
        segment_len=segment_len,
        num_heads=config.num_heads,
        hidden=hidden,
        slot_queries=slot_queries,
        k_weight=k_weight,
        v_weight=v_weight,
        local=local,
        q=q,
        k=k,
        v=v,
        global_k=shifted(top, "k_proj"),
        global_v=shifted(top, "v_proj"),
        local_k=shifted(local, "k_proj"),
        local_v=shifted(local, "v_proj"),
        prefix_mask=prefix_mask,
    )


def our_slots(x: Inputs, impl: str | None = None) -> Tensor:
    return local_slots(
        x.hidden,
        x.slot_queries,
        x.k_weight,
        x.v_weight,
        num_heads=x.num_heads,
        segment_len=x.segment_len,
        impl=impl,
    )


def plain_slots(x: Inputs) -> Tensor:
    """Two projections of every token, then one SDPA call with the segments as its batch."""
    b, s, _ = x.hidden.shape
    n, (m, e) = s // x.segment_len, x.slot_queries.shape
    split = (b * n, x.segment_len, x.num_heads, e // x.num_heads)
    k = F.linear(x.hidden, x.k_weight).view(split).transpose(1, 2)
    v = F.linear(x.hidden, x.v_weight).view(split).transpose(1, 2)
    q = x.slot_queries.view(m, x.num_heads, -1).transpose(0, 1).expand(b * n, -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, m, e)


def our_stats(x: Inputs, impl: str | None = None) -> Tensor:
    return global_stats(x.local, causal=True, impl=impl)


def plain_stats(x: Inputs) -> Tensor:
    """torch's mean, amax, amin and std over all slots of segments 0..i, for every i."""
    found = []
    for i in range(x.local.shape[1]):
        rows = x.local[:, : i + 1].flatten(1, 2)
        mean = rows.mean(1)
        std = rows.std(1, correction=0).clamp_min(1e-6)
        found.append(torch.stack((mean, rows.amax(1), rows.amin(1), std, F.normalize(mean, dim=-1, eps=1e-6)), 1))
    return torch.stack(found, 1)


def our_attention(x: Inputs, impl: str | None = None) -> Tensor:
    return attention(
        x.q,
        x.k,
        x.v,
        segment_len=x.segment_len,
        global_k=x.global_k,
        global_v=x.global_v,
        local_k=x.local_k,
        local_v=x.local_v,
        prefix_mask=x.prefix_mask,
        impl=impl,
    )


def plain_attention(x: Inputs) -> Tensor:
    """Concatenate [global, local, tokens] of every segment, then one masked SDPA call, the segments as its batch."""
    b, s, hq, d = x.q.shape
    g = x.segment_len
    n = s // g

    def keys(global_: Tensor, local: Tensor, tokens: Tensor) -> Tensor:
        joined = torch.cat((global_, local, tokens.reshape(b, n, g, *tokens.shape[2:])), 2)
        return joined.flatten(0, 1).transpose(1, 2)

    k, v = keys(x.global_k, x.local_k, x.k), keys(x.global_v, x.local_v, x.v)
    slots = k.shape[2] - g
    seen = torch.ones(n, 1, g, slots + g, dtype=torch.bool)
    seen[..., slots:] = torch.ones(g, g, dtype=torch.bool).tril()
    seen[~x.prefix_mask, ..., :slots] = False
    q = x.q.reshape(b * n, g, hq, d).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.repeat(b, 1, 1, 1), enable_gqa=hq != k.shape[1])
    return out.transpose(1, 2).reshape(b, s, hq, d)


#: (op, ours with impl, plain PyTorch)
OPS: tuple[tuple[str, Callable[..., Tensor], Callable[[Inputs], Tensor]], ...] = (
    ("local_slots", our_slots, plain_slots),
    ("global_stats", our_stats, plain_stats),
    ("attention", our_attention, plain_attention),
)


def serving(op: str, call: Callable[[str], object]) -> str:
    """Name of the implementation that impl=None takes for ``call(impl)``: the first that does not decline."""
    for name in _dispatch.ORDER:
        if _dispatch.load(op, name)[0] is None:
            continue
        try:
            call(name)
        except ImplError:
            continue
        return name
    raise ImplError(f"no implementation of {op} serves this call")


def compare(x: Inputs, runs: int, advance: Callable[[str], None]) -> list[Timing]:
    """All three ops against their float64 reference and against plain PyTorch.

    Args:
        runs: timed rounds of both sides in turn; very short calls are repeated within a round.
        advance: called with the op that is about to be measured.
    """
    found = []
    exact = x.double()
    for op, ours, plain in OPS:
        advance(f"{op}, {x.hidden.shape[1]:,} bytes")
        impl = serving(op, functools.partial(ours, x))
        reference = ours(exact, "reference")
        ours_found, plain_found = ours(x), plain(x)
        error, plain_error = tolerance.error(reference, ours_found), tolerance.error(reference, plain_found)
        allowed = tolerance.budget(reference, plain_found, x.hidden.dtype)
        del reference, ours_found, plain_found
        calls: dict[str, Callable[[], object]] = {
            "ours": functools.partial(ours, x),
            "plain": functools.partial(plain, x),
        }
        times = {side: spread(taken) for side, taken in alternate(calls, runs).items()}
        found.append(
            Timing(
                op=op,
                length=x.hidden.shape[1],
                segment_len=x.segment_len,
                impl=impl,
                error=error,
                plain_error=plain_error,
                allowed=allowed,
                seconds=times["ours"]["median_s"],
                spread=times["ours"]["slowest_s"] - times["ours"]["fastest_s"],
                plain_seconds=times["plain"]["median_s"],
                plain_spread=times["plain"]["slowest_s"] - times["plain"]["fastest_s"],
                memory=peak_bytes(calls["ours"]),
                plain_memory=peak_bytes(calls["plain"]),
            )
        )
    return found
