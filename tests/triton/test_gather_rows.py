"""gather_rows' kernel under Triton's interpreter, and a store that fetches by it."""

import pytest
import torch
from hga_cases import feed, small, store, tensors

from hici_kernels import _native
from hici_kernels._dispatch import select
from hici_kernels.errors import ImplError
from hici_kernels.ops.gather_rows import reference
from hici_kernels.ops.gather_rows import triton as launch
from hici_kernels.tuning.chips import pretend

CPU = torch.device("cpu")


@pytest.mark.parametrize("row_bytes", [4, 16, 60, 1024, 4096, 4100])
@pytest.mark.parametrize("shift", [0, 4])
def test_rows_from_anywhere(row_bytes: int, shift: int) -> None:
    g = torch.Generator().manual_seed(row_bytes)
    size = 7 * (row_bytes + 12)
    memory = torch.randint(0, 256, (size + shift,), generator=g, dtype=torch.uint8)
    offsets = torch.randperm(7, generator=g)[:5].sort(descending=True).values * (row_bytes + 12) // 4 * 4 + shift
    addresses = memory.data_ptr() + offsets
    expected = torch.stack([memory[i : i + row_bytes] for i in offsets.tolist()])
    for module in (launch, reference):
        found = module.forward(addresses, row_bytes, CPU)
        assert found.dtype == torch.uint8 and torch.equal(found, expected), module.__name__


def test_nothing_to_gather() -> None:
    assert launch.forward(torch.empty(0, dtype=torch.int64), 64, CPU).shape == (0, 64)


def test_what_is_not_served() -> None:
    with pretend("sm_70"), pytest.raises(ImplError, match="cpu is of sm_70"):
        select("gather_rows", "triton", torch.zeros(1, dtype=torch.int64), 4, CPU)
    with pytest.raises(ImplError, match="multiple of 4 bytes, row_bytes is 6"):
        select("gather_rows", "triton", torch.zeros(1, dtype=torch.int64), 6, CPU)
    with pytest.raises(ImplError, match="device is meta"):
        select("gather_rows", "triton", torch.zeros(1, dtype=torch.int64), 8, torch.device("meta"))


@pytest.mark.parametrize("bank_pages", [3, 1000])
@pytest.mark.parametrize("cold_dtype", [None, torch.int8])
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.usefixtures("references")
def test_a_store_that_gathers_holds_the_same_bits(
    tier: str, cold_dtype: torch.dtype | None, bank_pages: int, tmp_path
) -> None:
    if tier == "disk" and _native.status() is not None:
        pytest.skip("the tier disk needs the native library")
    q, k, v = tensors(200, dtype=torch.float32)
    rest = {"path": str(tmp_path)} if tier == "disk" else {}
    outs = {}
    for fetch in ("copy", "gather"):
        target = store(small(), k, tier=tier, fetch=fetch, bank_pages=bank_pages, cold_dtype=cold_dtype, **rest)
        target.attend(0, q[:, :100], k[:, :100], v[:, :100], impl="reference")
        cuts = list(range(5, 100, 5))
        outs[fetch] = feed(target, q[:, 100:], k[:, 100:], v[:, 100:], cuts, impl="triton")
        # a call of more pages goes past the bank, unless the device has found them
        assert target.stats()["bytes_moved"] > 0 or bank_pages == 3
        target.close()
    assert torch.equal(outs["copy"], outs["gather"])


@pytest.mark.usefixtures("references")
def test_it_is_the_kernel_that_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(120, dtype=torch.float32)
    target = store(small(), k, tier="host", fetch="gather", bank_pages=1000)
    calls = []
    forward = launch.forward
    monkeypatch.setattr(launch, "forward", lambda *a: calls.append(a) or forward(*a))
    feed(target, q, k, v, [60, 80, 100], impl="triton")
    pages = [a for a in calls if len(a) == 6 and a[4] is not None]
    fetched = sum(int((a[0] != 0).sum()) for a in pages)
    assert fetched and target.stats()["bytes_moved"] == fetched * 2 * 16 * 16 * 4
