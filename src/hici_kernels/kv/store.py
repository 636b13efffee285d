"""KVStore: the KV history of a model with routed attention, for prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._dispatch import check_impl
from ..config import HGAConfig
from ..errors import ImplError
from ..ops.hga_attention.op import attention_forward
from ..ops.hga_route.api import budgets, check_config
from ..ops.hga_route.op import route_forward
from ..ops.hga_summaries.api import check_rope
from ..ops.hga_summaries.op import summaries_forward
from ..rope import Rope

TIERS = ("device", "host", "disk")


class _Layer:
    """Buffers of one layer, rows left-aligned: row b holds tokens [0, lengths[b]) and the summaries of their chunks."""

    def __init__(self, batch: int) -> None:
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        # next default RoPE position of every row, and the column every stored token stood in
        self.columns = torch.zeros(batch, dtype=torch.int64)
        self.column_of = torch.zeros(batch, 0, dtype=torch.int64)
        # keys, values and (routing="prefix") queries [B, capacity, heads, D]; chunk_keys, group_keys [B, chunks, ...]
        self.buffers: dict[str, Tensor] = {}


class KVStore:
    """Keys, values and summaries of ``batch`` rows in ``layers`` layers.

    Every call appends tokens and attends over the whole history (HGA, arXiv 2606.30709): the result is the last T rows
    of :func:`hga_attention` over all tokens so far, whatever the split into calls, with routing "strict" and "prefix";
    with "block" when calls end at block ends, because blocks start at the first query of a call. Summaries are formed
    once, when a chunk closes, from its stored keys: the same bits for any split.

    Rows are independent and may have different lengths; buffers grow by doubling. routing="prefix" also keeps the
    queries (Hq / Hkv times the bytes of the keys), so that any rewind restores the maxima of the open chunk.

    Args:
        config: :class:`HGAConfig`.
        rope: of the keys.
        layers, kv_heads, head_dim, batch: sizes.
        dtype: of q, k and v: float32, bfloat16, float16 or float64.
        device: where the history lives and q, k, v come from.
        tier: "device". This version does not serve "host" and "disk".
        device_bytes: cap on the bytes of all buffers, None = no cap. A call that would need more raises before it
            changes anything.
        host_bytes, path: of the tiers "host" and "disk"; must be None.

    Raises:
        TypeError, ValueError: naming the argument. ImplError: tier not served.
    """

    def __init__(
        self,
        config: HGAConfig,
        *,
        rope: Rope,
        layers: int,
        kv_heads: int,
        head_dim: int,
        batch: int = 1,
        dtype: torch.dtype,
        device: torch.device | str,
        tier: str = "device",
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        path: str | None = None,
    ) -> None:
        check_config(config)
        for name, value, low in (
            ("layers", layers, 1),
            ("kv_heads", kv_heads, 1),
            ("head_dim", head_dim, 1),
            ("batch", batch, 0),
        ):
            _checks.integer(name, value, low)
        check_rope(rope, head_dim)
        if dtype not in _checks.FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
        if not isinstance(device, (str, torch.device)):
            raise TypeError(f"device must be a torch.device or a str, got {type(device).__name__} {device!r}")
        _checks.choice("tier", tier, TIERS)
        if tier != "device":
            raise ImplError(f"tier={tier!r} is not served by this version, expected 'device'")
        if device_bytes is not None:
            _checks.integer("device_bytes", device_bytes, 0)
        for name, given in (("host_bytes", host_bytes), ("path", path)):
            if given is not None:
                raise ValueError(f"{name} must be None with tier='device', got {given!r}")
        self.config, self.rope, self.tier = config, rope, tier
        self.layers, self.kv_heads, self.head_dim, self.dtype = layers, kv_heads, head_dim, dtype
        # "cuda" names the current device: a tensor says which one that is
        self.device = torch.empty(0, device=device).device
        self.device_bytes = device_bytes
        self._batch = batch
        self._layers = [_Layer(batch) for _ in range(layers)]
        self._closed = False

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self._batch

    @property
    def lengths(self) -> Tensor:
        """int64 [B] on the CPU: tokens per row that every layer holds, masked ones not counted.

        While a step is on its way through the layers, those already passed hold more; after a step that failed,
        ``rewind(length)`` brings all layers back together.
        """
        return torch.stack([layer.lengths for layer in self._layers]).amin(0)

    def next_columns(self, layer: int) -> Tensor:
        """int64 [B] on the CPU: the column that follows what each row of a layer has been given, padding counted."""
        self._check_open()
        _checks.integer("layer", layer, 0, self.layers - 1)
        return self._layers[layer].columns.clone()

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_mask: Tensor | None = None,
        impl: str | None = None,
    ) -> Tensor:
        """Append T tokens to one layer and attend over its history.

        Args:
            layer: 0..layers-1.
            q: [B, T, Hq, D], roped; Hq the same in every call of a layer.
            k, v: [B, T, kv_heads, D], k roped.
            attention_mask: [B, T] over the appended tokens, nonzero = token. Masked ones are not stored and give 0. A
                mask on a device is read, which synchronises.
            impl: implementation of the operations, or None for the fastest that serves the call.

        Returns:
            [B, T, Hq, D] in q.dtype. Gradients reach q, k, v of this call; the history is constant. Deterministic.

        Raises:
            TypeError, ValueError: before any work, naming the argument; the store is unchanged then.
        """
        q, k, v = _checks.autocast(q, k, v)  # type: ignore[assignment]
        self._check_call(layer, q, k, v, attention_mask)
        impl = check_impl(impl)
        state = self._layers[layer]
        t = q.shape[1]
        mask = None if attention_mask is None else (attention_mask != 0).cpu()
        counts = torch.full_like(state.lengths, t) if mask is None else mask.sum(1)
        after = state.lengths + counts
        place = state.lengths[:, None] + (
            torch.arange(t).expand(self._batch, t) if mask is None else torch.where(mask, mask.cumsum(1) - 1, -1)
        )
        if mask is not None:
            place = torch.where(mask, place, -1)
        appended = {"k": k, "v": v} | ({"q": q} if self.config.routing == "prefix" else {})
        self._reserve(state, appended, int(after.max()) if self._batch else 0)
        # beyond ``lengths`` the buffers are scratch: until the commit below, nothing has happened
        for name, x in appended.items():
            self._write(state.buffers[name], x.detach(), state.lengths, place, mask)
        self._summarise(state, after, impl)
        out = self._attention(state, q, k, v, place, mask, after, impl)
        self._write(state.column_of, state.columns[:, None] + torch.arange(t), state.lengths, place, mask)
        state.lengths = after
        state.columns = state.columns + t
        return out

    def reset(self, row: int | None = None) -> None:
        """Forget one row, or all of them, in every layer; memory is kept for reuse.

        Raises:
            TypeError, ValueError: row out of range; nothing has changed then.
        """
        for b in self._rows(row):
            for layer in self._layers:
                layer.lengths[b] = 0
                layer.columns[b] = 0

    def rewind(self, length: int, row: int | None = None) -> None:
        """Keep the first ``length`` tokens of one row, or of every row, in all layers; as if no later one had come.

        Chunks that reopen lose their summaries. The next default position follows the last token kept.

        Raises:
            TypeError, ValueError: length beyond what every layer holds; nothing has changed then.
        """
        _checks.integer("length", length, 0)
        rows = self._rows(row)
        held = self.lengths
        for b in rows:
            if length > int(held[b]):
                raise ValueError(f"length must be at most the {int(held[b])} tokens of row {b}, got {length}")
        for layer in self._layers:
            for b in rows:
                if length < int(layer.lengths[b]):
                    layer.lengths[b] = length
                    layer.columns[b] = layer.column_of[b, length - 1] + 1 if length else 0

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was (beam search); the batch becomes len(rows).

        Raises:
            TypeError, ValueError: an index out of range, or device_bytes exceeded; nothing has changed then.
        """
        self._check_open()
        chosen = _checks.row_indices("rows", rows, self._batch)
        if self._batch:
            self._check_cap(self._resident() * len(chosen) // self._batch, "reorder")
        index = torch.tensor(chosen, dtype=torch.int64)
        there = index.to(self.device)
        for layer in self._layers:
            layer.lengths = layer.lengths[index]
            layer.columns = layer.columns[index]
            layer.column_of = layer.column_of[index]
            for name in layer.buffers:
                layer.buffers[name] = layer.buffers[name].index_select(0, there)
        self._batch = len(chosen)

    def stats(self) -> dict[str, Any]:
        """Counters since construction.

        hits, misses: chunk reads served by the fast tier or not (0 for "device", where everything is resident);
        bytes_moved, gb_per_s, stall_s: traffic between tiers, its rate and the seconds waited for it (0 likewise);
        resident_bytes: bytes of all buffers, by tier, reserve for growth included.
        """
        return {
            "hits": 0,
            "misses": 0,
            "bytes_moved": 0,
            "gb_per_s": 0.0,
            "stall_s": 0.0,
            "resident_bytes": {"device": self._resident(), "host": 0, "disk": 0},
        }

    def close(self) -> None:
        """Free all memory. Closing twice is fine; any other call on a closed store raises ValueError."""
        self._closed = True
        self._layers = [_Layer(self._batch) for _ in range(self.layers)]

    def __enter__(self) -> KVStore:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this KVStore is closed, expected an open one")

    def _check_call(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> None:
        self._check_open()
        _checks.integer("layer", layer, 0, self.layers - 1)
        _checks.qkv(q, k, v)
        b, t, hq, _ = q.shape
        if b != self._batch:
            raise ValueError(f"q has batch {b}, expected the {self._batch} rows of the store")
        if q.dtype != self.dtype:
            raise TypeError(f"q has dtype {q.dtype}, expected {self.dtype} like the store")
        if q.device != self.device:
            raise ValueError(f"q is on {q.device}, expected {self.device} like the store")
        _checks.shape("k", k, (b, t, self.kv_heads, self.head_dim), "B, T, kv_heads, D of the store")
        kept = self._layers[layer].buffers.get("q")
        if kept is not None and kept.shape[2] != hq:
            raise ValueError(f"q has {hq} heads, expected {kept.shape[2]} as in earlier calls of layer {layer}")
        if attention_mask is not None:
            _checks.token_mask("attention_mask", attention_mask, b, t, q.device)

    def _rows(self, row: int | None) -> list[int]:
        self._check_open()
        if row is None:
            return list(range(self._batch))
        _checks.integer("row", row, 0, self._batch - 1)
        return [row]

    def _resident(self) -> int:
        return sum(x.nbytes for layer in self._layers for x in layer.buffers.values())

    def _check_cap(self, needed: int, what: str) -> None:
        if self.device_bytes is not None and needed > self.device_bytes:
            raise ValueError(f"device_bytes is {self.device_bytes}, but {what} needs {needed} bytes")

    def _reserve(self, state: _Layer, appended: dict[str, Tensor], tokens: int) -> None:
        """Make room for ``tokens`` tokens per row: doubled capacity, or exactly enough if the cap allows no more."""
        config, held = self.config, state.column_of.shape[1]
        if tokens <= held and "k" in state.buffers:
            return

        def shapes(capacity: int) -> dict[str, tuple[int, ...]]:
            chunks = capacity // config.chunk_size
            wanted = {name: (self._batch, capacity, *x.shape[2:]) for name, x in appended.items()}
            wanted["chunk_keys"] = (self._batch, chunks, self.kv_heads, self.head_dim)
            wanted["group_keys"] = (self._batch, chunks, config.groups_per_chunk, self.kv_heads, self.head_dim)
            return wanted

        def needed(capacity: int) -> int:
            size = sum(torch.Size(x).numel() for x in shapes(capacity).values())
            # old and new buffers are both there while one is copied into the other
            return self._resident() + size * self.dtype.itemsize

        capacity = max(tokens, 2 * held, config.chunk_size)
        if self.device_bytes is not None and needed(capacity) > self.device_bytes:
            capacity = tokens
            self._check_cap(needed(capacity), f"a history of {tokens} tokens")
        grown = {}
        for name, shape in shapes(capacity).items():
            grown[name] = torch.empty(shape, dtype=self.dtype, device=self.device)
            old = state.buffers.get(name)
            if old is not None:
                grown[name][:, : old.shape[1]] = old
        columns = torch.zeros(self._batch, capacity, dtype=torch.int64)
        columns[:, :held] = state.column_of
        state.buffers, state.column_of = grown, columns

    def _write(self, buffer: Tensor, x: Tensor, lengths: Tensor, place: Tensor, mask: Tensor | None) -> None:
        """buffer[b, place[b, t]] = x[b, t] for every token that is not masked."""
        if x.shape[0] == 0 or x.shape[1] == 0:
            return
        if mask is None and bool((lengths == lengths[0]).all()):
            start = int(lengths[0])
            buffer[:, start : start + x.shape[1]] = x
            return
        rows, columns = torch.nonzero(torch.ones_like(place, dtype=torch.bool) if mask is None else mask, as_tuple=True)
        at = place[rows, columns].to(x.device)
        rows, columns = rows.to(x.device), columns.to(x.device)
        buffer[rows, at] = x[rows, columns]

    def _summarise(self, state: _Layer, after: Tensor, impl: str) -> None:
        """Summaries of the chunks that the new tokens have closed."""
        c, g = self.config.chunk_size, self.config.group_size
        spans = list(
            zip((state.lengths // c).tolist(), torch.div(after, c, rounding_mode="floor").tolist(), strict=True)
        )
        together = len(set(spans)) == 1
        for b, (start, stop) in enumerate(spans[:1] if together else spans):
            if start < stop:
                rows = slice(None) if together else slice(b, b + 1)
                keys = state.buffers["k"][rows, start * c : stop * c]
                found = summaries_forward(keys, self.rope.inv_freq, None, c, g, impl)
                state.buffers["chunk_keys"][rows, start:stop], state.buffers["group_keys"][rows, start:stop] = found

    def _attention(
        self,
        state: _Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        place: Tensor,
        mask: Tensor | None,
        after: Tensor,
        impl: str,
    ) -> Tensor:
        config = self.config
        length = int(after.max()) if self._batch else 0
        chunks = length // config.chunk_size
        positions = place.to(self.device)
        chunk_keys, group_keys = state.buffers["chunk_keys"][:, :chunks], state.buffers["group_keys"][:, :chunks]
        queries, at, context = q.detach(), positions, 0
        if config.routing == "prefix" and self._batch:
            opened = state.lengths % config.chunk_size  # queries of the open chunk, from its start
            context = int(opened.max())
            column = (state.lengths - opened)[:, None] + torch.arange(context)
            there = torch.where(column < state.lengths[:, None], column, -1).to(self.device)
            rows = torch.arange(self._batch, device=self.device)[:, None]
            queries = torch.cat((state.buffers["q"][rows, there.clamp(min=0)], queries), 1)
            at = torch.cat((there, positions), 1)
        routes = route_forward(queries, chunk_keys, group_keys, at, context, *budgets(config), impl)
        keys, values = self._history(state, k, v, place, mask, length)
        out, _, _ = attention_forward(
            q,
            keys,
            values,
            self.rope.inv_freq,
            positions,
            None,
            routes,
            config.group_size,
            *budgets(config),
            self.head_dim**-0.5,
            impl,
        )
        return out

    def _history(
        self, state: _Layer, k: Tensor, v: Tensor, place: Tensor, mask: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, length, kv_heads, D]; those of this call with their gradient."""
        held = state.buffers["k"][:, :length], state.buffers["v"][:, :length]
        if not torch.is_grad_enabled():
            return held
        if place.shape[1] == 0 or not (k.requires_grad or v.requires_grad):
            # autograd would save a view of the buffer for q's gradient, and the next call writes into the buffer
            return held[0].clone(), held[1].clone()
        source = torch.full((self._batch, length), -1, dtype=torch.int64)
        columns = torch.arange(place.shape[1]).expand_as(place)
        self._write(source, columns, state.lengths, place, mask)
        source = source.to(self.device)
        current = (source >= 0)[:, :, None, None]
        index = source.clamp(min=0)[:, :, None, None]
        keys, values = (
            torch.where(current, x.gather(1, index.expand(-1, -1, *x.shape[2:])), old)
            for x, old in zip((k, v), held, strict=True)
        )
        return keys, values
