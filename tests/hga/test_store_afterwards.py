"""What a store is after a call that failed, in another mode of torch, closed by another thread, or dropped."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import os
import threading

import pytest
import torch
from hga_cases import feed, small, store, tensors

from hici_kernels import KVStoreError, _native
from hici_kernels.kv.columns import Columns

needs_native = pytest.mark.skipif(_native.status() is not None, reason=str(_native.status()))
F32 = torch.float32


def data(t: int, seed: int, b: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tensors(t, b=b, seed=seed, dtype=F32)


def made(layers: int = 1, batch: int = 1, keep_last: int = 2, **options: object):
    config = small(keep_last=keep_last, topk_chunks=3, topk_groups=4)
    return store(config, data(1, 0, batch)[1], layers=layers, **options)


def test_a_limit_met_while_a_window_comes_back_changes_nothing() -> None:
    """At every limit between none of the window's buffers and all of them."""
    free = made()
    free.attend(0, *data(160, 0))
    refused = 0
    for limit in range(40_000, 80_000, 512):
        with contextlib.suppress(ValueError):
            tight = made(device_bytes=limit)
            tight.attend(0, *data(160, 0))
            tight.rewind(159)
            try:
                tight.attend(0, *data(1, 1))
            except ValueError:
                refused += 1
            assert tight.lengths.tolist() in ([159], [160])
            tight.rewind(144)
            other = copy.deepcopy(free)
            other.rewind(144)
            more = data(1, 2)
            assert torch.equal(tight.attend(0, *more), other.attend(0, *more))
    assert refused > 2


@needs_native
@pytest.mark.parametrize("layers", [1, 3, 32])
def test_a_bank_goes_on_after_reset_and_after_a_full_disk(layers: int, tmp_path) -> None:
    """Also before as many requests have come as there are layers."""
    want = feed(made(), *data(800, 0), [])
    with made(layers, tier="disk", path=tmp_path, host_bytes=80 << 10) as target:
        for _ in range(3):
            target.reset()
            assert torch.equal(target.attend(0, *data(800, 0)), want)
    with made(layers, tier="disk", path=tmp_path, host_bytes=80 << 10) as target:
        target._file.inject(True, "error", errno.ENOSPC, 2, 1)
        with pytest.raises(KVStoreError, match="ENOSPC"):
            target.attend(0, *data(800, 0))
        assert torch.equal(target.attend(0, *data(800, 0)), want)


@pytest.mark.parametrize("tier", ["device", "host"])
def test_what_inference_mode_has_filled_is_continued_outside_and_the_other_way_round(tier: str) -> None:
    modes = [torch.inference_mode, torch.no_grad]
    for first, second in (modes, modes[::-1]):
        plain = made(2, 2, tier=tier)
        with first():
            target = made(2, 2, tier=tier)
        for mode, cuts in ((first, [(0, 150), (150, 170)]), (second, [(i, i + 1) for i in range(170, 210)])):
            for start, end in cuts:
                for layer in range(2):
                    with mode():
                        part = [x[:, start:end] for x in data(210, layer, 2)]
                        out = target.attend(layer, *part)
                    with torch.no_grad():
                        assert torch.equal(out, plain.attend(layer, *(x.clone() for x in part)))
            for change in (lambda s: s.rewind(int(s.lengths[1]) - 5, 1), lambda s: s.reorder([1, 0])):
                with mode():
                    change(target)
                change(plain)
            assert torch.equal(target.lengths, plain.lengths)
            for each in (target, plain):
                each.rewind(int(each.lengths.min()))
        target.reset()
        copy.deepcopy(target).attend(0, *data(3, 1, 2))


def test_calls_that_wait_for_one_that_closes_are_refused() -> None:
    target = made()
    q, k, v = data(6000, 0)
    outcomes: list[object] = []

    def call() -> None:
        try:
            outcomes.append(target.attend(0, q[:, :1], k[:, :1], v[:, :1]))
        except Exception as error:
            outcomes.append(str(error))

    with target._lock:
        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        target.close()
    for thread in threads:
        thread.join()
    assert all("closed" in str(outcome) for outcome in outcomes) and len(outcomes) == 3
    assert not any(target.stats()["resident_bytes"].values())


