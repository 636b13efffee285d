"""The file of the tier "disk" alone: every fault ends in right bytes or in KVStoreError."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hga_cases import path_of

from hici_kernels import KVStoreError, _native
from hici_kernels.kv.layout import aligned
from hici_kernels.kv.page_file import PageFile
from hici_kernels.kv.records import Records

pytestmark = pytest.mark.skipif(_native.status() is not None, reason="the tier disk needs the native library")
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


@pytest.fixture
def disk_of_large_blocks(tmp_path):
    """Where a disk with blocks of 4 KiB is mounted; needs the rights to do so."""
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with open(image, "wb") as whole:
        whole.truncate(64 << 20)
    try:
        loop = said("losetup", "-f", "--show", "--sector-size", "4096", str(image))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no loop device to be had")
    try:
        said("mkfs.ext4", "-q", "-b", "4096", loop)
        said("mount", loop, str(mounted))
    except (OSError, subprocess.CalledProcessError):
        said("losetup", "-d", loop)
        pytest.skip("nothing can be mounted")
    yield mounted
    said("umount", str(mounted))
    said("losetup", "-d", loop)


def said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_disk_with_larger_blocks_is_read_through_the_cache(disk_of_large_blocks, backend: str) -> None:
    """It takes no direct transfer that begins at every 512 bytes, and says so only when one is tried."""
    file, bank, data = filled(disk_of_large_blocks, backend=backend, stride=1536)
    assert not file.direct
    read(file, list(range(8)))
    assert torch.equal(bank[:, :-100], data[:, :-100])
    file.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_draining_ends_what_nobody_waits_for(tmp_path, backend: str) -> None:
    file, bank, data = filled(tmp_path, backend=backend, depth=2)
    for _ in range(20):
        bank.zero_()
        request = file.begin(torch.arange(8), torch.arange(8))
        file.drain()
        assert torch.equal(bank[:, :-100], data[:, :-100])
        file.end(request, torch.arange(8))
    file.drain()
    file.close()
    file.drain()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="io_uring is Linux's")
def test_a_ring_that_is_gone_is_an_error(tmp_path) -> None:
    """A program that closes descriptors it does not know: reads and writes say so instead of trying for ever."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            file, _, _ = filled(tmp_path)
            rings = [fd for fd in os.listdir("/proc/self/fd") if "io_uring" in link_of(fd)]
            for fd in rings:
                os.close(int(fd))
            code = 0 if not rings else 2
            if rings:
                for call in (lambda: read(file, [0, 1]), lambda: file.write(torch.arange(2), torch.arange(2))):
                    with pytest.raises(KVStoreError, match="Bad file descriptor"):
                        call()
                file.close()
                code = 0
        finally:
            os._exit(code)
    until = time.monotonic() + 60
    ended = (0, 0)
    while ended[0] == 0 and time.monotonic() < until:
        ended = os.waitpid(process, os.WNOHANG)
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert ended[0] == process and os.waitstatus_to_exitcode(ended[1]) == 0


def link_of(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
