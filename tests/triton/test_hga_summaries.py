"""hga_summaries' kernel under Triton's interpreter: against float64, and what must not matter."""

import pytest
import torch
from far_programs import only_ends

from hici_kernels import ImplError, Rope
from hici_kernels.ops.hga_summaries import triton as launch
from hici_kernels.ops.hga_summaries.api import hga_summaries
from hici_kernels.testing import assert_within_budget

pytest.importorskip("triton.language")

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, tokens, kv heads, head_dim, chunk, group, rotary_dim, theta
SHAPES = {
    "ragged": (2, 70, 2, 16, 16, 4, 16, 1e4),
    "partly rotary": (1, 130, 3, 80, 64, 16, 40, 1e6),
    "odd": (1, 40, 1, 5, 6, 3, 2, 1e3),
    "one token a chunk": (1, 9, 2, 64, 1, 1, 64, 1e4),
    "group is chunk": (1, 100, 2, 128, 80, 80, 128, 1e6),
    "wide": (1, 40, 1, 256, 32, 16, 256, 1e6),
}


def keys(shape, dtype):
    b, s, h, d, chunk, group, rotary, theta = SHAPES[shape]
    k = torch.randn(b, s, h, d, generator=torch.Generator().manual_seed(3)).to(dtype)
    return k, {"rope": Rope.from_theta(theta, rotary), "chunk_size": chunk, "group_size": group}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype):
    k, options = keys(shape, dtype)
    far = torch.arange(k.shape[1]) * 3 + 100_000
    for positions in (None, far, far.int().expand(k.shape[0], -1)):
        found = hga_summaries(k, positions=positions, impl="triton", **options)
        exact = hga_summaries(k.double(), positions=positions, impl="reference", **options)
        plain = hga_summaries(k, positions=positions, impl="reference", **options)
        for name, f, e, p in zip(("chunks", "groups"), found, exact, plain, strict=True):
            assert f.dtype == dtype and f.shape == e.shape
            assert_within_budget(e, f, p, name)


def test_a_chunk_has_the_same_bits_wherever_it_lies():
    k, options = keys("ragged", torch.bfloat16)
    chunks, groups = hga_summaries(k, impl="triton", **options)
    # memory between the tokens and behind them is NaN
    wide = k.new_full((2, 150, 3, 20), NAN)
    wide[:, 1:141:2, 1:, 2:18] = k
    for view in (wide[:, 1:141:2, 1:, 2:18], k.transpose(1, 2).contiguous().transpose(1, 2)):
        again = hga_summaries(view, impl="triton", **options)
        assert torch.equal(again[0], chunks) and torch.equal(again[1], groups)
    one = hga_summaries(k[1:, 32:48], impl="triton", **options)
    assert torch.equal(one[0], chunks[1:, 2:3]) and torch.equal(one[1], groups[1:, 2:3])
    dirty = k.clone()
    dirty[:, 64:] = NAN  # the open chunk is not read
    assert torch.equal(hga_summaries(dirty, impl="triton", **options)[0], chunks)


def test_closed_chunks_are_written_into_a_table():
    k, options = keys("ragged", torch.float32)
    chunks, groups = hga_summaries(k, impl="triton", **options)
    table, fine = k.new_full((2, 9, 3, 16), NAN), k.new_full((2, 9, 4, 3, 16), NAN)
    launch.into(k[:, 16:48], options["rope"].inv_freq, None, 16, 4, table[:, 5:7, 1:], fine[:, 5:7, :, 1:])
    assert torch.equal(table[:, 5:7, 1:], chunks[:, 1:3]) and torch.equal(fine[:, 5:7, :, 1:], groups[:, 1:3])
    assert table[:, :5].isnan().all() and table[:, 7:].isnan().all() and table[:, :, 0].isnan().all()


def test_columns_say_where_tokens_are():
    k, options = keys("ragged", torch.float32)
    columns = torch.stack([torch.randperm(70, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    moved = torch.empty_like(k)
    for b in range(2):
        moved[b, columns[b]] = k[b]
    found = launch.of_rows(moved, options["rope"].inv_freq, None, columns, 16, 4)
    for f, e in zip(found, hga_summaries(k, impl="triton", **options), strict=True):
        assert torch.equal(f, e)


def test_a_key_that_is_not_finite_stays_in_its_own_pairs():
    k, options = keys("ragged", torch.float32)
    k[0, 3, 0, 0], k[0, 5, 1, 15], k[1, 20, 0, 6] = torch.inf, NAN, -torch.inf
    found = hga_summaries(k, impl="triton", **options)
    exact, plain = (hga_summaries(x, impl="reference", **options) for x in (k.double(), k))
    for f, e, p in zip(found, exact, plain, strict=True):
        kept = e.isfinite()
        assert torch.equal(f.isfinite(), kept) and not kept.all()
        assert_within_budget(e[kept], f[kept], p[kept], "finite")


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    n, d = 2**17 + 8, 128
    k = torch.empty(1, 128 * n, 1, d, dtype=torch.bfloat16)
    assert k.numel() > 2**31
    options = {"rope": Rope.from_theta(1e6, d), "chunk_size": 128, "group_size": 64}
    k[:, -256:] = torch.randn(1, 256, 1, d, generator=torch.Generator().manual_seed(0)).to(k.dtype)
    with only_ends():
        found = hga_summaries(k, impl="triton", **options)
    for f, e in zip(found, hga_summaries(k[:, -256:], impl="triton", **options), strict=True):
        assert e.any() and torch.equal(f[:, -2:], e)


@pytest.mark.parametrize("s", [0, 15])
def test_no_closed_chunk(s):
    k, options = keys("ragged", torch.float32)
    chunks, groups = hga_summaries(k[:, :s], impl="triton", **options)
    assert chunks.shape == (2, 0, 2, 16) and groups.shape == (2, 0, 4, 2, 16)


def test_what_it_does_not_serve_it_says():
    k, options = keys("ragged", torch.float64)
    with pytest.raises(ImplError, match=r"k is torch\.float64"):
        hga_summaries(k, impl="triton", **options)
    with pytest.raises(ImplError, match="head_dim up to 512, k has 520"):
        hga_summaries(torch.zeros(1, 20, 1, 520), impl="triton", **options)
