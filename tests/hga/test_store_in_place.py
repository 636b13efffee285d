"""Calls of few queries attend over the history where it lies; copies of stores."""

from __future__ import annotations

import copy

import pytest
import torch
from hga_cases import close, feed, full, small, store, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from hici_kernels import HGAConfig, KVStore, _native
from hici_kernels.kv import in_place
from hici_kernels.kv import step as step_module

needs_native = pytest.mark.skipif(_native.status() is not None, reason="pages are attended by the native library")
NEAR = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def decode(target: KVStore, q, k, v, first: int, step: int) -> torch.Tensor:
    return feed(target, q, k, v, [*range(first, k.shape[1], step)])


@needs_native
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("step", [1, 3, 16])
@pytest.mark.parametrize("routing", ["strict", "prefix"])
def test_decode_in_place_is_attention_over_the_whole(dtype, step: int, routing: str, monkeypatch) -> None:
    """Routes in float64 would differ from those of the dtype: attended are the values the store got, routed alike."""
    called = []
    plain = in_place.attend_pages
    monkeypatch.setattr(in_place, "attend_pages", lambda *a, **k: called.append(1) or plain(*a, **k))
    config = small(routing=routing, topk_chunks=3, topk_groups=5)
    q, k, v = tensors(150, b=2, hq=8, d=32, seed=step, dtype=dtype)
    got = decode(store(config, k), q, k, v, 20, step)
    assert len(called) == 1 + len(range(20, 150, step))
    close(got, full(q, k, v, config).out, NEAR[dtype])


@needs_native
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 20),
    w=st.integers(0, 3),
    f=st.integers(0, 3),
    kc=st.integers(0, 5),
    kg=st.integers(0, 20),
    share=st.sampled_from(["query", "kv"]),
    routing=st.sampled_from(["strict", "prefix", "block"]),
    supers=st.sampled_from([0, 2]),
    r=st.sampled_from([1, 2, 4]),
    steps=st.lists(st.one_of(st.integers(1, 16), st.integers(17, 170)), min_size=1, max_size=9),
)
def test_in_place_equals_brought_together(seed, w, f, kc, kg, share, routing, supers, r, steps) -> None:
    """Both ways over the same calls of ragged rows, masked tokens among them and chunks that end on the way."""
    supers = supers if routing == "strict" else 0
    more = {"super_chunk": supers, "topk_supers": 2} if supers else {}
    config = small(keep_first=f, keep_last=w, topk_chunks=kc, topk_groups=kg, share=share, routing=routing, **more)
    length = 60 + sum(steps)
    q, k, v = tensors(length, b=3, hq=2 * r, seed=seed, dtype=torch.float32)
    mask = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) < 0.8
    mask[:, :3] = True
    here, there = store(config, k), store(config, k)
    start, plain = 0, in_place.serves
    for t in [60, *steps]:
        c = slice(start, start + t)
        part = {"attention_mask": mask[:, c]} if seed % 2 else {}
        got = here.attend(0, q[:, c], k[:, c], v[:, c], **part)
        in_place.serves = lambda *_: False
        try:
            want = there.attend(0, q[:, c], k[:, c], v[:, c], **part)
        finally:
            in_place.serves = plain
        close(got, want, 1e-5)
        start += t


@needs_native
def test_memory_that_no_query_sees_is_not_read() -> None:
    config = small()
    q, k, v = tensors(120, b=2, seed=1, dtype=torch.float32)
    clean, poisoned = store(config, k), store(config, k)
    for target in (clean, poisoned):
        feed(target, q[:, :100], k[:, :100], v[:, :100], [])
    state = poisoned._layers[0]
    held = int(state.lengths[0] - state.base[0] * 16)
    for name in ("tail.k", "tail.v"):
        state.buffers[name][:, held:] = torch.nan
    pool = poisoned._engine.tier
    spare = torch.ones(pool.room, dtype=torch.bool)
    spare[state.records[state.records >= 0]] = False
    for slab, start in zip(pool.slabs, pool.starts.tolist(), strict=True):
        slab[spare[start : start + len(slab)]] = 0xFF
    for i in range(100, 120):
        c = slice(i, i + 1)
        want, got = (x.attend(0, q[:, c], k[:, c], v[:, c]) for x in (clean, poisoned))
        assert torch.equal(got, want)


@needs_native
def test_float64_gradients_and_8_bits_are_brought_together(monkeypatch) -> None:
    for dtype, options, grad in (
        (torch.float64, {}, False),
        (torch.float32, {"cold_dtype": torch.int8}, False),
        (torch.float32, {}, True),
    ):
        q, k, v = tensors(70, dtype=dtype)
        target = store(small(), k, **options)
        feed(target, q[:, :60], k[:, :60], v[:, :60], [])
        with monkeypatch.context() as patched:
            patched.setattr(in_place, "attend_pages", None)
            target.attend(0, q[:, 60:].requires_grad_(grad), k[:, 60:], v[:, 60:])


