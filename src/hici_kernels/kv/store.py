"""KVStore: the KV history of a model with routed attention, for prefill, decode and segment-wise training."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._dispatch import check_impl
from .._inference import keeps
from ..config import HGAConfig
from ..errors import KVStoreError
from ..ops.hga_route.api import check_config
from ..ops.hga_summaries.api import check_rope
from ..rope import Rope
from . import copied, on_device, saved
from .device_bank import DeviceBank
from .disk import Disk
from .gather_bank import GatherBank
from .layer import LayerState
from .layout import Layout
from .meter import TIERS, Meter
from .options import DEFAULT_HOST_BYTES, bank_slots, check_fetch, check_options
from .pool import Pool
from .records import Records
from .routed import DECODE_QUERIES
from .step import Engine, Step, nothing
from .tier import Tier

DEFAULT_BANK_PAGES = 4096  # of an accelerator without device_bytes


class KVStore:
    """Keys, values and summaries of ``batch`` rows in ``layers`` layers.

    Every call appends tokens and attends over the whole history (HGA, arXiv 2606.30709): the result is the last T rows
    of :func:`hga_attention` over all tokens so far, whatever the split into calls, with routing "strict" and "prefix";
    with "block" when calls end at block ends, because blocks start at the first query of a call. Summaries are formed
    once, when a chunk closes, from its stored keys: the same bits for any split.

    On the device stay the summaries, the sinks, the local window and the active chunk. A chunk that leaves the window
    becomes a record of the tier, written once and never changed; a call brings together the groups its routes open, and
    nothing else. For the same sequence of calls on one device all tiers give the same bits.

    Rows are independent and may have different lengths. routing="prefix" also keeps the queries (Hq / Hkv times the
    bytes of the keys), so that any rewind restores the maxima of the open chunk; Hq is then the same in all layers.

    One store may be used from several threads (calls take turns), several stores side by side share nothing, and
    several processes may use one directory. docs/kv_store.md has the layout, guarantees and failures.

    Args:
        config: :class:`HGAConfig`.
        rope: of the keys.
        layers, kv_heads, head_dim, batch: sizes.
        dtype: of q, k and v: float32, bfloat16, float16 or float64.
        device: where summaries, sinks and window live and q, k, v come from.
        tier: where records live: "device"; "host" memory (pinned for an accelerator); "disk", a nameless file in
            ``path`` that disappears with the store, however the process ends. "disk" needs the native library.
        device_bytes: limit of all device buffers, scratch of a call and its gathered groups included (not the
            temporaries inside an operation); None = none. A call that would need more raises before it has changed
            anything; feeding fewer tokens a call needs less scratch.
        host_bytes: limit of host memory for tiers "host" (all records) and "disk" (the bank of pages used lately and
            the lists of records). None = none for "host", 1 GiB for "disk".
        path: directory of the tier "disk", which must exist.
        cold_dtype: None = records keep the bits of the tokens; torch.int8 = 8 bits and one scale per token, kv head and
            side, about half the bytes of bfloat16. Lossy, the same in every tier.
        bank_pages: pages (one chunk of one kv head, keys and values) of a bank on the device above tiers "host" and
            "disk"; least recently used pages leave. None = none on the CPU, where records are read in place, else what
            device_bytes leaves, at most 4096. A call that needs more is served past the bank.
        fetch: how pages come to the bank: "copy" = found and gathered by the host and copied; "gather" = a kernel of
            the accelerator reads them in pinned memory, with tier "host" from a list of misses that only the device
            knows, so that no decode step waits for the host (Triton; its speed is not yet measured). The same bits.
        queue_depth: transfers in flight of tier "disk".
        io: "auto" = "uring" (io_uring) where the kernel allows it, else "threads" (pread and pwrite).
        direct: pass the page cache by where the file system can (O_DIRECT), so that nothing is cached twice.
        prefetch: while a layer is attended, read the pages that the next layer used in the step before.

    Raises:
        TypeError, ValueError: naming the argument. ImplError: tier or fetch not served here. KVStoreError: ``path``
        takes no file.
    """

    @keeps
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
        path: str | os.PathLike[str] | None = None,
        cold_dtype: torch.dtype | None = None,
        bank_pages: int | None = None,
        fetch: str = "copy",
        queue_depth: int = 32,
        io: str = "auto",
        direct: bool = True,
        prefetch: bool = True,
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
        where = _checks.device("device", device)
        check_options(
            tier=tier,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            path=path,
            cold_dtype=cold_dtype,
            bank_pages=bank_pages,
            fetch=fetch,
            queue_depth=queue_depth,
            io=io,
            direct=direct,
            prefetch=prefetch,
        )
        check_fetch(fetch, where)
        self.config, self.rope, self.tier = config, rope, tier
        self.layers, self.kv_heads, self.head_dim, self.dtype = layers, kv_heads, head_dim, dtype
        self.device, self.device_bytes, self.host_bytes = where, device_bytes, host_bytes
        self.path = None if path is None else os.path.abspath(path)
        self.cold_dtype, self.bank_pages, self.fetch, self.prefetch = cold_dtype, bank_pages, fetch, prefetch
        self._io = {"depth": queue_depth, "backend": io, "direct": direct}
        self._meter = Meter(device_bytes, DEFAULT_HOST_BYTES if tier == "disk" and host_bytes is None else host_bytes)
        self._layers = [LayerState(i, batch, config, dtype, self._meter) for i in range(layers)]
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._closed = False
        self._segment: dict[int, Step] | None = None
        self._engine: Engine | None = None
        if config.routing != "prefix":
            self._build(0)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self._layers[0].batch

    @property
    def lengths(self) -> Tensor:
        """int64 [B] on the CPU: tokens per row that every layer holds, masked ones not counted.

        While a step is on its way through the layers, those already passed hold more; after a step that failed,
        ``rewind(length)`` brings all layers back together.
        """
        with self._lock:
            return torch.stack([layer.lengths for layer in self._layers]).amin(0)

    def layer_lengths(self, layer: int) -> Tensor:
        """int64 [B] on the CPU: tokens per row of one layer, masked ones not counted."""
        _checks.integer("layer", layer, 0, self.layers - 1)
        return self._layers[layer].lengths.clone()

    def next_columns(self, layer: int) -> Tensor:
        """int64 [B] on the CPU: the column that follows what each row of a layer has been given, padding counted."""
        self._check_open()
        _checks.integer("layer", layer, 0, self.layers - 1)
        following = [c.following for c in self._layers[layer].columns]
        return torch.tensor(following, dtype=torch.int64, device="cpu")

    @keeps
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
            TypeError, ValueError: naming the argument, a byte limit included. KVStoreError: a record cannot be read,
            verified or written; it names layer, chunk and file. The store is unchanged in every case.
        """
        q, k, v = _checks.autocast(q, k, v)  # type: ignore[assignment]
        # what another thread closes or reorders is looked at when it is done
        with self._lock:
            self._check_call(layer, q, k, v, attention_mask)
            impl = check_impl(impl)
            mask = None if attention_mask is None else (attention_mask != 0).cpu()
            engine = self._build(q.shape[2])
            engine.fetched = functools.partial(self._look_ahead, layer, q.shape[1])
            try:
                state = self._layers[layer]
                engine.rebuild_tail(state)
                graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
                if graph or self._segment is not None:
                    out, step = engine.run(state, q, k, v, mask, impl, apart=True)
                    if self._segment is not None:
                        self._segment[layer] = step
                    else:
                        engine.commit(state, step)
                else:
                    out = engine.run_all(state, q, k, v, mask, impl)
                if q.shape[1] > DECODE_QUERIES:
                    state.last_pages = None
            finally:
                engine.fetched = nothing  # which knows the store: it would live until a collection of cycles
        return out

    @contextlib.contextmanager
    def segment(self) -> Iterator[None]:
        """Training by segments: what is attended inside is appended when the block ends, and not before.

        ``with store.segment(): loss(model(tokens, cache=store)).backward()`` is one segment of truncated
        backpropagation: gradients reach the tokens of the segment through its own keys and values, everything before it
        is constant. Each layer is called once per segment, and as often again with the same tokens as gradient
        checkpointing likes: every call starts from the history before the segment, gives the same bits and is appended
        once. An exception inside leaves the store as it was before the segment. Parameter gradients of a sequence are
        the sums over its segments.

        Raises:
            ValueError: inside another segment. KVStoreError, ValueError (a byte limit): at the end, when the segment
            cannot be stored; layers then may differ by it, and ``rewind(length)`` brings them back together.
        """
        self._check_open()
        with self._lock:
            if self._segment is not None:
                raise ValueError("this KVStore is inside a segment already, expected one at a time")
            self._segment = {}
        try:
            yield
        except BaseException:
            self._segment = None
            raise
        self._append_segment()

    @keeps
    def _append_segment(self) -> None:
        with self._lock:
            pending, self._segment = self._segment, None
            self._check_open()
            for layer, step in (pending or {}).items():
                assert self._engine is not None
                self._engine.commit(self._layers[layer], step)

    @keeps
    def reset(self, row: int | None = None) -> None:
        """Forget one row, or all of them, in every layer; memory is kept for reuse.

        Raises:
            TypeError, ValueError: row out of range, or inside a segment; nothing has changed then.
        """
        with self._lock:
            for b in self._rows(row):
                for layer in self._layers:
                    self._cut(layer, b, 0)

    @keeps
    def rewind(self, length: int, row: int | None = None, *, layers: Iterable[int] | None = None) -> None:
        """Keep the first ``length`` tokens of one row, or of every row, in all layers; as if no later one had come.

        Chunks that reopen lose their summaries. The next default position follows the last token kept. Nothing is read
        here: the next call brings the window back.

        Args:
            layers: those that are rewound, where a model has called only some; None = all.

        Raises:
            TypeError, ValueError: length beyond what each of the layers holds, or inside a segment; nothing has changed
                then.
        """
        _checks.integer("length", length, 0)
        chosen = range(self.layers) if layers is None else list(layers)
        for i in chosen:
            _checks.integer("layers", i, 0, self.layers - 1)
        with self._lock:
            rows = self._rows(row)
            for b in rows:
                held = min((int(self._layers[i].lengths[b]) for i in chosen), default=length)
                if length > held:
                    raise ValueError(f"length must be at most the {held} tokens of row {b}, got {length}")
            for i in chosen:
                for b in rows:
                    self._cut(self._layers[i], b, length)

    @keeps
    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was (beam search); the batch becomes len(rows). Records are shared.

        Raises:
            TypeError, ValueError: an index out of range, a byte limit, or inside a segment; nothing has changed then.
        """
        with self._lock:
            self._check_open()
            self._check_no_segment()
            chosen = _checks.row_indices("rows", rows, self.batch)
            index = torch.tensor(chosen, dtype=torch.int64)
            lists = sum(layer.records[:1].nbytes * (len(chosen) - layer.batch) for layer in self._layers)
            self._meter.require("host", max(0, lists), f"reorder to {len(chosen)} rows")
            if self.batch:
                size = sum(layer.nbytes for layer in self._layers)
                largest = max((x.nbytes for layer in self._layers for x in layer.buffers.values()), default=0)
                extra = max(0, (size + largest) * len(chosen) // self.batch - size)
                self._meter.require("device", extra, f"reorder to {len(chosen)} rows")
            for layer in self._layers:
                old = layer.records
                layer.select(index, self.device)
                if self._engine is not None:
                    self._engine.records.share(layer.records[layer.records >= 0])
                    self._engine.forget(old[old >= 0])

    @keeps
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to a file that :meth:`load` opens again, a prompt that many requests share for example.

        The file becomes visible when it is complete and synchronised, and replaces an older one as a whole; after a
        crash at any time there is the old one or the new one.

        Raises:
            ValueError: no such directory, or inside a segment. KVStoreError: writing failed, or a record that is saved
            cannot be read. An older file is untouched then.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path must be a str or a path, got {type(path).__name__} {path!r}")
        with self._lock:
            self._check_open()
            self._check_no_segment()
            for layer in self._layers:
                if self._engine is not None:
                    self._engine.rebuild_tail(layer)
            saved.save(self, path)

    @classmethod
    @keeps
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str, **options: Any) -> KVStore:
        """A store that holds what :meth:`save` wrote, and goes on with the same bits.

        Args:
            path: of the saved file, which is read once and not needed afterwards.
            device: as in the constructor.
            options: tier, device_bytes, host_bytes, bank_pages, fetch, queue_depth, io, direct, prefetch of the
                constructor; ``directory`` is its ``path``. The tier need not be that of the store that was saved.

        Raises:
            TypeError, ValueError: an option or a byte limit. KVStoreError: the file is missing, incomplete or damaged;
            it names layer, chunk and file.
        """
        if "directory" in options:
            options["path"] = options.pop("directory")
        file = saved.Saved(path)
        with file.file:
            for name in options:
                if name in file.arguments:
                    raise ValueError(f"{name} is that of the saved store, expected no other")
            store = cls(device=device, **file.arguments, **options)
            try:
                file.restore(store)
            except BaseException:
                store.close()
                raise
        return store

    def stats(self) -> dict[str, Any]:
        """Counters since construction.

        hits, misses: pages that a call needed and found in the bank, or not (0 where everything is resident);
        bytes_moved: between the tiers; gb_per_s: their rate while something was on its way (0 where a device fetches by
        itself); stall_s: seconds that calls waited for reads; resident_bytes: bytes of all buffers by tier, reserve for
        growth included; peak_bytes: the most that were ever held, scratch of calls included. Tier "disk" adds
        bytes_read, bytes_written, reads, writes, retries, rejected (pages whose checksum was wrong), prefetched,
        backend and direct.
        """
        with self._lock:
            found: dict[str, Any] = {"hits": 0, "misses": 0, "bytes_moved": 0, "busy_s": 0.0, "stall_s": 0.0}
            if self._engine is not None and not self._closed:
                found |= self._engine.tier.counters()
                file = self._file
                if file is not None:
                    found |= {"backend": file.backend, "direct": file.direct}
            busy = found.pop("busy_s")
            found["gb_per_s"] = found["bytes_moved"] / busy / 1e9 if busy else 0.0
            found["resident_bytes"] = {tier: self._meter.held(tier) for tier in TIERS}
            found["peak_bytes"] = dict(self._meter.peak)
            return found

    @keeps
    def close(self) -> None:
        """Free all memory and disk space. Closing twice is fine.

        A closed store has ``lengths`` 0 and ``stats()`` with its peaks; any other call raises ValueError.
        """
        if os.getpid() != self._owner and self.tier == "disk":
            return  # a fork: the parent's
        with self._lock:
            batch = self.batch
            self._closed = True
            if self._engine is not None:
                self._engine.tier.close()
                self._engine = None
            self._meter.clear()
            self._layers = [LayerState(i, batch, self.config, self.dtype, self._meter) for i in range(self.layers)]

    @keeps
    def __deepcopy__(self, memo: dict[int, Any]) -> KVStore:
        """An independent store with the same history, arguments and limits, which goes on with the same bits; its
        counters begin at 0.

        Raises:
            TypeError: tier "disk". ValueError: inside a segment, closed, or a byte limit.
        """
        if self.tier == "disk":
            raise TypeError("a KVStore with tier='disk' cannot be copied: save() it and load() the file")
        with self._lock:
            self._check_open()
            self._check_no_segment()
            new = KVStore(
                self.config,
                rope=self.rope,
                layers=self.layers,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                batch=self.batch,
                dtype=self.dtype,
                device=self.device,
                tier=self.tier,
                device_bytes=self.device_bytes,
                host_bytes=self.host_bytes,
                cold_dtype=self.cold_dtype,
                bank_pages=self.bank_pages,
                prefetch=self.prefetch,
                fetch=self.fetch,
            )
            new._io = dict(self._io)
            copied.fill(new, self)
        memo[id(self)] = new
        return new

    def __copy__(self) -> KVStore:
        raise TypeError("copy.copy would share the history of a KVStore: copy.deepcopy makes one of its own")

    def __enter__(self) -> KVStore:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _file(self) -> Any:
        tier: Any = self._engine.tier if self._engine is not None else None
        return getattr(getattr(tier, "lower", tier), "file", None)

    def _build(self, query_heads: int) -> Engine:
        """Records and their tier; with routing="prefix" the number of query heads is known with the first call only."""
        if self._engine is not None:
            return self._engine
        query_heads = query_heads if self.config.routing == "prefix" else 0
        layout = Layout(
            self.config.chunk_size,
            self.config.group_size,
            self.kv_heads,
            query_heads,
            self.head_dim,
            self.dtype,
            self.cold_dtype,
        )
        records = Records(int.from_bytes(os.urandom(7), "little"), layout.pages)
        self._engine = Engine(
            self.config, self.rope, self.device, layout, records, self._make_tier(layout, records), self._meter
        )
        return self._engine

    def _make_tier(self, layout: Layout, records: Records) -> Tier:
        pinned = self.device.type == "cuda"
        if self.tier == "device":
            return Pool("device", self.device, layout, self._meter)
        lower: Tier
        slots = self._device_slots(layout)
        if self.tier == "host":
            pool = Pool("host", torch.device("cpu"), layout, self._meter, pinned=pinned)
            if self.fetch == "gather" and on_device.refusal(self.device, layout) is None:
                return GatherBank(pool, slots, self.device, layout, self._meter, self.layers)
            lower = pool
        else:
            assert self.path is not None
            left = self._meter.left("host")
            assert left is not None
            below = bank_slots(left, layout.stride)
            lower = Disk(self.path, below, layout, records, self._meter, pinned=pinned, cycle=self.layers, **self._io)  # type: ignore[arg-type]
        if slots == 0:
            return lower
        return DeviceBank(lower, slots, self.device, layout, self._meter, self.layers, self.fetch)

    def _device_slots(self, layout: Layout) -> int:
        if self.bank_pages is not None:
            return self.bank_pages
        if self.device.type == "cpu":
            return 0
        left = self._meter.left("device")
        # half of the limit: tables, window and scratch need the rest
        return DEFAULT_BANK_PAGES if left is None else min(DEFAULT_BANK_PAGES, left // 2 // layout.page_bytes)

    def _look_ahead(self, layer: int, queries: int) -> None:
        """Ask for what the next layer used in the step before; called when this layer has what it needs."""
        engine = self._engine
        assert engine is not None
        if not self.prefetch or engine.tier.resident or self.layers == 1 or queries > DECODE_QUERIES:
            return
        pages = self._layers[(layer + 1) % self.layers].last_pages
        if pages is not None:
            engine.tier.prefetch(pages[engine.records.alive(pages)])

    def _cut(self, layer: LayerState, row: int, length: int) -> None:
        layer.lengths[row] = length
        layer.columns[row].cut(length)
        if length == 0:
            held = layer.records[row][layer.records[row] >= 0]
            layer.records[row] = -1
            layer.base[row] = 0
            if self._engine is not None:
                self._engine.forget(held)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this KVStore is closed, expected an open one")
        if self.tier == "disk" and os.getpid() != self._owner:
            raise KVStoreError(
                f"this KVStore belongs to process {self._owner}, not to a fork of it: make one of your own",
                file=self.path,
            )

    def _check_no_segment(self) -> None:
        if self._segment is not None:
            raise ValueError("this KVStore is inside a segment, expected the call before or after it")

    def _check_call(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> None:
        self._check_open()
        _checks.integer("layer", layer, 0, self.layers - 1)
        _checks.qkv(q, k, v)
        b, t, hq, _ = q.shape
        if b != self.batch:
            raise ValueError(f"q has batch {b}, expected the {self.batch} rows of the store")
        if q.dtype != self.dtype:
            raise TypeError(f"q has dtype {q.dtype}, expected {self.dtype} like the store")
        if q.device != self.device:
            raise ValueError(f"q is on {q.device}, expected {self.device} like the store")
        _checks.shape("k", k, (b, t, self.kv_heads, self.head_dim), "B, T, kv_heads, D of the store")
        kept = self._engine.layout.query_heads if self._engine is not None else 0
        if kept and kept != hq:
            raise ValueError(f"q has {hq} heads, expected {kept} as in earlier calls of this store")
        if attention_mask is not None:
            _checks.token_mask("attention_mask", attention_mask, b, t, q.device)

    def _rows(self, row: int | None) -> list[int]:
        self._check_open()
        self._check_no_segment()
        if row is None:
            return list(range(self.batch))
        _checks.integer("row", row, 0, self.batch - 1)
        return [row]
