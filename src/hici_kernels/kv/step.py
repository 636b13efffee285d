"""One call on one layer: compute from what is committed, then commit. Until the commit nothing has happened."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from ..config import HGAConfig
from ..ops.hga_attention.op import attention_forward
from ..ops.hga_route.api import budgets
from ..ops.hga_route.op import route_forward
from ..ops.hga_summaries.op import summaries_forward
from ..ops.hga_summaries.supers import super_chunk_keys
from ..rope import Rope
from . import in_place, on_device, routed
from .layer import LayerState
from .layout import Layout
from .meter import Meter
from .on_device import upload
from .records import Records
from .tier import Finder, Tier

#: Tokens of a call that are computed and committed together when no gradient is asked for: bounds the scratch of a long
#: prefill. The same in every tier.
SLICE_TOKENS = 1024
#: Bytes of chunks that are encoded at once.
ENCODED_BYTES = 8 << 20


@dataclass
class Step:
    """What a commit needs: ``recent`` [B, R, heads, D] = tail and new tokens by name, from chunk ``base`` on."""

    recent: dict[str, Tensor]
    after: list[int]  # tokens per row
    mask: Tensor | None
    columns: int


class Engine:
    """The parts of a store that every layer uses."""

    def __init__(
        self,
        config: HGAConfig,
        rope: Rope,
        device: torch.device,
        layout: Layout,
        records: Records,
        tier: Tier,
        meter: Meter,
    ) -> None:
        self.config, self.rope, self.device, self.layout = config, rope, device, layout
        self.records, self.tier, self.meter = records, tier, meter
        self.finder = cast(Finder, tier) if tier.on_device else None
        # called when a layer's pages are at hand and its attention is still to come
        self.fetched: Callable[[], None] = nothing
        self.heads = {"k": layout.kv_heads, "v": layout.kv_heads}
        if config.routing == "prefix":
            self.heads["q"] = layout.query_heads

    def run_all(self, state: LayerState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, impl: str) -> Tensor:
        """Attend and commit, slice by slice; an exception on the way undoes the slices before it."""
        ends = self._slices(state, q.shape[1], mask)
        if len(ends) == 1:
            out, step = self.run(state, q, k, v, mask, impl, apart=False)
            self.commit(state, step)
            return out
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        size = sum(x.nbytes for n, x in state.buffers.items() if n.startswith(("sinks", "tail")))
        with self.meter.scratch("device", size, "undoing a long call"):
            before = state.snapshot()
            start = 0
            try:
                for end in ends:
                    c = slice(start, end)
                    part = None if mask is None else mask[:, c]
                    out[:, c], step = self.run(state, q[:, c], k[:, c], v[:, c], part, impl, apart=False)
                    self.commit(state, step)
                    start = end
            except BaseException:
                written = state.records
                state.restore(before)
                new = written[written >= 0]
                kept = torch.cat((state.records[state.records >= 0], new.new_zeros(0)))
                self.forget(new[~torch.isin(new, kept)])
                raise
        return out

    def run(
        self,
        state: LayerState,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        impl: str,
        *,
        apart: bool,
    ) -> tuple[Tensor, Step]:
        """Outputs of the appended tokens, and the step that would append them.

        apart: nothing that is returned or kept by autograd is a view of a buffer or the caller's own tensor: the step
        may be committed later.
        """
        c, t = self.config.chunk_size, q.shape[1]
        held, base = state.lengths.tolist(), state.base.tolist()
        counts = [t] * state.batch if mask is None else mask.sum(1).tolist()
        place = state.lengths[:, None] + (torch.arange(t) if mask is None else mask.cumsum(1) - 1)
        if mask is not None:
            place = torch.where(mask, place, -1)
        new = {"k": k, "v": v} | ({"q": q.detach()} if "q" in self.heads else {})
        after = [x + n for x, n in zip(held, counts, strict=True)]
        used = [x - first * c for x, first in zip(held, base, strict=True)]
        total = [x + n for x, n in zip(used, counts, strict=True)]
        recent, copied = self._recent(state, new, used, place, mask, max(total, default=0), fresh=apart)
        with self.meter.scratch("device", copied, f"a call of {t} tokens"):
            self._summarise(state, recent["k"], held, after, base, impl)
            routes = self._route(state, q, recent, place, max(after, default=0) // c, impl)
            kept = {n: x.detach().clone() if apart and x is new[n] else x.detach() for n, x in recent.items()}
            step = Step(kept, after, mask, t)
            if not apart and in_place.serves(self.config, self.layout, q, impl):
                out = self._attend_in_place(state, q, recent, place, routes)
            else:
                out = self._attend(state, q, recent, place, total, routes, impl)
        return out, step

    def commit(self, state: LayerState, step: Step) -> None:
        """Append the tokens of a step: chunks that leave the window become records.

        Raises:
            ValueError: a byte limit. KVStoreError: the tier. Nothing has changed then.
        """
        c, first = self.config.chunk_size, self.config.keep_first
        base = state.base.tolist()
        new_base = [self._base_of(length) for length in step.after]
        kept = [length - start * c for length, start in zip(step.after, new_base, strict=True)]
        most = max(new_base, default=0)
        for name, x in step.recent.items():
            like = tuple(x.shape[2:])
            if new_base:
                if most and first:
                    state.reserve(f"sinks.{name}", min(most, first) * c, like, self.device, first * c)
                state.reserve(f"tail.{name}", max(kept), like, self.device, self.tail_tokens)
        state.reserve_records(most)
        written: list[tuple[Tensor, Tensor, Tensor]] = []
        try:
            pairs = [
                (i, chunk)
                for i, (start, stop) in enumerate(zip(base, new_base, strict=True))
                for chunk in range(max(start, min(stop, first)), stop)
            ]
            at_once = max(1, ENCODED_BYTES // (self.layout.pages * self.layout.page_bytes))
            for i in range(0, len(pairs), at_once):
                row, chunk = torch.tensor(pairs[i : i + at_once], dtype=torch.int64).unbind(1)
                column = ((chunk - state.base[row]) * c)[:, None] + torch.arange(c)
                there, column = upload(row[:, None], self.device), upload(column, self.device)
                pages = self.layout.encode({n: x[there, column] for n, x in step.recent.items()})
                numbers = self.take(state, row, chunk)
                written.append((row, chunk, numbers))
                self.tier.write(numbers, pages)
            # all that takes memory, before the first change
            moves = self._moves(state, step, base, new_base, kept)
            columns = [c.copy() for c in state.columns]
            for i, held in enumerate(state.lengths.tolist()):
                columns[i].append(held, step.columns, None if step.mask is None else step.mask[i])
            lengths, first_chunks = (torch.tensor(x, dtype=torch.int64) for x in (step.after, new_base))
        except BaseException:
            for _, _, numbers in written:
                self.forget(numbers)
            raise
        for row, chunk, numbers in written:
            state.set_records(row, chunk, numbers)
        for there, x in moves:
            there.copy_(x)
        state.columns, state.lengths = columns, lengths
        if new_base != base:
            state.base = first_chunks

    def rebuild_tail(self, state: LayerState) -> None:
        """After a rewind: bring window and active chunk back from sinks and records."""
        wanted = [self._base_of(length) for length in state.lengths.tolist()]
        stale = [b for b, (new, old) in enumerate(zip(wanted, state.base.tolist(), strict=True)) if new < old]
        c = self.config.chunk_size
        for b in stale:
            start, length, base = wanted[b], int(state.lengths[b]), int(state.base[b])
            stop = min(base, -(-length // c))  # chunks [start, stop) come back
            stored = state.records[b, max(start, self.config.keep_first) : stop]
            parts: dict[str, list[Tensor]] = {n: [] for n in self.heads}
            for n, found in parts.items():
                sinks = min(stop, self.config.keep_first)
                if start < sinks:
                    found.append(state.buffers[f"sinks.{n}"][b, start * c : sinks * c].clone())
            if len(stored):
                pages = self.tier.pages(self.records.pages_of(stored).flatten()).to(self.device)
                back = self.layout.decode(pages.unflatten(0, (len(stored), -1)))
                for n, found in parts.items():
                    found.append(back[n].flatten(0, 1))
            back_again: dict[str, Tensor] = {}
            for n, found in parts.items():
                if length > base * c:
                    found.append(state.buffers[f"tail.{n}"][b, : length - base * c].clone())
                if found:
                    back_again[n] = torch.cat(found)[: length - start * c]
            # room for all before any is written: where the limit has none, the row is as it was
            for n, row in back_again.items():
                state.reserve(f"tail.{n}", len(row), tuple(row.shape[1:]), self.device, self.tail_tokens)
            for n, row in back_again.items():
                state.buffers[f"tail.{n}"][b, : len(row)] = row
            state.base[b] = start
            gone = state.records[b, start:].clone()
            state.records[b, start:] = -1
            self.forget(gone[gone >= 0])

    def take(self, state: LayerState, rows: Tensor, chunks: Tensor) -> Tensor:
        """New records [n]; raises ValueError where the limit leaves no room for their names."""
        self.meter.require("host", self.records.growth(len(rows)), "the list of records")
        numbers = self.records.take(state.number, rows, chunks)
        self.meter.set("host", "records list", self.records.nbytes)
        return numbers

    def forget(self, records: Tensor) -> None:
        """One owner less for every entry; what nobody owns leaves the tier."""
        gone = self.records.drop(records)
        if len(gone):
            self.tier.free(self.records.pages_of(gone).flatten())

    def _base_of(self, length: int) -> int:
        """First chunk of the tail of a row of ``length`` tokens."""
        n = length // self.config.chunk_size
        return min(n, max(self.config.keep_first, n - self.config.keep_last))

    @property
    def tail_tokens(self) -> int:
        """Capacity of a tail: window, active chunk, and as much again of new tokens, written in place."""
        return (self.config.keep_last + 2) * self.config.chunk_size

    def _slices(self, state: LayerState, t: int, mask: Tensor | None) -> list[int]:
        """Ends of the parts of a call; at chunk ends where all rows stand alike, so that blocks are not cut."""
        if t <= SLICE_TOKENS or state.batch == 0:
            return [t]
        alike = mask is None and bool((state.lengths == state.lengths[0]).all())
        if not alike:
            if self.config.routing == "block":
                return [t]
            return [*range(SLICE_TOKENS, t, SLICE_TOKENS), t]
        size = max(1, SLICE_TOKENS // self.config.chunk_size) * self.config.chunk_size
        start = size - int(state.lengths[0]) % self.config.chunk_size
        return [*range(start, t, size), t]

    def _recent(
        self,
        state: LayerState,
        new: dict[str, Tensor],
        used: list[int],
        place: Tensor,
        mask: Tensor | None,
        length: int,
        *,
        fresh: bool,
    ) -> tuple[dict[str, Tensor], int]:
        """Tail and new tokens [B, length, heads, D] by name, and the bytes of it that are no buffer of the layer.

        fresh: never a view of a buffer, which autograd would keep and the next call write into.
        """
        t = place.shape[1]
        before = max(used, default=0)
        alike = mask is None and all(x == before for x in used)
        if not alike:
            local = torch.where(place < 0, -1, place - (state.base * self.config.chunk_size)[:, None])
        if not fresh and length <= self.tail_tokens:
            for name, x in new.items():
                tail = state.reserve(f"tail.{name}", length, tuple(x.shape[2:]), self.device, self.tail_tokens)
                if t == 0 or len(used) == 0:
                    continue
                if alike:
                    tail[:, before : before + t] = x.detach()
                else:
                    rows, columns = (local >= 0).nonzero(as_tuple=True)
                    at = upload(local[rows, columns], self.device)
                    rows, columns = upload(rows, self.device), upload(columns, self.device)
                    tail[rows, at] = x.detach()[rows, columns]
            return {n: state.buffers[f"tail.{n}"][:, :length] for n in new}, 0
        found, copied = {}, 0
        for name, x in new.items():
            joined = torch.cat((state.buffers[f"tail.{name}"][:, :before], x), 1) if before else x
            if not alike:
                source = torch.arange(length).clamp(max=max(0, before - 1)).repeat(len(used), 1)
                rows, columns = (local >= 0).nonzero(as_tuple=True)
                source[rows, local[rows, columns]] = before + columns
                index = upload(source[:, :, None, None], self.device).expand(-1, -1, *x.shape[2:])
                joined = joined.gather(1, index)
            found[name] = joined
            copied += 0 if joined is x else joined.nbytes
        self.meter.require("device", copied, f"a call of {t} tokens")
        return found, copied

    def _summarise(
        self, state: LayerState, keys: Tensor, held: list[int], after: list[int], base: list[int], impl: str
    ) -> None:
        """Summaries of the chunks that the new tokens close; beyond what ``lengths`` says they are scratch."""
        c, g = self.config.chunk_size, self.config.group_size
        chunks = max(after, default=0) // c
        _, _, h, d = keys.shape
        state.reserve("chunk_keys", chunks, (h, d), self.device, None)
        state.reserve("group_keys", chunks, (self.config.groups_per_chunk, h, d), self.device, None)
        if self.config.super_chunk:
            state.reserve("super_keys", chunks // self.config.super_chunk, (h, d), self.device, None)
        spans = [(x // c, y // c, first) for x, y, first in zip(held, after, base, strict=True)]
        together = all(x == spans[0] for x in spans)
        for b, (start, stop, first) in enumerate(spans[:1] if together else spans):
            if start < stop:
                rows = slice(None) if together else slice(b, b + 1)
                part = keys.detach()[rows, (start - first) * c : (stop - first) * c]
                found = summaries_forward(part, self.rope.frequencies(self.device), None, c, g, impl)
                state.buffers["chunk_keys"][rows, start:stop], state.buffers["group_keys"][rows, start:stop] = found
                size = self.config.super_chunk
                if size and start // size < stop // size:
                    supers = slice(start // size, stop // size)
                    keys_of = state.buffers["chunk_keys"][rows, supers.start * size : supers.stop * size]
                    state.buffers["super_keys"][rows, supers] = super_chunk_keys(keys_of, size)

    def _route(
        self, state: LayerState, q: Tensor, recent: dict[str, Tensor], place: Tensor, chunks: int, impl: str
    ) -> Tensor:
        c = self.config.chunk_size
        queries, at, context = q.detach(), upload(place, self.device), 0
        if self.config.routing == "prefix" and state.batch:
            started = state.lengths % c  # queries of the open chunk, from its start
            context = int(started.max())
            column = (state.lengths - started)[:, None] + torch.arange(context)
            there = torch.where(column < state.lengths[:, None], column, -1)
            local = (column - (state.base * c)[:, None]).clamp(min=0, max=max(0, recent["q"].shape[1] - 1))
            rows = torch.arange(state.batch, device=self.device)[:, None]
            if context:
                queries = torch.cat((recent["q"][rows, upload(local, self.device)], queries), 1)
                at = torch.cat((upload(there, self.device), at), 1)
        keys = (state.buffers[n][:, :chunks] for n in ("chunk_keys", "group_keys"))
        size = self.config.super_chunk
        supers = state.buffers["super_keys"][:, : chunks // size] if size else None
        return route_forward(queries, *keys, at, context, *budgets(self.config), impl, supers)

    def _attend_in_place(
        self, state: LayerState, q: Tensor, recent: dict[str, Tensor], place: Tensor, routes: Tensor
    ) -> Tensor:
        copied = 0 if in_place.like_pages(recent, self.layout) else sum(recent[n].nbytes for n in "kv")
        with self.meter.scratch("device", copied, f"a call of {q.shape[1]} tokens"):
            near = {n: in_place.by_heads(recent[n]) for n in "kv"} if copied else recent
            found = in_place.lists(state, self.config, self.layout.pages, near, place, routes)
            out = self._attend_lists(found, q, place, routes)
        state.last_pages = found.number if state.batch == 1 else found.number.unique()
        return out

    def _attend_lists(self, found: in_place.Lists, q: Tensor, place: Tensor, routes: Tensor) -> Tensor:
        """All lists at once where the tier has their pages at hand together, else one after the other, in parts."""
        most = max(1, in_place.LIST_BYTES // self.layout.page_bytes)
        ends = found.offsets.tolist()
        if all(end - begin <= most for begin, end in pairwise(ends)):
            # rows may have pages in common
            pages, where = found.number.unique(return_inverse=True) if len(place) > 1 else (found.number, None)
            addresses = self.tier.located(pages) if len(pages) else pages
            if addresses is not None:
                self.fetched()
                there = addresses if where is None else addresses[where]
                return in_place.attend(found, there, self.config, self.layout, q, place, routes)[0]
        heads = len(ends[1:]) // len(place)
        group = q.shape[2] // heads
        out = torch.empty(q.shape, dtype=q.dtype)
        for i, (begin, end) in enumerate(pairwise(ends)):
            row, head = divmod(i, heads)
            here, own, joined = slice(row, row + 1), slice(head * group, (head + 1) * group), None
            for start in range(begin, end, most) or (begin,):
                part = in_place.only(found, start, min(start + most, end), row * heads, heads)
                wide = end - begin > most
                with self._located(part.number) as addresses:
                    piece = in_place.attend(
                        part, addresses, self.config, self.layout, q[here], place[here], routes[here], wide=wide
                    )
                joined = piece if joined is None else in_place.merge(joined, piece)
            assert joined is not None
            out[row, :, own] = joined[0][0, :, own]
        return out

    @contextlib.contextmanager
    def _located(self, pages: Tensor) -> Iterator[Tensor]:
        """Addresses of distinct pages; brought together where the tier cannot hold them all at once."""
        if not len(pages):
            yield pages
            return
        addresses = self.tier.located(pages)
        if addresses is not None:
            self.fetched()
            yield addresses
            return
        size = self.layout.page_bytes
        with self.meter.scratch("device", len(pages) * size, f"bringing together {len(pages)} pages"):
            together = self.tier.pages(pages)
            self.fetched()
            yield torch.arange(len(pages)) * size + together.data_ptr()

    def _attend(
        self,
        state: LayerState,
        q: Tensor,
        recent: dict[str, Tensor],
        place: Tensor,
        total: list[int],
        routes: Tensor,
        impl: str,
    ) -> Tensor:
        """Attention over rows brought together: gradients, 8 bits, small limits, accelerators.

        Over as many queries at once as the groups they open allow.
        """
        b, t, hq, width = routes.shape
        m, layout, first = self.config.groups_per_chunk, self.layout, self.config.keep_first
        most, each = max(1, routed.GATHERED_TOKENS // self.config.group_size), hq // layout.kv_heads * width
        decoding = t <= routed.DECODE_QUERIES and (not q.is_cpu or impl == "triton")
        cuts = routed.cuts(t, max(1, most // max(1, each))) if decoding else None
        attend = functools.partial(self._attend_row, state, recent=recent, total=total, impl=impl)
        outs: list[Tensor] = []
        if cuts is not None and self.finder is not None:
            below = upload(state.base * m, q.device)
            for rows in cuts:
                count = routed.room(state.base, first, m, (rows.stop - rows.start) * each)
                found = on_device.opened(routes[:, rows], below, layout.kv_heads, count)
                bring = functools.partial(self._find, state, found.group)
                held = b * layout.kv_heads * count
                outs.append(attend(q[:, rows], place[:, rows], routes[:, rows], found.slots, count, held, bring))
            state.last_pages = None
        else:
            ids = routes.cpu().long()
            pages = []
            for rows, opened in routed.tiles(ids, state.base, layout.kv_heads, m, most, cuts):
                page = state.records[opened.row, opened.group // m] * layout.pages + opened.head
                pages.append(page)
                count = -(-opened.most // m) * m
                if cuts is not None:
                    count = routed.room(state.base, first, m, (rows.stop - rows.start) * each)
                bring = functools.partial(self._fetch, opened, page, b, count)
                held = len(page) + b * layout.kv_heads * count if count else 0
                slots = upload(opened.slots, q.device)
                outs.append(attend(q[:, rows], place[:, rows], routes[:, rows], slots, count, held, bring))
            if pages:
                state.last_pages = torch.cat(pages).unique()
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1) if outs else torch.zeros_like(q)

    def _find(self, state: LayerState, group: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, count group_size, Hkv, D] of the groups [B, Hkv, count] that the device has found."""
        assert self.finder is not None
        m = self.config.groups_per_chunk
        page = on_device.pages_of(group, state.records_there(self.device), self.layout, m)
        at = self.finder.addresses(page.flatten()).view(page.shape)
        keys, values = on_device.groups_at(at, group % m, self.layout).flatten(3, 4).transpose(2, 3)
        return keys, values

    def _fetch(self, opened: routed.Opened, page: Tensor, batch: int, count: int) -> tuple[Tensor, Tensor]:
        """The same of groups that the host has found on pages ``page``."""
        groups = self.tier.groups(page, opened.group % self.config.groups_per_chunk).to(self.device)
        self.fetched()
        return routed.spread(opened, groups, batch, self.layout.kv_heads, count)

    def _attend_row(
        self,
        state: LayerState,
        q: Tensor,
        place: Tensor,
        routes: Tensor,
        slots: Tensor,
        count: int,
        held: int,
        bring: Callable[[], tuple[Tensor, Tensor]],
        *,
        recent: dict[str, Tensor],
        total: list[int],
        impl: str,
    ) -> Tensor:
        """Attention of q [B, t, Hq, D] over sinks, ``count`` groups a kv head that ``bring`` makes, and ``recent``.

        slots: places among those groups of what ``routes`` open; held: groups in memory while they are brought.
        """
        c, m, layout = self.config.chunk_size, self.config.groups_per_chunk, self.layout
        compact = routed.Compact.of(state.base, self.config.keep_first, count // m)
        joined = q.shape[0] * (int((compact.sinks + compact.between).max()) * c if q.shape[0] else 0)
        joined = joined + recent["k"].shape[0] * recent["k"].shape[1] if joined else 0
        token = layout.head_dim * layout.dtype.itemsize * 2
        size = joined * layout.kv_heads * token + held * layout.group_size * token
        with self.meter.scratch("device", size, f"bringing together what {q.shape[1]} queries open"):
            middle = bring() if count else (None, None)
            keys, values = (
                compact.join(state.buffers.get(f"sinks.{n}"), part, recent[n], total, c)
                for n, part in zip(("k", "v"), middle, strict=True)
            )
            out, _, _ = attention_forward(
                q,
                keys,
                values,
                self.rope.frequencies(self.device),
                upload(compact.positions(place, c), self.device),
                None,
                compact.routes(routes, slots, m),
                self.config.group_size,
                *budgets(self.config),
                layout.head_dim**-0.5,
                impl,
            )
        return out

    def _moves(
        self, state: LayerState, step: Step, old: list[int], new: list[int], kept: list[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """What is to be copied where, in this order, for sinks and tail after a commit."""
        moves: list[tuple[Tensor, Tensor]] = []
        c, first = self.config.chunk_size, self.config.keep_first
        spans = list(zip(old, new, kept, strict=True))
        together = all(x == spans[0] for x in spans)
        for name, x in step.recent.items():
            tail = state.buffers[f"tail.{name}"] if spans else x
            in_place = x.data_ptr() == tail.data_ptr()
            for b, (base, start, count) in enumerate(spans[:1] if together else spans):
                rows = slice(None) if together else slice(b, b + 1)
                if base < min(start, first):
                    end = min(start, first)
                    sinks = state.buffers[f"sinks.{name}"]
                    moves.append((sinks[rows, base * c : end * c], x[rows, : (end - base) * c]))
                skip = (start - base) * c
                if in_place and skip == 0:
                    continue
                left = x[rows, skip : skip + count]
                moves.append((tail[rows, :count], left.clone() if in_place else left))
        return moves


def nothing() -> None:
    pass
