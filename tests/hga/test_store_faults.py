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
from hga_cases import close, feed, rope, small, store, tensors

from hici_kernels import KVStore, KVStoreError, _native
from hici_kernels.kv.layout import aligned
from hici_kernels.kv.page_file import PageFile
from hici_kernels.kv.records import Records
from hici_kernels.ops.hga_attention.api import hga_attention

pytestmark = pytest.mark.skipif(_native.status() is not None, reason="the tier disk needs the native library")
ROOT = Path(__file__).parents[2]
BACKENDS = ("auto", "threads")
POLY = 0x82F63B78


def crc32c(data: bytes, crc: int = 0) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = POLY ^ (crc >> 1) if crc & 1 else crc >> 1
    return crc ^ 0xFFFFFFFF


def page_checksum(data: bytes, identity: list[int]) -> int:
    """csrc/io/checksum.cpp, one bit at a time."""

    def mix(h: int) -> int:
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            h = (h ^ (h >> 33)) * factor % (1 << 64)
        return h ^ (h >> 33)

    lane = len(data) // 32 * 8
    c = [crc32c(data[k * lane : (k + 1) * lane]) ^ 0xFFFFFFFF for k in range(4)]
    c[3] = crc32c(data[4 * lane :], c[3])
    h = len(data)
    for x in identity:
        h = mix(h ^ x % (1 << 64))
    for k in range(4):
        h = mix(h ^ (c[k] << 2 | k))
    return h


def test_checksum_is_crc32c_in_lanes() -> None:
    library = _native.library()
    assert library.page_crc32c(torch.frombuffer(bytearray(b"123456789"), dtype=torch.uint8)) == 0xE3069283
    g = torch.Generator().manual_seed(0)
    for size in (1, 7, 8, 31, 32, 33, 100, 512):
        data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=g)
        assert library.page_crc32c(data) == crc32c(bytes(data.tolist()))
        identity = torch.randint(-(1 << 40), 1 << 40, (6,), generator=g)
        found = library.page_checksum(data, identity) & 0xFFFFFFFFFFFFFFFF
        assert found == page_checksum(bytes(data.tolist()), identity.tolist())


