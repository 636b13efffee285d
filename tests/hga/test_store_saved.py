"""KVStore.save and KVStore.load: the same bits afterwards, and nothing but whole files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hga_cases import feed, small, store, tensors

from hici_kernels import KVStore, KVStoreError, _native
from hici_kernels.kv.saved import FOOTER, Saved

ROOT = Path(__file__).parents[2]


def filled(routing: str = "strict", **more) -> KVStore:
    q, k, v = tensors(230, b=3, seed=1)
    target = store(small(routing=routing), k, layers=2, **more)
    mask = torch.rand(3, 230, generator=torch.Generator().manual_seed(2)) < 0.9
    for layer in range(2):
        target.attend(layer, q + layer, k, v, attention_mask=mask)
    target.rewind(40, row=1)
    target.reset(row=2)
    return target


def go_on(target: KVStore) -> list[torch.Tensor]:
    outs = [target.lengths, target.next_columns(0)]
    for i in range(3):
        for layer in range(2):
            outs.append(target.attend(layer, *tensors(25, b=3, seed=30 + i)))
    target.rewind(10)
    outs += [target.next_columns(1), *(target.attend(layer, *tensors(25, b=3, seed=40)) for layer in range(2))]
    return outs


def kinds(tmp_path) -> list[dict]:
    disk = {"tier": "disk", "directory": tmp_path, "host_bytes": 300_000}
    return [{}, {"tier": "host"}, *([disk] if _native.status() is None else [])]


@pytest.mark.parametrize("routing", ["strict", "prefix"])
@pytest.mark.parametrize("cold", [None, torch.int8])
def test_a_loaded_store_goes_on_with_the_same_bits(routing: str, cold, tmp_path) -> None:
    options = {"cold_dtype": cold}
    filled(routing, **options).save(tmp_path / "prompt")
    expected = go_on(filled(routing, **options))
    for kind in kinds(tmp_path):
        with KVStore.load(tmp_path / "prompt", device="cpu", **kind) as loaded:
            for x, y in zip(go_on(loaded), expected, strict=True):
                assert torch.equal(x, y)
    assert [p.name for p in tmp_path.iterdir()] == ["prompt"]


@pytest.mark.parametrize("routing", ["strict", "prefix"])
def test_a_store_saved_before_its_first_call_is_as_a_new_one(routing: str, tmp_path) -> None:
    def use(target: KVStore) -> list[torch.Tensor]:
        outs = [target.attend(0, *tensors(90, b=1))]
        target.rewind(14)
        return [*outs, target.attend(0, *tensors(30, b=1, seed=2))]

    _, k, _ = tensors(1, b=1)
    fresh = store(small(routing=routing), k)
    fresh.save(tmp_path / "prompt")
    for kind in kinds(tmp_path):
        with KVStore.load(tmp_path / "prompt", device="cpu", **kind) as loaded:
            for x, y in zip(use(loaded), use(store(small(routing=routing), k)), strict=True):
                assert torch.equal(x, y)


def test_saving_again_replaces_the_whole_file_and_an_empty_store_is_one_too(tmp_path) -> None:
    path = tmp_path / "prompt"
    _, k, _ = tensors(4, b=3)
    store(small(), k, layers=2).save(path)
    with KVStore.load(path, device="cpu") as loaded:
        assert loaded.lengths.tolist() == [0, 0, 0] and loaded.layers == 2
        loaded.attend(0, *tensors(4, b=3))
    target = filled()
    target.save(path)
    with KVStore.load(path, device="cpu") as loaded:
        assert torch.equal(loaded.lengths, target.lengths)
    assert [p.name for p in tmp_path.iterdir()] == ["prompt"]


def test_any_changed_byte_is_noticed(tmp_path) -> None:
    path = tmp_path / "prompt"
    filled().save(path)
    whole = path.read_bytes()
    with Saved(path).file:
        start, length, _, _ = FOOTER.unpack(whole[-FOOTER.size :])
    g = torch.Generator().manual_seed(0)
    places = [0, 8, start - 1, start, start + length - 1, *range(len(whole) - FOOTER.size, len(whole))]
    places += torch.randint(0, len(whole), (15,), generator=g).tolist()
    for at in places:
        broken = bytearray(whole)
        broken[at] ^= 4
        path.write_bytes(broken)
        with pytest.raises(KVStoreError) as caught:
            KVStore.load(path, device="cpu")
        assert str(path) in str(caught.value) and caught.value.file == str(path)
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(KVStoreError, match="no complete saved history"):
            KVStore.load(path, device="cpu")
    named = json.loads(whole[start : start + length])["rows"][1][0]["parts"][-1]
    broken = bytearray(whole)
    broken[named["at"] + 5] ^= 1
    path.write_bytes(broken)
    with pytest.raises(KVStoreError, match=r"chunks \d+ to \d+ of row 0 in layer 1") as caught:
        KVStore.load(path, device="cpu")
    assert caught.value.layer == 1 and caught.value.chunk == named["chunk"]
    with pytest.raises(KVStoreError, match="cannot be opened"):
        KVStore.load(tmp_path / "absent", device="cpu")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "prompt"
    filled().save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KVStoreError, match="No space"):
            patch.setattr(os, name, full)
            filled().save(path)
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["prompt"]
    with pytest.raises(ValueError, match="path must be in a directory"):
        filled().save(tmp_path / "absent" / "prompt")


def test_killed_while_saving_leaves_the_old_file_and_the_rest_is_swept(tmp_path) -> None:
    source = textwrap.dedent(
        """
        import os, sys, time
        import torch
        from hici_kernels import HGAConfig, KVStore, Rope
        s = KVStore(HGAConfig(), rope=Rope.from_theta(1e4, 8), layers=1, kv_heads=1, head_dim=8, dtype=torch.float32,
                    device="cpu")
        s.attend(0, *(torch.randn(1, 500, 1, 8) for _ in range(3)))
        s.save(sys.argv[1])
        def wait(*_):
            print("saving", flush=True)
            time.sleep(60)
        os.fsync = wait
        s.save(sys.argv[1])
        """
    )
    path = tmp_path / "prompt"
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    held = [p.name for p in tmp_path.iterdir() if p != path]
    with KVStore.load(path, device="cpu") as loaded:
        loaded.save(tmp_path / "other")  # sweeps, but not what a living process writes
    assert len(held) == 1 and (tmp_path / held[0]).exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.05)
    with KVStore.load(path, device="cpu") as loaded:
        assert loaded.lengths.tolist() == [500]
        loaded.save(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "prompt"]


def test_saving_from_disk_and_feeding_a_prefix_once(tmp_path) -> None:
    """What a server does: a shared prompt is fed once, saved, and opened for every request."""
    if _native.status() is not None:
        pytest.skip("needs the native library")
    q, k, v = tensors(500, seed=9)
    with store(small(), k, tier="disk", path=tmp_path, host_bytes=100_000) as target:
        feed(target, q[:, :400], k[:, :400], v[:, :400], [])
        target.save(tmp_path / "prompt")
        expected = target.attend(0, q[:, 400:], k[:, 400:], v[:, 400:])
    for kind in kinds(tmp_path):
        with KVStore.load(tmp_path / "prompt", device="cpu", **kind) as request:
            assert torch.equal(request.attend(0, q[:, 400:], k[:, 400:], v[:, 400:]), expected)
