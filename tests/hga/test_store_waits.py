"""What a device finds by itself is found without the host: everything on the device "meta", which holds no numbers.

Whoever asks a tensor there for what it holds gets an error.
"""

from __future__ import annotations

import pytest
import torch
from hga_cases import small, store

from hici_kernels.kv import on_device
from hici_kernels.kv.gather_bank import GatherBank
from hici_kernels.kv.layout import Layout
from hici_kernels.kv.meter import Meter
from hici_kernels.kv.pool import Pool

META = torch.device("meta")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that would be read, by call."""
    calls: list[int] = []

    def read(addresses, row_bytes, aligned, memory=None, places=None):
        calls.append(len(addresses))
        return addresses.new_empty(len(addresses), row_bytes, dtype=torch.uint8) if memory is None else memory

    monkeypatch.setattr(on_device, "refusal", lambda *_: None)
    monkeypatch.setattr(on_device, "read", read)
    return calls


@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
@pytest.mark.parametrize("cold_dtype", [None, torch.int8])
def test_no_decode_step_asks_the_device(routing: str, cold_dtype: torch.dtype | None, kernels: list[int]) -> None:
    """Two rows, chunks closing and leaving the window, one row taken back, rows exchanged."""
    k = torch.empty(2, 1, 2, 16, dtype=torch.bfloat16, device=META)
    target = store(small(routing=routing), k, device=META, cold_dtype=cold_dtype, layers=2)
    for i in range(60):
        for layer in range(2):
            q = torch.empty(2, 3, 4, 16, dtype=torch.bfloat16, device=META)
            kv = torch.empty(2, 3, 2, 16, dtype=torch.bfloat16, device=META)
            out = target.attend(layer, q, kv, kv)
            assert out.shape == q.shape and out.device == META
        if i == 30:
            target.rewind(50, 1)
        if i == 40:
            target.reorder([1, 0])
    assert target.lengths.tolist() == [50 + 3 * 29, 3 * 60]
    assert len(kernels) > 2 * 40 and max(kernels) > 0


def test_a_read_of_the_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way, through the host, cannot pass here."""
    k = torch.empty(1, 1, 2, 16, device=META)
    monkeypatch.setattr(on_device, "refusal", lambda *_: "no kernel")
    target = store(small(), k, device=META)
    with pytest.raises(NotImplementedError, match="meta"):
        target.attend(0, torch.empty(1, 1, 4, 16, device=META), k, k)


@pytest.mark.parametrize("slots", [0, 1, 40])
def test_no_request_of_the_bank_asks_the_device(slots: int, kernels: list[int]) -> None:
    layout, meter = Layout(8, 4, 3, 0, 8, torch.float32, None), Meter(None, None)
    pool = Pool("host", torch.device("cpu"), layout, meter)
    pool.write(torch.arange(20), torch.zeros(20, 3, layout.page_bytes, dtype=torch.uint8))
    bank = GatherBank(pool, slots, META, layout, meter, cycle=2)
    for n in (1, 7, 60):
        found = bank.addresses(torch.empty(n, dtype=torch.int64, device=META))
        assert found.shape == (n,) and found.device == META
    bank.free(torch.arange(5))
    assert kernels == ([1, 7, 60] if slots else [])