def test_checksum_sees_every_flipped_bit_and_every_other_identity() -> None:
    library = _native.library()
    data = torch.randint(0, 256, (300,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    identity = torch.tensor([1, 0, 2, 3, 1, 1])
    seen = {library.page_checksum(data, identity)}
    for bit in range(8 * 300):
        data[bit // 8] ^= 1 << bit % 8
        seen.add(library.page_checksum(data, identity))
        data[bit // 8] ^= 1 << bit % 8
    for i in range(6):
        for change in (1, 2, 1 << 40):
            other = identity.clone()
            other[i] += change
            seen.add(library.page_checksum(data, other))
    assert len(seen) == 1 + 8 * 300 + 18


# one file


def open_file(tmp_path, slots: int = 8, stride: int = 1024, **more) -> tuple[PageFile, torch.Tensor, Records]:
    records = Records(5, 2)
    bank = aligned(slots, stride)
    return PageFile(str(tmp_path), bank, stride - 100, records, **{"depth": 4, **more}), bank, records


def filled(tmp_path, **more) -> tuple[PageFile, torch.Tensor, torch.Tensor]:
    """A file with 8 pages, and what they hold."""
    file, bank, records = open_file(tmp_path, **more)
    records.take(3, torch.arange(4), torch.arange(4) + 10)
    data = torch.randint(0, 256, bank.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bank[:] = data
    file.write(torch.arange(8), torch.arange(8))
    bank.zero_()
    return file, bank, data


def read(file: PageFile, pages: list[int]) -> None:
    numbers = torch.tensor(pages)
    file.end(file.begin(torch.arange(len(pages)), numbers), numbers)


def path_of(file: PageFile) -> str:
    """The nameless file, through the descriptor that this process holds."""
    for fd in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{fd}"
        try:
            if os.readlink(link).split(" (deleted)")[0] == file.name:
                return link
        except OSError:
            continue
    raise AssertionError("the file is not open")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direct", [True, False])
def test_pages_come_back(tmp_path, backend: str, direct: bool) -> None:
    file, bank, data = filled(tmp_path, backend=backend, direct=direct)
    for pages in ([3], [7, 0, 5], list(range(8))):
        read(file, pages)
        assert torch.equal(bank[: len(pages), :924], data[pages, :924])
    assert not list(tmp_path.iterdir())
    counted = file.counters()
    assert counted["bytes_written"] == 8 * 1024 and counted["bytes_read"] == 12 * 1024 and counted["rejected"] == 0
    file.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ahead", [True, False])
def test_closing_with_reads_on_their_way_ends(tmp_path, backend: str, ahead: bool) -> None:
    """At every moment: before the first has ended, in the middle, after the last that nobody has looked at."""
    for i in range(80):
        file, bank, data = filled(tmp_path, backend=backend)
        request = file.begin(torch.arange(8), torch.arange(8), ahead=ahead)
        time.sleep(i % 8 * 2e-5)
        file.close()
        try:
            file.end(request, torch.arange(8))
        except ValueError as error:
            assert "closed" in str(error)
        else:
            assert torch.equal(bank[:, :924], data[:, :924])


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_transfers_are_completed(tmp_path, backend: str) -> None:
    file, bank, records = open_file(tmp_path, backend=backend)
    records.take(3, torch.arange(4), torch.arange(4))
    data = torch.randint(0, 256, bank.shape, dtype=torch.uint8)
    bank[:] = data
    for value in (512, 700, 1):
        file.inject(True, "short", value, times=2)
    file.write(torch.arange(8), torch.arange(8))
    bank.zero_()
    for value in (512, 700, 1):
        file.inject(False, "short", value, times=2)
    read(file, list(range(8)))
    assert torch.equal(bank[:, :924], data[:, :924]) and file.counters()["retries"] >= 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind, value", [("flip", 4321), ("error", errno.EIO), ("error", errno.EINTR)])
def test_a_passing_read_fault_is_read_again(tmp_path, backend: str, kind: str, value: int) -> None:
    file, bank, data = filled(tmp_path, backend=backend)
    file.inject(False, kind, value, skip=2, times=1)
    read(file, list(range(8)))
    assert torch.equal(bank[:, :924], data[:, :924])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN, errno.ECANCELED])
def test_an_interrupted_transfer_is_begun_again(tmp_path, backend: str, number: int) -> None:
    """However often; ECANCELED is what io_uring gives where the thread that sent another's transfer has ended."""
    file, bank, records = open_file(tmp_path, backend=backend)
    records.take(3, torch.arange(4), torch.arange(4))
    data = torch.randint(0, 256, bank.shape, dtype=torch.uint8)
    bank[:] = data
    file.inject(True, "error", number, skip=1, times=50)  # the first is the room for what is written
    file.write(torch.arange(8), torch.arange(8))
    bank.zero_()
    file.inject(False, "error", number, times=50)
    read(file, list(range(8)))
    assert torch.equal(bank[:, :924], data[:, :924])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind, value, said",
    [("flip", 4321, "not those that were written"), ("error", errno.EIO, "EIO"), ("error", errno.ENODEV, "ENODEV")],
)
def test_a_lasting_read_fault_names_its_record(tmp_path, backend: str, kind: str, value: int, said: str) -> None:
    file, bank, data = filled(tmp_path, backend=backend)
    file.inject(False, kind, value, times=100)
    with pytest.raises(KVStoreError, match=said) as caught:
        read(file, [5])
    error = caught.value
    assert (error.layer, error.row, error.chunk, error.file) == (3, 2, 12, file.name)
    assert "chunk 12 of row 2 in layer 3" in str(error) and file.name in str(error)
    file.clear_faults()
    read(file, [5])
    assert torch.equal(bank[0, :924], data[5, :924])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_fault_names_its_record(tmp_path, backend: str, number: int) -> None:
    file, _, records = open_file(tmp_path, backend=backend)
    records.take(3, torch.arange(4), torch.arange(4))
    file.inject(True, "error", number, skip=3, times=1)
    with pytest.raises(KVStoreError, match=errno.errorcode[number]):
        file.write(torch.arange(8), torch.arange(8))
    file.write(torch.arange(8), torch.arange(8))
    read(file, list(range(8)))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("page", range(8))
def test_bits_on_disk_are_verified(tmp_path, page: int, direct: bool) -> None:
    file, _, _ = filled(tmp_path, direct=direct)
    with open(path_of(file), "r+b") as raw:
        raw.seek(page * 1024 + 17 * page)
        byte = raw.read(1)
        raw.seek(-1, 1)
        raw.write(bytes([byte[0] ^ 16]))
    read(file, [p for p in range(8) if p != page])
    with pytest.raises(KVStoreError, match="not those that were written"):
        read(file, [page])
    assert file.counters()["rejected"] == 2


def test_another_page_in_its_place_is_refused(tmp_path) -> None:
    """Intact bytes of another record, of the same record before, and of a file that was never written there."""
    file, _, _ = filled(tmp_path)
    link = path_of(file)
    raw = Path(link).read_bytes()
    with open(link, "r+b") as f:
        f.seek(2 * 1024)
        f.write(raw[3 * 1024 : 4 * 1024])
    with pytest.raises(KVStoreError):
        read(file, [2])
    file.records.drop(torch.tensor([0]))
    file.records.take(3, torch.tensor([0]), torch.tensor([10]))  # the same name, a new generation
    with pytest.raises(KVStoreError):
        read(file, [0])


def test_truncation_is_noticed(tmp_path) -> None:
    file, _, _ = filled(tmp_path)
    os.truncate(path_of(file), 5 * 1024 + 512)
    read(file, [0, 4])
    for page in (5, 7):
        with pytest.raises(KVStoreError, match="the file ends before it"):
            read(file, [page])


def test_slots_outside_the_bank_are_refused(tmp_path) -> None:
    file, _, _ = filled(tmp_path)
    for slot, page in ((8, 0), (-1, 0)):
        with pytest.raises(IndexError):
            file.begin(torch.tensor([slot]), torch.tensor([page]))
    file.close()
    with pytest.raises(ValueError, match="closed"):
        read(file, [0])


# whole stores


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
