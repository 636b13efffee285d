"""Measured ceilings: the loops do the work they count, on the path and the threads asked for."""

from __future__ import annotations

import pytest
import torch

from hici_kernels import _native
from hici_kernels.bench import ceilings

native = pytest.mark.skipif(not _native.paths(), reason="the native library is not usable here")
NUMBERS = list(_native.paths().values())
# Far above any processor's rate per thread, far below that of a loop the compiler has dropped.
IMPOSSIBLE = {"fma": 1e12, "bfloat16": 2e13, "exp": 1e11}
BF16 = str(torch.bfloat16)


@native
@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("work", IMPOSSIBLE)
def test_work_is_counted_over_rounds_and_threads(work: str, path: int) -> None:
    loop = _native.library().ceiling_loop
    once = loop(work, 1, path, 1)
    has_products = str(_native.library().ceiling_products(path)) != ""
    assert (once > 0) == (work != "bfloat16" or has_products)
    assert loop(work, 0, path, 1) == 0
    assert loop(work, 7, path, 1) == 7 * once
    assert loop(work, 7, path, 2) in (7 * once, 14 * once)  # a team may be smaller than asked for: only who ran counts


@native
@pytest.mark.parametrize("path", list(_native.paths()))
def test_rates_are_possible(path: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _native.path(path):
            found = ceilings.measure([torch.float32], stream_bytes=1 << 20, shortest=1e-3)
    finally:
        torch.set_num_threads(before)
    assert found["path"] == path
    assert 1e8 < found["fma_flops"] < IMPOSSIBLE["fma"] and 1e7 < found["exp_per_s"] < IMPOSSIBLE["exp"]
    if found["bfloat16_products"] is None:
        assert found["bfloat16_flops"] is None
    else:
        assert 1e8 < found["bfloat16_flops"] < IMPOSSIBLE["bfloat16"]
    assert found["matmul_flops"][str(torch.float32)] > 1e8
    assert found["copy_bytes_per_s"] > 1e7 and found["read_bytes_per_s"] > 1e7


@native
@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("count", [0, 1, 16, 40, 4096, (1 << 18) + 48, 3 << 18])
@pytest.mark.parametrize("threads", [1, 3])
def test_reading_reads_everything(path: int, count: int, threads: int) -> None:
    data = torch.arange(count, dtype=torch.float32) % 5
    expected = float(data[: count // 16 * 16].sum())
    assert _native.library().ceiling_read(data, path, threads) == expected


@native
@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("count", [0, 1, 9, 130, 700])
@pytest.mark.parametrize("size", [64, 4096, 8256])
def test_runs_are_read_wherever_they_are(path: int, count: int, size: int) -> None:
    data = (torch.arange(count * size // 4 * 2, dtype=torch.float32) % 5).view(2 * count, size // 4)
    chosen = torch.randperm(2 * count, generator=torch.Generator().manual_seed(count))[:count]
    at = data.data_ptr() + chosen * size
    expected = float(data[chosen].double().sum())
    for threads in (1, 3):
        assert _native.library().ceiling_read_runs(at, size, path, threads) == pytest.approx(expected, rel=1e-5)


@native
def test_bad_arguments_of_the_library() -> None:
    library = _native.library()
    with pytest.raises(ValueError, match="work must be fma, bfloat16 or exp"):
        library.ceiling_loop("sqrt", 1, -1, 1)
    with pytest.raises(ValueError, match="rounds must not be negative"):
        library.ceiling_loop("fma", -1, -1, 1)
    with pytest.raises(ValueError, match="path must be"):
        library.ceiling_products(17)
    with pytest.raises(ValueError, match="threads must be"):
        library.ceiling_loop("fma", 1, -1, 0)
    with pytest.raises(TypeError, match="data has a wrong dtype"):
        library.ceiling_read(torch.zeros(16, dtype=torch.float64), -1, 1)
    with pytest.raises(ValueError, match="bytes must be a positive multiple of 64"):
        library.ceiling_read_runs(torch.zeros(0, dtype=torch.int64), 100, -1, 1)
    with pytest.raises(ValueError, match="data must be contiguous"):
        library.ceiling_read(torch.zeros(16, 2)[:, 0], -1, 1)


@native
def test_name_of_the_path() -> None:
    names = list(_native.paths())
    assert ceilings.path_name() == names[-1]
    with _native.path(names[0]):
        assert ceilings.path_name() == names[0]


def test_without_the_library_matrix_products_take_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "status", lambda: "not built")
    found = ceilings.measure([torch.float32], stream_bytes=1 << 16)
    assert found["path"] is None and found["fma_flops"] is None and found["read_bytes_per_s"] is None
    assert ceilings.product_rate(found, torch.float32) == found["matmul_flops"][str(torch.float32)]


def given(products: str | None) -> dict:
    found = {"matmul_flops": {BF16: 1e10, str(torch.float64): 3e9}, "copy_bytes_per_s": 1e9, "exp_per_s": 1e9}
    return found | {"fma_flops": 1e11, "bfloat16_flops": 4e11 if products else None, "bfloat16_products": products}


@pytest.mark.parametrize(
    ("dtype", "products", "rate"),
    [
        (torch.float32, "amx", 1e11),
        (torch.float16, "amx", 1e11),
        (torch.bfloat16, "amx", 4e11),
        (torch.bfloat16, None, 1e11),  # a path without such products computes them in float
        (torch.float64, "amx", 3e9),
    ],
)
def test_rate_of_products(dtype: torch.dtype, products: str | None, rate: float) -> None:
    assert ceilings.product_rate(given(products), dtype) == rate


def test_roofline() -> None:
    vector, tiles = given("dpbf16"), given("amx")
    assert ceilings.least_seconds(vector, torch.bfloat16, 4e11, 2e9, 0) == pytest.approx(3)  # one set of units
    assert ceilings.least_seconds(tiles, torch.bfloat16, 4e11, 2e9, 0) == pytest.approx(2)  # tiles beside vectors
    assert ceilings.least_seconds(tiles, torch.float32, 1e11, 2e9, 0) == pytest.approx(3)
    assert ceilings.least_seconds(tiles, torch.float32, 1e11, 0, 7e9) == pytest.approx(7)
