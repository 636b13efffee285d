"""HGA over ranks: every rank routes, stores and attends its own kv heads; outputs are summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .. import _checks
from ..kv.store import KVStore
from ..nn.hga_attention import HGAAttention
from .collectives import SumBackward, SumForward
from .traffic import Traffic


@dataclass(frozen=True)
class HeadShard:
    """The heads of one rank: contiguous kv heads and the query heads that use them, uneven where they do not divide.

    Routes, summaries and stored records of a kv head depend on no other one, so a rank needs no one else's history.
    """

    num_heads: int
    num_kv_heads: int
    ranks: int
    rank: int

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "ranks"):
            _checks.integer(name, getattr(self, name), 1)
        _checks.integer("rank", self.rank, 0, self.ranks - 1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads {self.num_kv_heads}, got {self.num_heads}")
        if self.ranks > self.num_kv_heads:
            raise ValueError(f"ranks must be at most num_kv_heads {self.num_kv_heads}, got {self.ranks}")

    @property
    def kv_heads(self) -> slice:
        """kv heads of the rank, for [B, S, Hkv, D]."""
        n, p, r = self.num_kv_heads, self.ranks, self.rank
        return slice(n * r // p, n * (r + 1) // p)

    @property
    def heads(self) -> slice:
        """Query heads of the rank, for [B, T, Hq, D]."""
        group, kv = self.num_heads // self.num_kv_heads, self.kv_heads
        return slice(kv.start * group, kv.stop * group)


class ShardedHGAAttention(nn.Module):
    """An :class:`HGAAttention` over the ranks of a group, each with its own kv heads and its own :class:`KVStore`.

    Formula: out = sum over ranks of W_o[:, heads] hga_attention(heads of the rank). Every rank is given the whole
    hidden [B, S, H] and returns the whole output. One all-reduce of the output forward, one of the hidden states'
    gradient backward. Equal to one process to rounding (the sum has another order); routes are equal exactly as long as
    the inputs are.

    Gradients: those of q_proj, k_proj, v_proj and o_proj are the rank's rows and columns of the whole; q_norm and
    k_norm are replicated and hold the rank's part, to be summed over the group.

    Made by :func:`shard_hga`. Attributes: layer, the rank's HGAAttention; shard, its heads; traffic.
    """

    def __init__(self, layer: HGAAttention, shard: HeadShard, group: ProcessGroup) -> None:
        super().__init__()
        self.layer, self.shard, self.group, self.traffic = layer, shard, group, Traffic()

    def new_store(self, *, layers: int = 1, batch: int = 1, **options: object) -> KVStore:
        """A store of this rank's heads; options as of :class:`KVStore` (tier, limits, path)."""
        weight = self.layer.k_proj.weight
        return KVStore(
            self.layer.config,
            rope=self.layer.rope,
            layers=layers,
            kv_heads=self.layer.num_kv_heads,
            head_dim=self.layer.head_dim,
            batch=batch,
            dtype=weight.dtype,
            device=weight.device,
            **options,  # type: ignore[arg-type]
        )

    def forward(
        self,
        hidden: Tensor,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVStore | None = None,
    ) -> Tensor:
        """As :meth:`HGAAttention.forward`; all ranks call it with the same hidden [B, S, H]."""
        hidden = SumBackward.apply(hidden, self.group, self.traffic)
        part = self.layer(hidden, positions=positions, attention_mask=attention_mask, cache=cache)
        return SumForward.apply(part, self.group, self.traffic)


@torch.no_grad()
def shard_hga(layer: HGAAttention, group: ProcessGroup | None = None) -> ShardedHGAAttention:
    """This rank's share of ``layer``: a new module with copies of its heads' weights.

    Raises:
        TypeError: not an HGAAttention. ValueError: more ranks than kv heads. RuntimeError: no process group.
    """
    if not isinstance(layer, HGAAttention):
        raise TypeError(f"layer must be an HGAAttention, got {type(layer).__name__}")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("sharding by kv head needs torch.distributed.init_process_group() first")
    found = dist.group.WORLD if group is None else group
    assert found is not None
    shard = HeadShard(layer.num_heads, layer.num_kv_heads, dist.get_world_size(found), dist.get_rank(found))
    heads, kv, d = shard.heads, shard.kv_heads, layer.head_dim
    eps = None if layer.q_norm is None else layer.q_norm.eps
    weight = layer.q_proj.weight
    with torch.device(weight.device):
        part = HGAAttention(
            layer.hidden_size,
            heads.stop - heads.start,
            kv.stop - kv.start,
            d,
            layer.config,
            rope=layer.rope,
            qk_norm_eps=eps,
            layer_idx=layer.layer_idx,
            impl=layer.impl,
        ).to(weight.dtype)
    rows = {"q_proj": heads, "k_proj": kv, "v_proj": kv}
    state = {}
    for name, x in layer.state_dict().items():
        own = rows.get(name.split(".")[0])
        if own is not None:
            x = x[own.start * d : own.stop * d]
        elif name == "o_proj.weight":
            x = x[:, heads.start * d : heads.stop * d]
        state[name] = x
    part.load_state_dict(state)
    given = dict(layer.named_parameters())
    for name, p in part.named_parameters():
        p.requires_grad_(given[name].requires_grad)
    return ShardedHGAAttention(part, shard, found).train(layer.training)
