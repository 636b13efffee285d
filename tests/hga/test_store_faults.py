"""Storage that fails: every fault ends in right bytes or in KVStoreError, and leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hga_cases import close, feed, path_of, rope, small, store, tensors

from hici_kernels import KVStore, KVStoreError, _native
from hici_kernels.ops.hga_attention.api import hga_attention

pytestmark = pytest.mark.skipif(_native.status() is not None, reason="the tier disk needs the native library")
ROOT = Path(__file__).parents[2]
BACKENDS = ("auto", "threads")


def disk(k: torch.Tensor, tmp_path, **more) -> KVStore:
    return store(small(), k, tier="disk", path=tmp_path, host_bytes=100_000, **more)


def test_a_failed_read_changes_nothing_and_recomputing_is_exact(tmp_path) -> None:
    q, k, v = tensors(400, b=2, seed=1)
    target = disk(k, tmp_path)
    whole = hga_attention(q, k, v, small(), rope=rope())
    feed(target, *(x[:, :300] for x in (q, k, v)), [])
    held = target.lengths
    file = target._engine.tier.file
    file.inject(False, "error", errno.EIO, times=1 << 30)
    rest = [x[:, 300:] for x in (q, k, v)]
    with pytest.raises(KVStoreError, match=r"reading chunk \d+ of row \d in layer 0 failed.*EIO"):
        target.attend(0, *rest)
    assert torch.equal(target.lengths, held)
    file.clear_faults()
    close(target.attend(0, *rest), whole[:, 300:])
    # a record that is lost for good: what it held is fed again
    with open(path_of(file), "r+b") as raw:
        size = os.fstat(raw.fileno()).st_size
        raw.seek(0)
        raw.write(bytes(size))
    target.rewind(300)
    target._engine.tier.bank.drop(torch.arange(target._engine.records.end * 2))
    with pytest.raises(KVStoreError) as caught:
        target.attend(0, *rest)
    assert caught.value.chunk is not None
    target.rewind(0)
    close(feed(target, q, k, v, [300]), whole)


@pytest.mark.parametrize("skip", [0, 1, 5, 40])
def test_a_failed_write_undoes_the_whole_call(tmp_path, skip: int) -> None:
    """Also the parts of a long call that had been written already."""
    q, k, v = tensors(2300, b=1, seed=1)
    target = disk(k, tmp_path)
    target.attend(0, *(x[:, :200] for x in (q, k, v)))
    records = target._engine.records
    alive = int((records.shares > 0).sum())
    target._engine.tier.file.inject(True, "error", errno.ENOSPC, skip=skip, times=1)
    rest = [x[:, 200:] for x in (q, k, v)]
    with pytest.raises(KVStoreError, match=r"writing chunk \d+ of row 0 in layer 0 failed.*ENOSPC"):
        target.attend(0, *rest)
    assert target.lengths.tolist() == [200] and int((records.shares > 0).sum()) == alive
    close(target.attend(0, *rest), hga_attention(q, k, v, small(), rope=rope())[:, 200:])


def test_a_failed_rebuild_after_rewind_changes_nothing(tmp_path) -> None:
    q, k, v = tensors(400, b=1, seed=1)
    target = disk(k, tmp_path)
    feed(target, q, k, v, [])
    target._engine.tier.bank.drop(torch.arange(target._engine.records.end * 2))
    target.rewind(100)
    target._engine.tier.file.inject(False, "error", errno.EIO, times=1 << 30)
    part = [x[:, 100:110] for x in (q, k, v)]
    for _ in range(2):
        with pytest.raises(KVStoreError):
            target.attend(0, *part)
    target._engine.tier.file.clear_faults()
    close(target.attend(0, *part), hga_attention(q, k, v, small(), rope=rope())[:, 100:110])


def test_a_failed_prefetch_is_read_again_when_needed(tmp_path) -> None:
    x = [tensors(500, seed=s) for s in range(2)]
    target = disk(x[0][1], tmp_path, layers=2)
    near = store(small(), x[0][1], layers=2)
    file = target._engine.tier.file
    for t in (target, near):
        for layer in range(2):
            t.attend(layer, *x[layer])
    for i in range(4):
        for layer in range(2):
            one = tensors(1, seed=9 + layer)
            file.inject(False, "error", errno.EIO, skip=i, times=2)
            wanted = near.attend(layer, *one)
            try:
                got = target.attend(layer, *one)
            except KVStoreError:
                file.clear_faults()
                got = target.attend(layer, *one)
            file.clear_faults()
            assert torch.equal(got, wanted)
            target._engine.tier._arrive()
            target._engine.tier.bank.drop(torch.arange(target._engine.records.end * 2))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["pages", "prefetch", "arrive"])
def test_an_interrupt_gives_no_slot_away_that_is_still_read_into(tmp_path, monkeypatch, call: str, when: str) -> None:
    """Interrupted with reads begun that nobody will end: they end before their slots are free."""
    x = tensors(700, seed=1)
    target = disk(x[1], tmp_path)
    target.attend(0, *x)
    tier = target._engine.tier
    pages, everything = torch.arange(6), torch.arange(target._engine.records.end * 2)
    wanted = tier.pages(pages)
    tier.bank.drop(everything)
    if call == "arrive":
        tier.prefetch(pages)
    name = "begin" if call == "prefetch" else "end"
    real, drain, drained = getattr(tier.file, name), tier.file.drain, []

    def interrupted(*given: object, **more: object) -> None:
        if when == "after":
            real(*given, **more)
        raise KeyboardInterrupt

    def noted() -> None:
        drain()
        drained.append(bool((tier.bank.find(pages) >= 0).all()))

    monkeypatch.setattr(tier.file, name, interrupted)
    monkeypatch.setattr(tier.file, "drain", noted)
    with pytest.raises(KeyboardInterrupt):
        {"pages": tier.pages, "prefetch": tier.prefetch, "arrive": tier.pages}[call](pages)
    monkeypatch.undo()
    assert drained == [True], "drained while the slots were still theirs"
    assert (tier.bank.find(pages) < 0).all()
    tier.memory.fill_(7)
    assert torch.equal(tier.pages(pages), wanted)


def test_a_prefetch_that_cannot_begin_leaves_nothing_that_was_not_read(tmp_path, monkeypatch) -> None:
    x = tensors(700, seed=1)
    target = disk(x[1], tmp_path)
    target.attend(0, *x)
    tier = target._engine.tier
    pages = torch.arange(6)
    wanted = tier.pages(pages)
    tier.bank.drop(torch.arange(target._engine.records.end * 2))
    tier.memory.fill_(7)

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "no thread")

    monkeypatch.setattr(tier.file, "begin", fails)
    with pytest.raises(OSError, match="no thread"):
        tier.prefetch(pages)
    monkeypatch.undo()
    assert torch.equal(tier.pages(pages), wanted)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the size of a process")
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_threads_transfers_are_done_all_the_same(tmp_path, backend: str) -> None:
    process = script(
        f"""
        import resource
        s = disk(io={backend!r})
        first = s.attend(0, *part(400, 0))
        tier = s._engine.tier
        wanted = tier.pages(torch.arange(6))
        tier.bank.drop(torch.arange(s._engine.records.end * 2))
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 20), resource.RLIM_INFINITY))
        tier.prefetch(torch.arange(6))
        found = tier.pages(torch.arange(6))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert torch.equal(found, wanted)
        s.close()
        print("closed", flush=True)
        """,
        tmp_path,
    )
    assert "closed" in output(process) and process.returncode == 0


def test_a_pipe_in_the_directory_is_passed_over(tmp_path) -> None:
    os.mkfifo(tmp_path / "hici-kv-pipe")
    x = tensors(100, seed=1)
    target = disk(x[1], tmp_path)
    target.attend(0, *x)
    target.close()
    assert (tmp_path / "hici-kv-pipe").exists()


def test_path_that_takes_no_file(tmp_path) -> None:
    _, k, _ = tensors(4)
    with pytest.raises(KVStoreError, match="no file can be made"):
        disk(k, "/proc/self/task")
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(ValueError, match="path must be a directory"):
        disk(k, blocked)


# other processes. Each script prints what it saw.

HEAD = """
    import gc, os, resource, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from hici_kernels import HGAConfig, KVStore, KVStoreError, Rope
    directory = sys.argv[1]
    config = HGAConfig(chunk_size=16, group_size=4, keep_first=1, keep_last=1, topk_chunks=2, topk_groups=3)
    def make(**more):
        return KVStore(config, rope=Rope.from_theta(1e4, 16), layers=1, kv_heads=2, head_dim=16,
                       dtype=torch.float32, device="cpu", **more)
    def disk(**more):
        return make(tier="disk", path=directory, host_bytes=100_000, **more)
    def part(n, seed):
        g = torch.Generator().manual_seed(seed)
        return [torch.randn(1, n, h, 16, generator=g) for h in (4, 2, 2)]
