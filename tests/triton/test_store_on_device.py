"""A store whose pages the device finds by itself, in Triton's interpreter.

It gives the bits of the other tiers whatever the bank, and the bank is a model of it in plain Python.
"""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
from hga_cases import close, feed, full, play, small, store, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_interpreter import quick

from hici_kernels import _native
from hici_kernels.kv import routed
from hici_kernels.kv.gather_bank import GatherBank
from hici_kernels.kv.layout import Layout
from hici_kernels.kv.meter import Meter
from hici_kernels.kv.pool import Pool

CPU = torch.device("cpu")
#: the first asks the host what to bring together, the others the device
THROUGH_THE_HOST = {"tier": "host"}
TIERS = {
    "device": {"tier": "device"},
    "no bank": {"tier": "host", "fetch": "gather", "bank_pages": 0},
    "a bank of 1 page": {"tier": "host", "fetch": "gather", "bank_pages": 1},
    "a bank of 7 pages": {"tier": "host", "fetch": "gather", "bank_pages": 7},
    "a bank for all": {"tier": "host", "fetch": "gather", "bank_pages": 1000},
}


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize(
    ("name", "routing"),
    [*((name, "strict") for name in TIERS), ("device", "prefix"), ("device", "block"), ("a bank of 7 pages", "prefix")],
)
def test_the_bits_of_every_other_tier(name: str, routing: str) -> None:
    for seed in range(6 if name == "device" else 2):
        odd = seed % 2
        k = torch.zeros(2, 1, 2, 16, dtype=(torch.float32, torch.bfloat16)[odd])
        config = small(routing=routing, share=("query", "kv")[odd], keep_first=odd)
        near, far = (store(config, k, layers=2, **x) for x in (THROUGH_THE_HOST, TIERS[name]))
        for x, y in zip(
            *(play(s, seed, 2, 14 if name == "device" else 8, impl="triton") for s in (near, far)), strict=True
        ):
            assert torch.equal(x, y)
        assert far._engine.finder is not None and near._engine.finder is None


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("name", ["device", "a bank of 7 pages"])
def test_the_device_learns_where_records_went(name: str) -> None:
    """Rows are exchanged, chunks come back, and lists grow, between steps that the device finds."""
    q, k, v = tensors(1200, b=2, dtype=torch.float32)
    outs = []
    for options in (THROUGH_THE_HOST, TIERS[name]):
        target, found = store(small(), k, **options), []

        def feed_to(end: int, impl: str, target=target, found=found) -> None:
            now = slice(int(target.lengths[0]), end)
            found.append(target.attend(0, q[:, now], k[:, now], v[:, now], impl=impl))

        for change in (lambda: None, lambda t=target: t.reorder([1, 0]), lambda t=target: t.rewind(90)):
            feed_to(int(target.lengths[0]) + 150, "reference")
            feed_to(int(target.lengths[0]) + 1, "triton")
            change()
            feed_to(int(target.lengths[0]) + 1, "triton")
        feed_to(1100, "reference")
        feed_to(1101, "triton")
        outs.append(torch.cat(found, 1))
    assert torch.equal(*outs)


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("name", ["device", "a bank of 7 pages"])
@pytest.mark.parametrize(("chunks", "groups"), [(0, 0), (3, 0), (1, 1), (50, 200)])
def test_budgets_of_nothing_and_of_everything(name: str, chunks: int, groups: int) -> None:
    q, k, v = tensors(130, b=2, dtype=torch.float32)
    config = small(topk_chunks=chunks, topk_groups=groups)
    outs = [
        feed(store(config, k, **x), q, k, v, [100, 101, 103, 103, 115], impl="triton")
        for x in (THROUGH_THE_HOST, TIERS[name])
    ]
    assert torch.equal(*outs)
    close(outs[0], full(q, k, v, config, impl="reference").out, 1e-5)


