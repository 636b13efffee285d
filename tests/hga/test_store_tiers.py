"""The tiers of KVStore: equal bits, byte limits, banks, 8-bit records, several stores at once."""

from __future__ import annotations

import threading

import pytest
import torch
from hga_cases import close, dense, feed, play, rope, small, store, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from hici_kernels import HGAConfig, _native
from hici_kernels._triton import interpreted
from hici_kernels.errors import ImplError
from hici_kernels.kv.bank import Bank
from hici_kernels.kv.columns import Columns
from hici_kernels.kv.disk import Disk
from hici_kernels.kv.layout import Layout
from hici_kernels.kv.meter import Meter
from hici_kernels.kv.pool import Pool
from hici_kernels.kv.records import Records
from hici_kernels.ops.hga_attention.api import hga_attention
from hici_kernels.ops.hga_attention.op import attention_forward

needs_native = pytest.mark.skipif(_native.status() is not None, reason="the tier disk needs the native library")
PAGE = 2 * 16 * 16 * 8  # bytes of the pages below


def host_bytes(pages: int) -> int:
    """A limit that leaves a bank of at least ``pages`` pages of the small stores below, and 40 KB for lists."""
    return 2 * max(40_000, (pages + 1) * (PAGE + 16))


TIERS = {
    "host": {"tier": "host"},
    "host, a bank of 1 page": {"tier": "host", "bank_pages": 1},
    "host, a bank of 5 pages": {"tier": "host", "bank_pages": 5},
    "host, a bank for all": {"tier": "host", "bank_pages": 1000},
    "disk, little memory": {"tier": "disk", "host_bytes": 100_000},
    "disk, io threads": {"tier": "disk", "host_bytes": host_bytes(6), "io": "threads", "queue_depth": 3},
    "disk, buffered": {"tier": "disk", "direct": False, "queue_depth": 1},
    "disk, both banks": {"tier": "disk", "host_bytes": host_bytes(20), "bank_pages": 3, "prefetch": False},
}


def options(name: str, tmp_path) -> dict:
    chosen = TIERS[name]
    if chosen["tier"] == "disk" and _native.status() is not None:
        pytest.skip("the tier disk needs the native library")
    return chosen | ({"path": str(tmp_path)} if chosen["tier"] == "disk" else {})


@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["brought together", "in place"])
def test_p20_all_tiers_give_the_same_bits(name: str, routing: str, dtype: torch.dtype, tmp_path) -> None:
    config = small(routing=routing)
    for seed in range(3):
        k = torch.zeros(2, 1, 2, 16, dtype=dtype)
        with store(config, k, layers=2) as near, store(config, k, layers=2, **options(name, tmp_path)) as far:
            for x, y in zip(play(near, seed, 2), play(far, seed, 2), strict=True):
                assert torch.equal(x, y)
            for tier, limit in (("device", far.device_bytes), ("host", far.host_bytes)):
                assert limit is None or far.stats()["peak_bytes"][tier] <= limit
    assert not list(tmp_path.iterdir())


@needs_native
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 20),
    pages=st.integers(1, 30),
    w=st.integers(0, 2),
    f=st.integers(0, 3),
    kc=st.integers(0, 4),
    kg=st.integers(0, 9),
    cold=st.booleans(),
    share=st.sampled_from(["query", "kv"]),
)
def test_p20_any_budget_and_bank(tmp_path_factory, seed, pages, w, f, kc, kg, cold, share) -> None:
    config = small(keep_first=f, keep_last=w, topk_chunks=kc, topk_groups=kg, share=share)
    k = torch.zeros(2, 1, 2, 16, dtype=torch.float32)
    more = {"layers": 2, "cold_dtype": torch.int8 if cold else None}
    path = str(tmp_path_factory.mktemp("kv"))
    with (
        store(config, k, **more) as near,
        store(config, k, tier="disk", path=path, host_bytes=host_bytes(pages), **more) as far,
    ):
        for x, y in zip(play(near, seed, 2), play(far, seed, 2), strict=True):
            assert torch.equal(x, y)