"""


def script(body: str, tmp_path, **popen) -> subprocess.Popen:
    source = textwrap.dedent(HEAD) + textwrap.dedent(body)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **popen,
    )


def output(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=120)
    return text


def test_nothing_is_left_behind(tmp_path) -> None:
    """After an exception, by garbage collection, at exit without close, with reads on their way."""
    process = script(
        """
        s = disk()
        s.attend(0, *part(500, 0))
        try:
            with disk() as t:
                t.attend(0, *part(500, 1))
                raise KeyError
        except KeyError:
            print("raised", os.listdir(directory))
        u = disk()
        u.attend(0, *part(500, 2))
        before = len(os.listdir("/proc/self/fd"))
        del u
        gc.collect()
        print("collected", os.listdir(directory), before - len(os.listdir("/proc/self/fd")) >= 1)
        s.attend(0, *part(1, 3))
        pages = torch.arange(6)
        s._engine.tier.bank.drop(torch.arange(40))
        s._engine.tier.prefetch(pages)
        """,
        tmp_path,
    )
    assert output(process).splitlines() == ["raised []", "collected [] True"]
    assert process.returncode == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_while_writing_leaves_nothing(tmp_path, backend: str) -> None:
    process = script(
        f"""
        s = disk(io={backend!r})
        print("ready", flush=True)
        i = 0
        while True:
            s.attend(0, *part(400, i))
            i += 1
            if i == 20:
                s.reset()
                i = 0
        """,
        tmp_path,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_leftover_of_a_killed_process_is_swept_and_files_in_use_are_not(tmp_path) -> None:
    """A process killed between making its file and removing the name leaves one; nobody holds its lock."""
    import fcntl

    dead, alive, other = (tmp_path / n for n in ("hici-kv-1-1", "hici-kv-1-2", "something-else"))
    for p in (dead, alive, other):
        p.write_bytes(b"x")
    (tmp_path / "hici-kv-directory").mkdir()
    (tmp_path / "hici-kv-link").symlink_to(other)
    with open(alive) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with disk(tensors(4)[1], tmp_path):
            assert sorted(p.name for p in tmp_path.iterdir()) == [
                "hici-kv-1-2",
                "hici-kv-directory",
                "hici-kv-link",
                "something-else",
            ]


def test_two_processes_in_one_directory(tmp_path) -> None:
    body = """
        near, far = make(), disk()
        for i in range(25):
            x = part(37, 100 * int(os.getpid() % 7) + i)
            assert torch.equal(near.attend(0, *x), far.attend(0, *x)), i
        print("equal")
    """
    both = [script(body, tmp_path) for _ in range(2)]
    assert [output(p) for p in both] == ["equal\n", "equal\n"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_is_refused_and_the_parent_goes_on(tmp_path, backend: str) -> None:
    process = script(
        f"""
        near, far = make(), disk(io={backend!r})
        for s in (near, far):
            s.attend(0, *part(500, 0))
        far._engine.tier.bank.drop(torch.arange(60))
        far._engine.tier.prefetch(torch.arange(8))
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            for act in (lambda: far.attend(0, *part(1, 1)), lambda: far.rewind(3), lambda: far.reset()):
                try:
                    act()
                except KVStoreError as error:
                    print("child", "fork" in str(error))
            far.close()
            del far
            gc.collect()
            with disk() as own:
                own.attend(0, *part(500, 2))
                print("own", own.lengths.tolist(), flush=True)
            os._exit(0)
        print("status", os.waitpid(child, 0)[1])
        for i in range(10):
            x = part(9, i)
            assert torch.equal(near.attend(0, *x), far.attend(0, *x))
        print("parent equal")
        """,
        tmp_path,
    )
    assert output(process).splitlines() == ["child True"] * 3 + ["own [500]", "status 0", "parent equal"]


def test_a_full_disk(tmp_path) -> None:
    """A real refusal by the kernel: the process may not make files longer than 64 KiB."""
    process = script(
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        near, far = make(), disk()
        refused = 0
        for i in range(40):
            x = part(50, i)
            held = far.lengths.tolist()
            try:
                got = far.attend(0, *x)
            except KVStoreError as error:
                refused += 1
                assert "writing chunk" in str(error) and far.lengths.tolist() == held, error
                continue
            assert torch.equal(near.attend(0, *x), got)
        print("refused", refused > 3, "stored", far.lengths.tolist()[0] > 200)
        """,
        tmp_path,
    )
    assert output(process) == "refused True stored True\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(KVStoreError, match="no file can be made"):
        disk(tensors(4)[1], tmp_path)


def test_closing_frees_the_disk(tmp_path) -> None:
    _, k, _ = tensors(4)
    target = disk(k, tmp_path)
    feed(target, *tensors(2000, seed=1), [])
    link = path_of(target._engine.tier.file)
    assert os.stat(link).st_size > 400_000 and not list(tmp_path.iterdir())
    target.close()
    gc.collect()
    assert not os.path.exists(link) or "hici-kv" not in os.readlink(link)