@needs_native
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
@pytest.mark.parametrize(
    "limits", [{}, {"SLICE_TOKENS": 40}, {"LIST_BYTES": 4000}, {"SLICE_TOKENS": 1, "LIST_BYTES": 0}], ids=str
)
def test_long_calls_in_place(dtype, routing: str, limits: dict, tmp_path, monkeypatch) -> None:
    """Attention over the whole, however few queries are attended at once, and the same bits in every tier."""
    for name, value in limits.items():
        monkeypatch.setattr(in_place if name == "LIST_BYTES" else step_module, name, value)
    config = small(routing=routing, topk_chunks=3, topk_groups=5)
    q, k, v = tensors(400, b=2, hq=8, d=32, seed=7, dtype=dtype)
    cuts = [160, 161, 352] if routing != "block" else [160, 352]
    near = feed(store(config, k), q, k, v, cuts)
    close(near, full(q, k, v, config).out, NEAR[dtype])
    page = 2 * 16 * 32 * dtype.itemsize
    for options in (
        {"tier": "host"},
        {"tier": "disk", "path": tmp_path, "host_bytes": 2 * (6 * page + 60_000)},
        {"tier": "disk", "path": tmp_path},
    ):
        with store(config, k, **options) as target:
            assert torch.equal(feed(target, q, k, v, cuts), near)


@needs_native
@pytest.mark.parametrize("size", [1000, 20_000, in_place.LIST_BYTES])
def test_limits_change_no_bits(size: int, tmp_path, monkeypatch) -> None:
    """The least host memory that holds the history, or the bank and its lists, gives what any amount gives."""
    monkeypatch.setattr(in_place, "LIST_BYTES", size)
    config = small(topk_chunks=3, topk_groups=5)
    q, k, v = tensors(400, b=2, hq=8, d=32, seed=7, dtype=torch.float32)
    cuts = [160, 200]
    want = feed(store(config, k), q, k, v, cuts)
    for tier in ("host", "disk"):
        place = {"path": tmp_path} if tier == "disk" else {}
        with store(config, k, tier=tier, **place) as free:
            assert torch.equal(feed(free, q, k, v, cuts), want)
            held = free.stats()["peak_bytes"]["host"]
        tried = 0
        for limit in (x for least in (held, 60_000, 30_000, 20_000) for x in range(least, least + 9000, 4500)):
            try:
                with store(config, k, tier=tier, **place, host_bytes=limit) as target:
                    got = feed(target, q, k, v, cuts)
                    assert target.stats()["peak_bytes"]["host"] <= limit
            except ValueError as error:
                assert "host_bytes" in str(error)
                continue
            tried += 1
            assert torch.equal(got, want)
        assert tried >= (2 if tier == "host" else 4)


@needs_native
def test_chunks_of_any_number_of_groups_are_attended_in_place(monkeypatch) -> None:
    called, plain = [], in_place.attend_pages
    monkeypatch.setattr(in_place, "attend_pages", lambda *a, **k: called.append(1) or plain(*a, **k))
    config = HGAConfig(chunk_size=130, group_size=1, keep_first=0, keep_last=1, topk_chunks=1, topk_groups=9)
    q, k, v = tensors(600, dtype=torch.float32)
    got = feed(store(config, k), q, k, v, [590, 595])
    close(got, full(q, k, v, config).out, 1e-5)
    assert len(called) == 3


@pytest.mark.parametrize(
    "options", [{}, {"tier": "host"}, {"tier": "host", "bank_pages": 3}, {"cold_dtype": torch.int8}]
)
@pytest.mark.parametrize("routing", ["strict", "prefix"])
def test_a_deep_copy_goes_on_alone_with_the_same_bits(options: dict, routing: str) -> None:
    config = small(routing=routing)
    q, k, v = tensors(200, b=2, dtype=torch.float32)
    first = store(config, k, layers=2, **options)
    assert copy.deepcopy(first).lengths.tolist() == [0, 0]
    for layer in range(2):
        first.attend(layer, q[:, :100], k[:, :100], v[:, :100])
    first.reorder([1, 0, 1])  # rows that share records
    first.rewind(70, row=1)
    second = copy.deepcopy(first)
    assert second.lengths.tolist() == first.lengths.tolist()
    assert second.next_columns(0).tolist() == first.next_columns(0).tolist()
    more = tensors(60, b=3, seed=4, dtype=torch.float32)
    # other tokens in the original change nothing in the copy, and the other way round
    third = copy.deepcopy(second)
    first.attend(0, *(2 * x for x in more))
    first.reset()
    for start in (0, 30, 31):
        c = slice(start, {0: 30, 30: 31, 31: 60}[start])
        for layer in range(2):
            got, want = (x.attend(layer, *(y[:, c] for y in more)) for x in (second, third))
            assert torch.equal(got, want)
    for b in range(3):
        second.reset(b)
    assert third.lengths.tolist() == [160, 130, 160]


def test_a_copy_continues_as_the_original_would() -> None:
    q, k, v = tensors(120, dtype=torch.float32)
    first = store(small(), k)
    first.attend(0, q[:, :90], k[:, :90], v[:, :90])
    second = copy.deepcopy(first)
    for i in range(90, 120):
        c = slice(i, i + 1)
        assert torch.equal(*(x.attend(0, q[:, c], k[:, c], v[:, c]) for x in (first, second)))


@needs_native
def test_a_store_on_disk_has_no_copy(tmp_path) -> None:
    _, k, _ = tensors(4)
    with store(small(), k, tier="disk", path=str(tmp_path)) as target:
        with pytest.raises(TypeError, match="cannot be copied: save"):
            copy.deepcopy(target)
        with pytest.raises(TypeError, match="would share the history"):
            copy.copy(target)
