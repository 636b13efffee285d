"""apply_dca: dual chunk attention, positions that never leave the window a model was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from .._dispatch import check_impl
from ..config import HGAConfig
from ..ops.attention.api import attention
from ..ops.hga_attention.api import hga_attention
from ..ops.hga_route.api import check_config
from ..ops.merge_attention.api import merge_attention
from ..rope import Rope
from .host import Host, Note, check_attention, check_growing, check_servable, is_sliding, rope_of
from .masks import masked, register

NAME = "dca"


@dataclass(frozen=True)
class DCAConfig:
    """Chunks of dual chunk attention.

    Args:
        chunk_len: c, positions per chunk; keys are rotated at their position within the chunk.
        local_len: how far past a chunk's end distances to the previous chunk stay true. c + local_len is the largest
            position ever used and must lie inside the window the model was trained with.

    The published baselines, for a window of P: chunk_len = 3P/4 - w, local_len = w, with w = P/8 (Llama) or P/16.
    """

    chunk_len: int
    local_len: int

    def __post_init__(self) -> None:
        _checks.integer("chunk_len", self.chunk_len, 1)
        _checks.integer("local_len", self.local_len, 0)

    @property
    def ceiling(self) -> int:
        """Largest position a query is rotated at."""
        return self.chunk_len + self.local_len


class DCACall(NamedTuple):
    config: DCAConfig
    routing: HGAConfig | None
    rope: Rope
    positions: Tensor
    impl: str | None


class DCAHook:
    """Before an attention module runs: rotate at positions within chunks instead of those of the text."""

    def __init__(self, config: DCAConfig, routing: HGAConfig | None, rope: Rope, impl: str | None) -> None:
        self.config, self.routing, self.rope, self.impl = config, routing, rope, impl

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        check_attention(module, NAME)
        check_growing(module, kwargs.get("past_key_values"), "dual chunk attention")
        positions = kwargs.get("position_ids")
        if positions is None:
            raise ValueError("dual chunk attention needs position_ids, which this model does not hand to its layers")
        cos, sin = self.rope.cos_sin(positions % self.config.chunk_len, torch.float32)
        like = kwargs["position_embeddings"][0]
        embeddings = tuple(torch.cat((x, x), -1).to(like.dtype) for x in (cos, sin))
        call = DCACall(self.config, self.routing, self.rope, positions, self.impl)
        return args, {**kwargs, "position_embeddings": embeddings, "dca": call}


def apply_dca(
    model: nn.Module, config: DCAConfig, *, routing: HGAConfig | None = None, impl: str | None = None
) -> nn.Module:
    """Dual chunk attention (arXiv 2402.17463) for texts longer than the pretrained window, training-free, in place.

    Formula, c = chunk_len, for a query at position p and a key at position j:
        key     rotated at j mod c
        query   rotated at p mod c                             against its own chunk
                           min(p mod c + c, c + local_len)     against the chunk before
                           c + local_len                       against older chunks
    and one softmax over all keys, here as three parts (own chunk causal, the others whole) merged by their
    log-sum-exp. A text of one chunk gives the unmodified model's numbers. Caches are those of transformers that grow
    (a static one is refused), and hold keys rotated within their chunks: every way of ``generate()`` works.

    Args:
        model: Llama, Qwen3 or any other decoder of transformers with RoPE (rotate-half) whose layers all have full
            attention. A scaled RoPE is kept (apply_rope_scaling first to combine the two).
        config: :class:`DCAConfig`.
        routing: with it, attention is routed as by :func:`apply_hga`, in the same frames: summaries and their anchors
            rotate within chunks like the keys, and a query scores every candidate with the rotation its regime gives
            (the published code anchors at absolute positions and routes with one query). routing "strict" only, and
            chunk_size must divide chunk_len. The history stays with transformers' caches, and every call beyond the
            first chunk writes keys of three times the width for all of it: for evaluation, not for long decoding.

    Positions must grow by one from token to token within a row; padding left or right. Differentiable; needs
    position_ids in the layers, which transformers' own models pass.

    Raises:
        TypeError, ValueError: before anything has changed.
    """
    if not isinstance(config, DCAConfig):
        raise TypeError(f"config must be a DCAConfig, got {type(config).__name__}")
    check_impl(impl)
    if routing is not None:
        check_config(routing)
        if routing.routing != "strict":
            raise ValueError(f"routing must be strict with dual chunk attention, got {routing.routing!r}")
        if config.chunk_len % routing.chunk_size:
            raise ValueError(f"chunk_size {routing.chunk_size} must divide chunk_len {config.chunk_len}")
    host = Host.of(model)
    host.check_free("apply_dca")
    for attention_module in host.attentions:
        check_servable(attention_module, "dual chunk attention")
        if is_sliding(attention_module):
            raise ValueError("dual chunk attention needs full attention in every layer")
    rope = rope_of(host, host.attentions[0])
    for attention_module in host.attentions[1:]:
        if not torch.equal(rope_of(host, attention_module).inv_freq, rope.inv_freq):
            raise ValueError("dual chunk attention needs all layers to rotate alike")
    host.own_config(model)
    note = Note("apply_dca", host.set_attention(NAME))
    for attention_module in host.attentions:
        hook = DCAHook(config, routing, rope, impl)
        note.handles.append(attention_module.register_forward_pre_hook(hook, with_kwargs=True))
    host.notes.append(note)
    return model


def dca_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    dca: DCACall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [B, Hq, T, D], key and value [B, Hkv, S, D]; out [B, T, Hq, D]."""
    if dca is None:
        raise ValueError("attention implementation 'dca' needs apply_dca(model, config)")
    if dropout:
        raise ValueError(f"dual chunk attention does not support attention dropout, got {dropout}")
    attention_mask = masked(attention_mask)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("dual chunk attention supports causal attention with an attention_mask [batch, tokens] only")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    b, t = q.shape[:2]
    s = k.shape[1]
    # position of the first key column; positions grow by one, so one of them tells all
    first = dca.positions[:, -1].expand(b).cpu() - (s - 1)
    if attention_mask is None and bool((first == first[0]).all()):
        start = int(first[0])
        skip = max(0, -start)
        return _attend(q, k[:, skip:], v[:, skip:], start + skip, dca, scaling), None
    out = torch.zeros_like(q)
    for row in range(b):
        tokens = torch.ones(s, dtype=torch.bool) if attention_mask is None else attention_mask[row, :s].bool().cpu()
        at = tokens.nonzero()[:, 0]
        at = at[at >= max(0, -int(first[row]))]
        if len(at) == 0:
            continue
        begin, end = int(at[0]), int(at[-1]) + 1
        if end - begin != len(at):
            raise ValueError("dual chunk attention supports padding before and after a row's tokens, not between them")
        begin_q = max(0, begin - (s - t))
        if end <= s - t + begin_q:
            continue
        # a query's positions are stated; where padding precedes the cache's end they differ from the columns' distance
        start = int(dca.positions[min(row, len(dca.positions) - 1), end - 1 - (s - t)]) - (end - 1 - begin)
        rows = slice(row, row + 1)
        part = _attend(q[rows, begin_q : end - (s - t)], k[rows, begin:end], v[rows, begin:end], start, dca, scaling)
        out = out.index_put((torch.tensor([row]), torch.arange(begin_q, end - (s - t))), part[0])
    return out, None