@pytest.mark.parametrize("name", ["device", "a bank of 7 pages"])
def test_no_rows_and_no_queries(name: str) -> None:
    for b, t in ((0, 1), (2, 0), (0, 0)):
        q, k, v = tensors(t, b=b, dtype=torch.float32)
        target = store(small(), k, **TIERS[name])
        assert target.attend(0, q, k, v, impl="triton").shape == q.shape
        assert target.lengths.tolist() == [0] * b


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("name", ["device", "a bank of 7 pages"])
def test_eight_bit_records(name: str) -> None:
    q, k, v = tensors(150, dtype=torch.float32)
    outs = [
        feed(store(small(), k, cold_dtype=torch.int8, **x), q, k, v, list(range(100, 150, 3)), impl="triton")
        for x in (THROUGH_THE_HOST, TIERS[name])
    ]
    assert torch.equal(*outs)


@pytest.mark.usefixtures("references")
@pytest.mark.skipif(_native.status() is not None, reason="the tier disk needs the native library")
def test_a_disk_makes_the_same_row(tmp_path) -> None:
    """The tier "disk" has to ask the host, and leaves as much room as the others."""
    q, k, v = tensors(120, dtype=torch.float32)
    disk = {"tier": "disk", "path": str(tmp_path), "fetch": "gather", "bank_pages": 5}
    outs = [
        feed(store(small(), k, **x), q, k, v, list(range(100, 120)), impl="triton") for x in (disk, TIERS["device"])
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("name", ["device", "a bank of 7 pages"])
def test_it_is_attention_over_the_whole(name: str) -> None:
    """By the kernels that a GPU runs, one query and a few."""
    q, k, v = tensors(112, b=2, dtype=torch.float32)
    target = store(small(), k, **TIERS[name])
    outs = [target.attend(0, q[:, :106], k[:, :106], v[:, :106], impl="reference")]
    with quick():
        for columns in (slice(106, 107), slice(107, 109), slice(109, 112)):
            outs.append(target.attend(0, q[:, columns], k[:, columns], v[:, columns], impl="triton"))
    close(torch.cat(outs, 1), full(q, k, v, small(), impl="reference").out, 1e-5)


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("tokens", [4, 8, 48, 200])
def test_queries_that_open_much_are_cut(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(130, b=2, dtype=torch.float32)
    config = small(topk_chunks=4, topk_groups=5)
    whole = feed(store(config, k), q, k, v, [100, 116], impl="triton")
    monkeypatch.setattr(routed, "GATHERED_TOKENS", tokens)
    outs = [
        feed(store(config, k, **x), q, k, v, [100, 116], impl="triton") for x in (THROUGH_THE_HOST, TIERS["device"])
    ]
    assert torch.equal(*outs)
    close(outs[0], whole, 1e-5)


@pytest.mark.usefixtures("references")
def test_gradients_are_those_through_the_host() -> None:
    q, k, v = tensors(120, dtype=torch.float32)
    found = []
    for options in (THROUGH_THE_HOST, TIERS["device"], TIERS["a bank of 7 pages"]):
        target = store(small(), k, **options)
        feed(target, q[:, :110], k[:, :110], v[:, :110], [], impl="triton")
        leaves = [x[:, 110:].clone().requires_grad_() for x in (q, k, v)]
        with target.segment():
            target.attend(0, *leaves, impl="triton").square().sum().backward()
        found.append([x.grad for x in leaves])
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("references")
def test_limits_hold_and_copies_go_on(tmp_path) -> None:
    """device_bytes counts the bank and its lists; a saved store and a deep copy give the same bits."""
    q, k, v = tensors(200, dtype=torch.float32)
    target = store(small(), k, **TIERS["a bank of 7 pages"], device_bytes=200_000)
    feed(target, q[:, :150], k[:, :150], v[:, :150], list(range(100, 150, 5)), impl="triton")
    stats = target.stats()
    bank = target._engine.tier
    held = sum(x.nbytes for x in target._layers[0].buffers.values()) + target._layers[0].records.nbytes
    lists = bank.memory.nbytes + bank.slot.nbytes + 16 * bank.slots
    assert stats["resident_bytes"]["device"] == held + lists
    assert stats["peak_bytes"]["device"] <= 200_000
    assert stats["misses"] > 0 and stats["bytes_moved"] > 0
    target.save(tmp_path / "saved")
    others = [
        copy.deepcopy(target),
        type(target).load(tmp_path / "saved", device="cpu", **TIERS["a bank of 1 page"]),
    ]
    outs = [
        feed(s, q[:, 150:], k[:, 150:], v[:, 150:], list(range(0, 50, 7)), impl="triton") for s in (target, *others)
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    small_limit = store(small(), k, tier="host", fetch="gather", bank_pages=7, device_bytes=20_000)
    with pytest.raises(ValueError, match="device_bytes is 20000"):
        feed(small_limit, q, k, v, list(range(100, 200)), impl="triton")


class Model:
    """What a bank of ``slots`` pages holds, asked by ``cycle`` users in turn."""

    def __init__(self, slots: int, cycle: int) -> None:
        self.slots, self.cycle, self.now = slots, cycle, 0
        self.page: list[int | None] = [None] * slots
        self.used = [-(10**9)] * slots
        self.counts = [0, 0, 0]

    def request(self, pages: list[int]) -> None:
        self.now += 1
        wanted = sorted({p for p in pages if p >= 0})
        misses = [p for p in wanted if p not in self.page]
        for p in set(wanted) - set(misses):
            self.used[self.page.index(p)] = self.now
        old = [s for s in range(self.slots) if self.used[s] <= self.now - self.cycle]
        young = [s for s in range(self.slots) if self.now - self.cycle < self.used[s] < self.now]
        order = sorted(old, key=lambda s: self.used[s]) + sorted(young, key=lambda s: -self.used[s])
        for p, s in zip(misses, order, strict=False):
            self.page[s], self.used[s] = p, self.now
        self.counts[0] += len(wanted) - len(misses)
        self.counts[1] += len(misses)
        self.counts[2] += min(len(misses), len(order))

    def free(self, pages: list[int]) -> None:
        for s in range(self.slots):
            if self.page[s] in pages:
                self.page[s], self.used[s] = None, -(10**9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 20), slots=st.integers(1, 12), cycle=st.integers(1, 5))
def test_the_bank_is_its_model(seed: int, slots: int, cycle: int) -> None:
    """Requests of any size, with pages named twice and none at all, while records come and go."""
    g = torch.Generator().manual_seed(seed)
    layout, meter = Layout(2, 1, 2, 0, 2, torch.float32, None), Meter(None, None)
    bank = GatherBank(Pool("host", CPU, layout, meter), slots, CPU, layout, meter, cycle)
    model, held = Model(slots, cycle), 0
    contents: dict[int, torch.Tensor] = {}
    for _ in range(25):
        kind = int(torch.randint(0, 6, (), generator=g))
        if held == 0 or kind == 0:
            held += int(torch.randint(1, 6, (), generator=g))
        if kind in (0, 1):  # records are written, old ones anew once they were freed
            number = torch.randint(0, held, (2,), generator=g).unique()
            pages = (number[:, None] * 2 + torch.arange(2)).flatten()
            bank.free(pages)
            model.free(pages.tolist())
            new = torch.randint(0, 256, (len(number), 2, layout.page_bytes), generator=g, dtype=torch.uint8)
            bank.write(number, new)
            contents |= dict(zip(pages.tolist(), new.flatten(0, 1), strict=True))
            continue
        size = int(torch.randint(0, 2 * slots + 3, (), generator=g))
        known = torch.tensor([-1, *contents])
        asked = known[torch.randint(0, len(known), (size,), generator=g)]
        found = bank.addresses(asked).tolist()
        if size:
            model.request(asked.tolist())
        for page, address in zip(asked.tolist(), found, strict=True):
            if page < 0:
                assert address == 0
            else:
                expected = contents[page].numpy().tobytes()
                assert ctypes.string_at(address, layout.page_bytes) == expected
        assert [x if x >= 0 else None for x in bank.page[:slots].tolist()] == model.page
        assert bank.counts.tolist() == model.counts
    assert bank.counters()["bytes_moved"] == model.counts[2] * layout.page_bytes