@pytest.mark.skipif(interpreted(), reason="the interpreter gathers on the CPU")
def test_what_cannot_gather_says_so_at_once() -> None:
    k = torch.zeros(1, 1, 2, 16)
    with pytest.raises(ImplError, match="fetch='gather' cannot be served: "):
        store(small(), k, tier="host", fetch="gather", bank_pages=4)


@pytest.mark.parametrize("cuts", [[], [1], [500, 501, 1500], [1030]])
@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
def test_long_calls_are_cut_without_a_trace(cuts: list[int], routing: str) -> None:
    """Calls longer than what is computed at once, more opened groups than are brought together at once."""
    q, k, v = tensors(2500, b=2, hq=4, hkv=2, d=8, seed=3)
    config = small(routing=routing, topk_chunks=5, topk_groups=9, keep_last=2, route_block=8)
    if routing == "block":
        cuts = [c // 16 * 16 for c in cuts]
    close(feed(store(config, k), q, k, v, cuts), hga_attention(q, k, v, config, rope=rope(8)))


def test_many_opened_groups_are_brought_together_in_parts(monkeypatch) -> None:
    q, k, v = tensors(700, b=2, d=8, seed=3)
    config = small(topk_chunks=5, topk_groups=9)
    whole = feed(store(config, k), q, k, v, [90, 91])
    monkeypatch.setattr("hici_kernels.kv.routed.GATHERED_TOKENS", 48)
    close(feed(store(config, k), q, k, v, [90, 91]), whole)


def some_routes(q, chunk_keys, group_keys, positions, context, c, first, last, kc, kg, *_):
    """Seeded routes into the pool, in no time; none for long calls."""
    b, t, hq, _ = q.shape
    m = group_keys.shape[2]
    pool = (positions // c - last - first).clamp(min=0)[:, :, None, None] * m
    drawn = torch.randint(0, 1 << 40, (b, t, hq, kg), generator=torch.Generator().manual_seed(t))
    return torch.where((pool > 0) & (t < 16), first * m + drawn % pool.clamp(min=1), -1).int()


@needs_native
def test_p21_limits_are_never_exceeded_and_memory_is_flat(tmp_path, monkeypatch) -> None:
    """From 64K to 1M tokens, only tables and lists grow."""

    def attend(q, *arguments):
        return (torch.zeros_like(q), None, None) if q.shape[1] > 16 else attention_forward(q, *arguments)

    monkeypatch.setattr("hici_kernels.kv.step.route_forward", some_routes)
    monkeypatch.setattr("hici_kernels.kv.step.attention_forward", attend)
    config = HGAConfig(keep_last=2, topk_chunks=3, topk_groups=3)
    k = torch.zeros(1, 1, 1, 2, dtype=torch.float32)
    limits = {"device_bytes": 4 << 20, "host_bytes": 8 << 20}
    grown = []
    with store(config, k, rope=rope(2), tier="disk", path=tmp_path, **limits) as target:
        part = [torch.randn(1, 8192, 1, 2, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
        for length in range(0, 1 << 20, 8192):
            target.attend(0, *part)
            for i in range(3):
                target.attend(0, *(x[:, i : i + 1] for x in part))
            target.rewind(length + 8192)
            if length + 8192 in (1 << 16, 1 << 20):
                stats = target.stats()
                assert stats["peak_bytes"]["device"] <= 4 << 20 and stats["peak_bytes"]["host"] <= 8 << 20
                buffers = target._layers[0].buffers
                tables = sum(x.nbytes for n, x in buffers.items() if n.endswith("_keys"))
                fixed = sum(x.nbytes for x in buffers.values()) - tables
                assert stats["resident_bytes"]["device"] == fixed + tables
                tier = target._engine.tier
                lists = stats["resident_bytes"]["host"] - tier.memory.nbytes
                grown.append((fixed, tables, tier.memory.nbytes, lists, stats))
    few, many = grown
    assert few[0] == many[0] and few[2] == many[2]
    assert 8 <= many[1] / few[1] <= 32 and 4 <= many[3] / few[3] <= 32
    assert many[4]["resident_bytes"]["disk"] > (1 << 20) * 16
    assert many[4]["misses"] > 30 and many[4]["hits"] > 30


@needs_native
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_p20_a_bank_smaller_than_any_request(slots: int, tmp_path) -> None:
    layout = Layout(8, 4, 3, 0, 8, torch.float32, None)
    records, meter = Records(7, layout.pages), Meter(None, None)
    disk = Disk(str(tmp_path), slots, layout, records, meter, depth=2, backend="auto", direct=True, pinned=False)
    pool = Pool("host", torch.device("cpu"), layout, meter)
    rows, chunks = torch.arange(20) % 3, torch.arange(20)
    numbers = records.take(0, rows, chunks)
    pages = layout.encode({n: torch.randn(20, 8, 3, 8) for n in "kv"})
    for tier in (disk, pool):
        tier.write(numbers, pages)
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        at, group = torch.randint(0, 60, (11,), generator=g), torch.randint(0, 2, (11,), generator=g)
        assert torch.equal(disk.groups(at, group), pool.groups(at, group))
        disk.prefetch(torch.randint(0, 60, (3,), generator=g).unique())
        assert torch.equal(disk.pages(at.unique()), pages.flatten(0, 1)[at.unique()])
    disk.close()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_p21_a_limit_that_is_reached_changes_nothing(tier: str, tmp_path) -> None:
    if tier == "disk" and _native.status() is not None:
        pytest.skip("needs the native library")
    _, k, _ = tensors(64, seed=10)
    chosen = {"tier": tier, "host_bytes": 60_000} | ({"path": tmp_path} if tier == "disk" else {})
    target = store(small(), k, **chosen)
    wanted, held = [], 0
    with pytest.raises(ValueError, match="host_bytes is 60000"):
        for i in range(150):
            held = int(target.lengths[0])
            wanted.append(target.attend(0, *tensors(64, seed=i)))
    assert int(target.lengths[0]) == held and target.stats()["peak_bytes"]["host"] <= 60_000
    target.rewind(held - 64)
    assert torch.equal(target.attend(0, *tensors(64, seed=len(wanted) - 1)), wanted[-1])


def test_bank_evicts_the_least_recently_used() -> None:
    g = torch.Generator().manual_seed(0)
    for slots in (1, 2, 7, 40):
        bank = Bank(slots)
        order: list[int] = []  # oldest use first; pages of one call count as used together
        when: dict[int, int] = {}
        for now in range(300):
            pages = torch.randperm(60, generator=g)[: int(torch.randint(1, slots + 1, (), generator=g))].unique()
            if now % 17 == 0:
                bank.drop(pages)
                for p in pages.tolist():
                    when.pop(p, None)
                continue
            found = bank.find(pages)
            assert [int(s) >= 0 for s in found] == [p in when for p in pages.tolist()]
            missing = pages[found < 0]
            for p in pages.tolist():
                if p in when:
                    when[p] = now
            slot = bank.place(missing)
            assert torch.equal(bank.page[slot], missing)
            for p in missing.tolist():
                when[p] = now
            leaving = len(when) - slots
            if leaving > 0:
                order = sorted(when, key=lambda p: when[p])
                here = {int(p) for p in bank.page if p >= 0}
                gone = [p for p in order if p not in here]
                assert len(gone) == leaving
                assert max(when[p] for p in gone) <= min(when[p] for p in here)
                for p in gone:
                    del when[p]
            assert {int(p) for p in bank.page if p >= 0} == set(when)


@pytest.mark.parametrize("slots", [30, 45, 59])
def test_bank_keeps_what_fits_of_a_cycle_that_does_not(slots: int) -> None:
    """Six users of ten pages each in turn: least-recently-used alone would miss every page of every round."""
    bank = Bank(slots, 6)
    misses = 0
    for turn in range(20 * 6):
        pages = torch.arange(10) + 10 * (turn % 6)
        found = bank.find(pages)
        bank.place(pages[found < 0])
        if turn >= 60:
            misses += int((found < 0).sum())
        assert torch.equal(bank.page[bank.slot[pages].long()], pages)
        assert int((bank.page >= 0).sum()) == min(slots, 10 * (turn + 1)) == len(bank.page[bank.page >= 0].unique())
    assert 60 - slots <= misses / 10 <= 1.5 * (60 - slots) + 1
    # other pages: what nobody asks for any more leaves
    for turn in range(12):
        pages = torch.arange(5) + 1000 + 5 * (turn % 6)
        found = bank.find(pages)
        bank.place(pages[found < 0])
        assert turn < 6 or (found >= 0).all()


def test_columns_are_runs() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        columns, expected, at = Columns(), [], 0
        for _ in range(12):
            count = int(torch.randint(0, 9, (), generator=g))
            mask = torch.rand(count, generator=g) < 0.6
            plain = bool(torch.rand((), generator=g) < 0.3)
            columns.append(len(expected), count, None if plain else mask)
            expected += [at + i for i in range(count) if plain or mask[i]]
            at += count
            assert columns.following == at and [columns.of(i) for i in range(len(expected))] == expected
            if torch.rand((), generator=g) < 0.3:
                keep = int(torch.randint(0, len(expected) + 1, (), generator=g))
                columns.cut(keep)
                expected = expected[:keep]
                at = expected[-1] + 1 if expected else 0
    columns = Columns()
    for i in range(1000):
        columns.append(64 * i, 64, None)
    assert columns.runs == [(0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("query_heads", [0, 4, 3])
@pytest.mark.parametrize("cold", [None, torch.int8])
def test_records_hold_what_was_put_in(dtype: torch.dtype, query_heads: int, cold: torch.dtype | None) -> None:
    layout = Layout(6, 3, 2, query_heads, 5, dtype, cold)
    chunks = {n: torch.randn(4, 6, h, 5).to(dtype) for n, h in (("k", 2), ("v", 2), ("q", query_heads)) if h}
    pages = layout.encode(chunks)
    assert pages.shape == (4, layout.pages, layout.page_bytes) and pages.dtype == torch.uint8
    back = layout.decode(pages)
    for name, x in chunks.items():
        if cold is None:
            assert torch.equal(back[name], x)
        else:  # half a step of the token's scale, and the rounding to dtype
            limit = x.double().abs().amax(-1, keepdim=True) * (0.5 / 127 * 1.001 + torch.finfo(dtype).eps)
            assert ((back[name].double() - x.double()).abs() <= limit).all()
    memory = torch.full((8, layout.stride), 255, dtype=torch.uint8)
    memory[:4, : layout.page_bytes] = pages[:, 1]
    picked = layout.groups(memory, torch.tensor([3, 0]), torch.tensor([1, 0]))
    assert torch.equal(picked[0, 0], back["k"][3, 3:, 1]) and torch.equal(picked[1, 1], back["v"][0, :3, 1])


def test_eight_bits_lose_little() -> None:
    """Full budgets: what differs from dense attention is the rounding of records alone."""
    q, k, v = tensors(300, b=1, seed=2, dtype=torch.float32)
    config = small(topk_chunks=50, topk_groups=200)
    truth = dense(q.double(), k.double(), v.double())
    exact = feed(store(config, k), q, k, v, [256])
    small_store = feed(store(config, k, cold_dtype=torch.int8), q, k, v, [256])
    close(exact, truth, 1e-5)
    lost = (small_store - truth)[:, 256:].abs()
    assert 1e-5 < lost.max() < 0.03 and lost.mean() < 0.005


@needs_native
def test_prefetch_finds_what_the_next_layer_reads(tmp_path) -> None:
    """A bank smaller than the pages of all layers: repeated routes are read ahead, not waited for one by one."""
    config = small(topk_chunks=2, topk_groups=3)
    layers, pages = 6, 24

    def run(prefetch: bool) -> dict:
        k = torch.zeros(1, 1, 2, 16, dtype=torch.float64)
        chosen = {"tier": "disk", "path": tmp_path, "host_bytes": host_bytes(pages), "prefetch": prefetch}
        with store(config, k, layers=layers, **chosen) as target:
            for layer in range(layers):
                target.attend(layer, *tensors(600, seed=layer))
            step = [tensors(1, seed=50 + layer) for layer in range(layers)]
            for i in range(6):
                if i == 1:  # nothing can be known of the first step
                    before = target.stats()
                for layer in range(layers):
                    target.attend(layer, *step[layer])
            after = target.stats()
        return {n: after[n] - before[n] for n in ("hits", "misses")}

    without, with_ = run(False), run(True)
    assert without["misses"] > 50
    assert with_["misses"] < without["misses"] / 3


def test_many_stores_and_many_threads(tmp_path) -> None:
    config = small()
    runs = [tensors(300, seed=s) for s in range(4)]
    expected = [hga_attention(q, k, v, config, rope=rope()) for q, k, v in runs]
    chosen = {"tier": "disk", "path": tmp_path, "host_bytes": host_bytes(8)}
    if _native.status() is not None:
        chosen = {"tier": "host"}
    shared = store(config, runs[0][1], layers=4, **chosen)
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            q, k, v = runs[i]
            with store(config, k, **chosen) as own:
                for start in range(0, 300, 20):
                    c = slice(start, start + 20)
                    close(own.attend(0, q[:, c], k[:, c], v[:, c]), expected[i][:, c])
                    # one store, a layer for every thread
                    close(shared.attend(i, q[:, c], k[:, c], v[:, c]), expected[i][:, c])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures
    assert shared.lengths.tolist() == [300]
    shared.close()
    assert not list(tmp_path.iterdir())


def test_records_of_copied_rows_are_shared_and_freed(tmp_path) -> None:
    q, k, v = tensors(200, b=2, seed=1)
    target = store(small(), k, tier="host")
    feed(target, q, k, v, [])
    records = target._engine.records
    alive = int((records.shares > 0).sum())
    target.reorder([0, 0, 0, 1])
    assert int((records.shares > 0).sum()) == alive and records.end == alive
    more = tensors(64, b=4, seed=2)
    got = target.attend(0, *more)
    for b, source in enumerate([0, 0, 0, 1]):
        row = [torch.cat((x[source : source + 1], y[b : b + 1]), 1) for x, y in zip((q, k, v), more, strict=True)]
        close(got[b], hga_attention(*row, small(), rope=rope())[0, 200:])
    target.reset()
    assert not (records.shares > 0).any()
    feed(target, *tensors(200, b=4, seed=3), [])
    assert records.end == int((records.shares > 0).sum()) or records.end <= 4 * 12


def test_default_config_in_bfloat16(tmp_path) -> None:
    """The shapes of a real layer, scaled down in heads only."""
    config = HGAConfig()
    q, k, v = tensors(3000, hq=4, hkv=2, d=64, seed=5, dtype=torch.bfloat16)
    kinds = [{"tier": "host"}]
    if _native.status() is None:
        kinds.append({"tier": "disk", "path": tmp_path, "host_bytes": 1 << 20})
    near = store(config, k)
    expected = feed(near, q, k, v, [2990, 2991])
    for chosen in kinds:
        with store(config, k, **chosen) as far:
            assert torch.equal(feed(far, q, k, v, [2990, 2991]), expected)