def _attend(q: Tensor, k: Tensor, v: Tensor, start: int, call: DCACall, scale: float | None) -> Tensor:
    return (dual_chunk if call.routing is None else routed_dual_chunk)(q, k, v, start, call, scale)


def dual_chunk(q: Tensor, k: Tensor, v: Tensor, start: int, call: DCACall, scale: float | None) -> Tensor:
    """Context [B, T, Hq, D] of the last T of S tokens, rotated within their chunks; ``start``: the first position."""
    c, ceiling = call.config.chunk_len, call.config.ceiling
    s, t = k.shape[1], q.shape[1]
    turn = Rope(call.rope.inv_freq.to(q.device))  # a difference of angles: no factor
    parts = []
    for chunk in range((start + s - t) // c, (start + s - 1) // c + 1):
        # columns: of this chunk's first query, of its end, of the starts of this chunk and of the one before
        low, high = max(s - t, chunk * c - start), min(s, (chunk + 1) * c - start)
        own, before = max(0, chunk * c - start), max(0, (chunk - 1) * c - start)
        mine = q[:, low - (s - t) : high - (s - t)]
        inside = torch.arange(low + start - chunk * c, high + start - chunk * c, device=q.device)
        found = [attention(mine, k[:, own:high], v[:, own:high], scale=scale, return_lse=True, impl=call.impl)]
        if own > before:
            turned = turn.rotate(mine, (inside + c).clamp(max=ceiling) - inside)
            found.append(_whole(turned, k[:, before:own], v[:, before:own], scale, call.impl))
        if before > 0:
            turned = turn.rotate(mine, ceiling - inside)
            found.append(_whole(turned, k[:, :before], v[:, :before], scale, call.impl))
        outs, lses = zip(*found, strict=True)
        parts.append(outs[0] if len(found) == 1 else merge_attention(outs, lses, impl=call.impl)[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _whole(q: Tensor, k: Tensor, v: Tensor, scale: float | None, impl: str | None) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key; the operation takes at most as many queries as keys."""
    size = k.shape[1]
    found = [
        attention(part, k, v, causal=False, scale=scale, return_lse=True, impl=impl) for part in q.split(size, dim=1)
    ]
    if len(found) == 1:
        return found[0]
    return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 2)


def routed_dual_chunk(q: Tensor, k: Tensor, v: Tensor, start: int, call: DCACall, scale: float | None) -> Tensor:
    """As :func:`dual_chunk`, over what the routes of hga_attention show.

    The three regimes become three blocks of rotated dims: a query holds itself in each regime's rotation, a key holds
    itself in the block of its regime and 0 in the others. Scores, summaries and routes are then those of the regime,
    and one call of hga_attention serves all of them.
    """
    assert call.routing is not None
    if start:
        raise ValueError(f"routed dual chunk attention needs positions that begin at 0, got {start}")
    c, ceiling = call.config.chunk_len, call.config.ceiling
    s, t, d = k.shape[1], q.shape[1], q.shape[-1]
    inv_freq = call.rope.inv_freq.to(q.device)
    turn, wide = Rope(inv_freq), Rope(inv_freq.repeat_interleave(3))
    at = torch.arange(s, device=q.device)
    parts = []
    for chunk in range((s - t) // c, (s - 1) // c + 1):
        low, high = max(s - t, chunk * c), min(s, (chunk + 1) * c)
        mine, keys, values = q[:, low - (s - t) : high - (s - t)], k[:, :high], v[:, :high]
        if chunk == 0:
            found = hga_attention(mine, keys, values, call.routing, rope=turn, scale=scale, impl=call.impl)
        else:
            inside = at[low:high] - chunk * c
            turned = [
                mine,
                turn.rotate(mine, (inside + c).clamp(max=ceiling) - inside),
                turn.rotate(mine, ceiling - inside),
            ]
            regime = (chunk - torch.div(at[:high], c, rounding_mode="floor")).clamp(max=2)
            blocks = [torch.where((regime == r)[:, None, None], keys, 0.0) for r in range(3)]
            wide_q, wide_k = _blocks(turned, mine, len(inv_freq)), _blocks(blocks, keys, len(inv_freq))
            padded = torch.nn.functional.pad(values, (0, wide_k.shape[-1] - d))
            usual = d**-0.5 if scale is None else scale
            found = hga_attention(wide_q, wide_k, padded, call.routing, rope=wide, scale=usual, impl=call.impl)
        assert isinstance(found, Tensor)
        parts.append(found[..., :d])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _blocks(regimes: list[Tensor], plain: Tensor, half: int) -> Tensor:
    """Three regimes as one head in rotate-half order, then the dims that are not rotated.

    The three copies of a pair stand together, so that frequencies still fall from pair to pair: summaries rotate pairs
    from the first slow one on.
    """
    low = torch.stack([x[..., :half] for x in regimes], -1).flatten(-2)
    high = torch.stack([x[..., half : 2 * half] for x in regimes], -1).flatten(-2)
    return torch.cat((low, high, plain[..., 2 * half :]), -1)


register(NAME, dca_forward)