@needs_native
def test_a_store_that_is_dropped_is_gone(tmp_path) -> None:
    """At once, its memory and file descriptors with it: nothing waits for a collection of cycles."""
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            target = made(tier="disk", path=tmp_path, host_bytes=1 << 20)
            target.attend(0, *data(300, 0))
            del target
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


def test_rewind_brings_columns_back_where_lengths_stay() -> None:
    """After a step that reached one layer only, and padded one row."""
    target = made(2, 2)
    for layer in (0, 1):
        target.attend(layer, *data(5, 0, 2))
    target.attend(0, *data(1, 1, 2), attention_mask=torch.tensor([[1], [0]]))
    target.rewind(5)
    assert target.next_columns(0).tolist() == target.next_columns(1).tolist() == [5, 5]


def test_rewind_of_the_layers_that_a_model_has_called() -> None:
    target = made(3, 2)
    for layer in (0, 1):
        target.attend(layer, *data(90, layer, 2))
    with pytest.raises(ValueError, match="length must be at most the 0 tokens of row 0, got 70"):
        target.rewind(70)
    with pytest.raises(ValueError, match="length must be at most the 90 tokens of row 1, got 91"):
        target.rewind(91, 1, layers=[1])
    for bad in ([3], [-1]):
        with pytest.raises(ValueError, match="layers must be at"):
            target.rewind(70, layers=bad)
    assert [target.layer_lengths(i).tolist() for i in range(3)] == [[90, 90], [90, 90], [0, 0]]
    target.rewind(70, layers=(0, 1))
    target.rewind(65, 0, layers=[0])
    target.rewind(70, layers=[])
    assert [target.layer_lengths(i).tolist() for i in range(3)] == [[65, 70], [70, 70], [0, 0]]
    fresh = made(1, 2)
    fresh.attend(0, *(x[:, :70] for x in data(90, 1, 2)))
    more = data(9, 5, 2)
    assert torch.equal(target.attend(1, *more), fresh.attend(0, *more))
    with pytest.raises(ValueError, match="layer must be at most 2, got 3"):
        target.layer_lengths(3)


@needs_native
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_reorder_keeps_the_limit_of_the_host(tier: str, tmp_path) -> None:
    target = made(2, tier=tier, host_bytes=700 << 10, **({"path": tmp_path} if tier == "disk" else {}))
    for layer in (0, 1):
        target.attend(layer, *data(1000, 0))
    with pytest.raises(ValueError, match=r"host_bytes is .* but reorder to 9000 rows needs"):
        target.reorder([0] * 9000)
    assert target.batch == 1 and target.stats()["peak_bytes"]["host"] <= 700 << 10
    target.reorder([0, 0])
    assert target.stats()["peak_bytes"]["host"] <= 700 << 10


def test_memory_that_runs_out_at_the_end_of_a_call_changes_nothing(monkeypatch) -> None:
    """Where what is kept of the window is set aside, for keys and for values, and where columns are counted."""
    clone, append = torch.Tensor.clone, Columns.append
    for after in range(4):
        target, plain = made(), made()
        for each in (target, plain):
            each.attend(0, *data(150, 0))
        calls = iter(range(100))

        def fails(self, *args, calls=calls, after=after, **kwargs):
            if next(calls) == after:
                raise MemoryError("no memory")
            return (append if isinstance(self, Columns) else clone)(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "clone", fails)
            patched.setattr(Columns, "append", fails)
            failed = False
            try:
                target.attend(0, *data(12, 1))
            except MemoryError:
                failed = True
        assert failed == (after < 3)
        if failed:
            assert target.lengths.tolist() == [150]
            target.rewind(150)
            more = data(1, 2)
            assert torch.equal(target.attend(0, *more), plain.attend(0, *more))
            target.rewind(140)
            plain.rewind(140)
            assert torch.equal(target.attend(0, *more), plain.attend(0, *more))
