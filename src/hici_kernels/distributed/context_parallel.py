"""Context parallel HiCI: every rank holds whole segments; a layer exchanges nothing but their slots."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .. import _checks, segments
from ..config import LEAK_FREE_MODES, HiCIConfig
from ..nn.hici_cache import HiCICache
from ..nn.prefix import build_prefix, uses_slots
from ..nn.slot_attention import SlotAttention
from ..ops.attention.api import attention
from .collectives import FromPrevious, GatherSegments, gather_flags, shift
from .plan import ShardPlan
from .traffic import Traffic

_HANDLES = "_context_parallel"


class ContextParallel:
    """Segments of one sequence over the ranks of a process group (gloo, NCCL or any other backend of torch).

    Formula, for the segments i a rank holds (all context modes, see :class:`HiCIConfig`):
        L_i = LocalConstructor(X_i)                                  its own tokens alone
        L   = all-gather of every rank's L_i                          backward: reduce-scatter, float32 at least
        out_i = attention of X_i over [prefix_i(L), recurrence, X_i]  its own tokens alone
    With recurrence_len a rank also gets the last tokens' keys and values from the rank before (point to point).
    Nothing else is sent in a layer: results and gradients are those of one process to rounding, and the traffic does
    not grow with segment_len. ``traffic`` counts it.

    Every rank computes the loss of its own tokens; the loss of the sequence is the *sum* over ranks, and so are the
    gradients of parameters: :meth:`sum_gradients`, or with FSDP2 :func:`fsdp_sums_gradients` (engines that average over
    ranks, such as DDP, need the local loss times the number of ranks). fully_shard() takes no scalar parameters, and
    the published expand_scale_param is one: pass ``ignored_params=scalar_parameters(model)`` and sum their gradients.

    Args:
        config: of the layers.
        group: the ranks that share a sequence; None = all.

    Not supported: caches (decode on one rank), token masks with cut="token" (a row's tokens would move between ranks),
    token masks with empty="skip" and recurrence (the previous segment with tokens may be on any rank), torch.compile
    through the collectives.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: no process group was initialised.
    """

    def __init__(self, config: HiCIConfig, group: ProcessGroup | None = None) -> None:
        if not isinstance(config, HiCIConfig):
            raise TypeError(f"config must be a HiCIConfig, got {type(config).__name__}")
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("context parallel needs torch.distributed.init_process_group() first")
        found = dist.group.WORLD if group is None else group
        assert found is not None
        self.config, self.group = config, found
        self.rank, self.ranks = dist.get_rank(found), dist.get_world_size(found)
        self.traffic = Traffic()
        self.plan: ShardPlan | None = None
        self._padded = False  # some row of the whole sequence has masked tokens

    def serves(self, config: HiCIConfig) -> bool:
        """Whether a layer's configuration is the one given here (apply_hici fills in a ``cut`` that was left open)."""
        return self.config.with_default_cut(config.cut) == config.with_default_cut()

    def split(
        self, length: int, cu_seqlens: Tensor | None = None, *, attention_mask: Tensor | None = None
    ) -> ShardPlan:
        """Plan the next sequence: S tokens, or packed documents by their offsets int32 [docs+1]. No communication.

        attention_mask: [B, S] of the whole sequence, the same on every rank, where a row has masked tokens. Ranks
        exchange masks where one of them has such a row, and must agree on it: models of transformers drop a mask that
        is all ones on a rank. Layers called with masks on every rank alike do without.

        Raises:
            TypeError, ValueError: naming the argument, on every rank alike.
        """
        if cu_seqlens is not None and self.config.segment_len is None:
            raise ValueError("cu_seqlens needs config.segment_len, got segment_len=None")
        _checks.integer("length", length, 0)
        if cu_seqlens is not None:
            _checks.offsets("cu_seqlens", cu_seqlens, length)
        offsets = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
        padded = False
        if attention_mask is not None:
            _checks.tensor("attention_mask", attention_mask, "B, S")
            if attention_mask.shape[1] != length:
                raise ValueError(f"attention_mask must have {length} columns, got {attention_mask.shape[1]}")
            padded = not bool(attention_mask.bool().all())
            if padded:
                _check_mask(self.config)
        self._padded = padded
        self.plan = ShardPlan(length, self.config.resolve_segment_len(length), self.ranks, offsets)
        return self.plan

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of ``x``, a view."""
        plan = self._planned()
        if x.shape[dim] != plan.length:
            raise ValueError(f"x must have {plan.length} tokens in dimension {dim}, got shape {tuple(x.shape)}")
        mine = plan.columns(self.rank)
        return x.narrow(dim, mine.start, mine.stop - mine.start)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [S of this rank]: positions of its tokens in their documents."""
        return self._planned().positions(self.rank).to(device)

    def inputs(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """Arguments of a causal language model of transformers for this rank's part of input_ids [B, S].

        Labels [B, S] (-100 = not scored) are shifted before they are cut, and counted over the whole sequence, so the
        sum over ranks of the losses is the loss of one process.
        """
        batch = input_ids.shape[0]
        found: dict[str, Any] = {
            "input_ids": self.shard(input_ids),
            "position_ids": self.positions(input_ids.device).expand(batch, -1),
            "use_cache": False,
        }
        if labels is not None:
            shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            found["labels"] = self.shard(labels)
            found["shift_labels"] = self.shard(shifted).contiguous()
            found["num_items_in_batch"] = (shifted != -100).sum()
        return found

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of replicated parameters over the ranks, in place; a missing one counts as zero."""
        for p in parameters:
            if p.requires_grad:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                dist.all_reduce(p.grad, group=self.group)
                factor = 2 * (self.ranks - 1) / self.ranks
                self.traffic.add("parameter gradients", int(factor * p.grad.numel() * p.grad.element_size()))

    def attend(
        self,
        layer: SlotAttention,
        hidden: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: HiCICache | None,
    ) -> Tensor:
        """Context [B, S_r, Hq, D] of this rank's tokens: hidden [B, S_r, H], roped q, k and plain v, mask [B, S_r]."""
        plan = self.check(layer, hidden, mask, cu_seqlens, cache)
        if mask is None and self._padded:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        config, own = layer.config, plan.segments(self.rank)
        count = own.stop - own.start
        offsets = plan.local_cu_seqlens(self.rank)
        cu = None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device=q.device)
        cu_segments = None
        if plan.cu_seqlens is not None:
            whole = torch.tensor(plan.cu_seqlens, dtype=torch.int32, device=q.device)
            cu_segments = segments.cu_segments(whole, plan.segment_len)
        valid = None
        if mask is not None and config.empty == "skip":
            valid = gather_flags(self._has_tokens(mask), self.group, plan.counts, self.traffic)
        global_k = global_v = local_k = local_v = prefix_mask = None
        slots_on = self._slots_on(plan)
        alone = plan.cu_seqlens is None and len(plan.spans) == 1 and config.context_mode in LEAK_FREE_MODES
        if uses_slots(config) and plan.spans and slots_on is not False and not alone:
            mine = layer.local_constructor(hidden, mask, plan.segment_len, cu, total_segments=count)
            local = GatherSegments.apply(mine, self.group, plan.counts, self.traffic)
            on = slots_on.to(q.device) if isinstance(slots_on, Tensor) else None
            prefix = build_prefix(
                config, local, layer.global_integrator, valid=valid, cu_segments=cu_segments, slots_on=on, own=own
            )
            global_k, global_v = layer.project_slots(prefix.global_slots)
            local_k, local_v = layer.project_slots(prefix.local_slots)
            prefix_mask = prefix.mask
        recurrence = min(config.recurrence_len, plan.segment_len)
        s = q.shape[1]
        if recurrence and self.ranks > 1:
            k, v, mask, before = self._recurrence(k, v, mask, recurrence)
            if before:
                # one more segment in front, of which only its last tokens can be seen, and that has no queries
                if local_k is not None and local_v is not None:
                    local_k, local_v = _blank_first(local_k), _blank_first(local_v)
                if global_k is not None and global_v is not None and global_k.ndim == 5:
                    global_k, global_v = _blank_first(global_k), _blank_first(global_v)
                if prefix_mask is not None:
                    prefix_mask = torch.nn.functional.pad(prefix_mask, (1, 0))
                if cu is not None:
                    q = torch.nn.functional.pad(q, (0, 0, 0, 0, before, 0))
                    cu = torch.cat((cu[:1], cu[1:] + before))
        out = attention(
            q,
            k,
            v,
            segment_len=plan.segment_len,
            recurrence_len=recurrence,
            global_k=global_k,
            global_v=global_v,
            local_k=local_k,
            local_v=local_v,
            prefix_mask=prefix_mask,
            attention_mask=mask,
            cu_seqlens=cu,
            impl=layer.impl,
        )
        return out[:, out.shape[1] - s :]

    def _planned(self) -> ShardPlan:
        if self.plan is None:
            raise ValueError("split(length) must be called before the first sequence and where its length changes")
        return self.plan

    def check(
        self,
        layer: SlotAttention,
        hidden: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: HiCICache | None,
    ) -> ShardPlan:
        """The plan, or an error that says why this call cannot be served."""
        plan = self._planned()
        if not self.serves(layer.config):
            raise ValueError("config of the layer must be that of ContextParallel")
        if cache is not None:
            raise ValueError("cache must be None with context parallel: pass use_cache=False, decode on one process")
        mine = plan.columns(self.rank)
        if hidden.shape[1] != mine.stop - mine.start:
            raise ValueError(
                f"hidden must hold the {mine.stop - mine.start} tokens of rank {self.rank}, got {hidden.shape[1]}"
            )
        if cu_seqlens is not None:
            pieces = tuple(x for x, y in zip(cu_seqlens.tolist(), [-1, *cu_seqlens.tolist()], strict=False) if x != y)
            expected = plan.local_cu_seqlens(self.rank)
            if expected is None or pieces != tuple(dict.fromkeys(expected)):
                raise ValueError(f"cu_seqlens must be given to split(); the pieces of rank {self.rank} are {expected}")
        if mask is not None:
            _check_mask(layer.config)
        return plan

    def _has_tokens(self, mask: Tensor) -> Tensor:
        """bool [B, n_r]: this rank's segments with at least one token."""
        plan = self._planned()
        start = plan.columns(self.rank).start
        own = plan.spans[plan.segments(self.rank)]
        if not own:
            return mask.new_zeros(mask.shape[0], 0)
        return torch.stack([mask[:, s.start - start : s.stop - start].any(1) for s in own], 1)

    def _slots_on(self, plan: ShardPlan) -> Tensor | bool:
        """Where slots act under single_segment="off": everywhere, nowhere, or bool [1, N]."""
        if self.config.single_segment == "on":
            return True
        if plan.cu_seqlens is None:
            return len(plan.spans) > 1
        sizes = [segments.count(b - a, plan.segment_len) for a, b in itertools.pairwise(plan.cu_seqlens)]
        return torch.tensor([[n > 1 for n in sizes for _ in range(n)]])

    def _recurrence(
        self, k: Tensor, v: Tensor, mask: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """k, v and mask with the tokens before this rank's first segment, and how many columns that added."""
        plan = self._planned()
        tail = torch.stack([_last(x, length) for x in (k, v)])
        front, k = FromPrevious.apply(tail, k, self.group, self.traffic)
        seen = None
        if mask is not None:
            sent = _last(mask, length).to(torch.uint8)
            seen = shift(sent, self.group, self.traffic, 1, "which tokens of the recurrence are masked") != 0
        if not plan.continues(self.rank):
            return k, v, mask, 0
        pad = plan.segment_len - length
        k, v = (
            torch.cat((x.new_zeros(x.shape[0], pad, *x.shape[2:]), f, x), 1) for x, f in ((k, front[0]), (v, front[1]))
        )
        if mask is not None and seen is not None:
            mask = torch.cat((torch.nn.functional.pad(seen, (pad, 0)), mask), 1)
        return k, v, mask, plan.segment_len


def scalar_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters without dimensions, which FSDP2 cannot shard: every integrator's expand_scale_param."""
    return {p for p in model.parameters() if p.ndim == 0}


def fsdp_sums_gradients(model: nn.Module) -> None:
    """Make every fully_shard()ed module of ``model`` sum gradients over its ranks instead of averaging them."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no reduction that scales
            module.set_force_sum_reduction_for_comms(True)


def _last(x: Tensor, length: int) -> Tensor:
    """The last ``length`` of dimension 1, zeros in front where there are fewer."""
    missing = max(0, length - x.shape[1])
    part = x[:, max(0, x.shape[1] - length) :]
    return torch.cat((x.new_zeros(x.shape[0], missing, *x.shape[2:]), part), 1) if missing else part


def _blank_first(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:, :1]), x), 1)


def _check_mask(config: HiCIConfig) -> None:
    if config.cut == "token":
        raise ValueError(
            "attention_mask with cut='token' would move tokens between ranks: use cut='index', or pack the "
            "documents (split(length, cu_seqlens))"
        )
    if config.empty == "skip" and config.recurrence_len:
        raise ValueError(
            "attention_mask with empty='skip' and recurrence_len is not supported with context parallel: the "
            "last segment with tokens may be on any rank; pack the documents instead"
        )


def apply_context_parallel(model: nn.Module, exchange: ContextParallel) -> nn.Module:
    """Let every HiCI layer of ``model`` work on its rank's segments, in place.

    ``model`` holds :class:`HiCIAttention` modules, or is a model of transformers changed by apply_hici (any engine may
    wrap it afterwards or before). Parameters, state dict and everything but attention stay as they are.

    Raises:
        ValueError: no HiCI layer, another config, or context parallel already.
    """
    found: list[Any] = []
    for module in model.modules():
        config = _config_of(module)
        if config is None:
            continue
        if not exchange.serves(config):
            raise ValueError("model has HiCI layers with another config than that of ContextParallel")
        if hasattr(module, _HANDLES):
            raise ValueError("model is context parallel already: call remove_context_parallel(model) first")
        found.append(module)
    if not found:
        raise ValueError("model has no HiCI layers: apply_hici(model, config) or use HiCIAttention modules")
    for module in found:
        handle = None
        if isinstance(module, SlotAttention):
            module.exchange = exchange
        else:
            # after the hook of apply_hici, whose call carries this layer's slots
            handle = module.register_forward_pre_hook(_Join(exchange), with_kwargs=True)
        setattr(module, _HANDLES, handle)
    return model


def remove_context_parallel(model: nn.Module) -> nn.Module:
    """Take back :func:`apply_context_parallel`."""
    for module in model.modules():
        if hasattr(module, _HANDLES):
            handle = getattr(module, _HANDLES)
            if handle is not None:
                handle.remove()
            else:
                vars(module).pop("exchange", None)
            delattr(module, _HANDLES)
    return model


class _Join:
    """Before an attention module of transformers runs: hand its slots their exchange."""

    def __init__(self, exchange: ContextParallel) -> None:
        self.exchange = exchange

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs["hici"].slots.exchange = self.exchange
        return args, kwargs


def _config_of(module: nn.Module) -> HiCIConfig | None:
    """The configuration of a HiCI layer, None for any other module."""
    if isinstance(module, SlotAttention):
        return module.config
    hook: Any
    for hook in module._forward_pre_hooks.values():
        # by name, so that transformers need not be installed
        if type(hook).__name__ == "HiCIHook":
            return hook.config
    return None
