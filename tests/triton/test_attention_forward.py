"""attention's forward kernels under Triton's interpreter: results against float64, and what must not matter."""

import random
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import NAMES, Case, dense, other_order, pointer, reserved, rounding, wide
from hici_cases import close, random_offsets
from hici_oracle import attention as loops
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_attention_op import case as random_case

from hici_kernels import attention, segments
from hici_kernels.errors import ImplError
from hici_kernels.ops.attention import triton as launch
from hici_kernels.ops.attention import triton_forward, triton_schedule
from hici_kernels.testing import assert_within_budget
from hici_kernels.tuning.lookup import trial

__all__ = ["rounding"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CU = (0, 5, 5, 29, 40)


@contextmanager
def tiles(block_m=16, block_n=16, tma=0):
    chosen = {"BLOCK_M": block_m, "BLOCK_N": block_n, "TMA": tma, "num_warps": 4, "num_stages": 1}
    with trial("attention", chosen):
        yield


def run(tensors, options, blocks=(16, 16)):
    with tiles(*blocks):
        return attention(**tensors, **options, return_lse=True, impl="triton")


def check(tensors, options, blocks=(16, 16)):
    out, lse = run(tensors, options, blocks)
    expected, expected_lse = dense(wide(tensors), options)
    plain, plain_lse = dense(tensors, options)
    assert out.dtype == tensors["q"].dtype and lse.dtype == F32
    assert out.shape == expected.shape and lse.shape == expected_lse.shape
    assert_within_budget(expected_lse, lse, plain_lse, f"lse {options}")
    assert_within_budget(expected, out, plain, f"out {options}")
    unseen = (expected_lse == -torch.inf).transpose(1, 2)
    assert not out[unseen].any()
    return out, lse


def each_dtype(name, **fields):
    return [Case(f"{name} {str(d).removeprefix('torch.')}", dtype=d, **fields) for d in (F32, BF16, F16)]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_query_that_is_no_number_gets_none(dtype):
    q, k, v = (torch.randn(1, 3, 1, 16).to(dtype) for _ in range(3))
    q[0, 1] = torch.nan
    tensors = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    out, lse = run(tensors, {})
    assert out[0, 1].isnan().all() and lse[0, 0, 1].isnan()
    assert out[0, [0, 2]].isfinite().all() and lse[0, 0, [0, 2]].isfinite().all()
    with tiles():
        out.float().sum().backward()
    assert v.grad[0, :2].isnan().all() and v.grad[0, 2].isfinite().all()


CASES = [
    # shapes of tiles, segments and heads
    *each_dtype("one segment"),
    *each_dtype("full attention", causal=False),
    *each_dtype("segments", segment_len=16),
    *each_dtype("ragged last segment", segment_len=13, causal=False),
    Case("one tile", tokens=7),
    Case("one token", tokens=1),
    Case("segments of one token", tokens=5, segment_len=1, shared=2),
    Case("segment longer than the sequence", tokens=11, segment_len=64),
    Case("segment length a multiple of the tile, many segments", tokens=70, segment_len=32, batch=2),
    Case("query tile taller than key tile", tokens=50, blocks=(32, 16), segment_len=40),
    Case("key tile wider than query tile", tokens=50, blocks=(16, 32), segment_len=40),
    Case("key tile wider than the segment", tokens=30, blocks=(16, 64), segment_len=9, recurrence_len=3),
    Case("one kv head per query head", heads=(3, 3), batch=2, tokens=20),
    Case("three query heads per kv head", heads=(6, 2), tokens=20, blocks=(32, 16)),
    Case("four query heads per kv head, packed two", heads=(4, 1), tokens=50, blocks=(32, 16)),
    Case("seven query heads per kv head", heads=(7, 1), tokens=3),
    Case("heads first in memory", layout="bhsd", heads=(4, 2), batch=2, tokens=20),
    Case("q, k, v in one tensor", layout="fused", heads=(4, 2), batch=2, tokens=20, segment_len=12),
    # head dimensions: powers of two, two blocks, columns that are not there
    *[Case(f"head_dim {d}", head_dim=d, tokens=20, shared=1, local=2, dtype=BF16) for d in (64, 80, 96, 128, 256)],
    *[Case(f"head_dim {d}", head_dim=d, tokens=20, local=3) for d in (1, 2, 3, 17, 40, 72, 80, 160, 200, 255)],
    # slots
    *each_dtype("shared global slots and local slots", segment_len=16, shared=4, local=8),
    *each_dtype("global slots per segment and local slots", segment_len=16, each=4, local=8, batch=2, tokens=33),
    Case("global slots alone", shared=5, segment_len=20),
    Case("global slots per segment alone", each=5, segment_len=20, batch=2),
    Case("local slots alone", local=5, segment_len=20, batch=2),
    Case("16 slots", shared=6, local=10, segment_len=20),
    Case("17 slots", shared=9, local=8, segment_len=20, dtype=BF16),
    Case("40 slots, a tile of both kinds", shared=20, local=20, segment_len=20),
    Case("no slots in tensors of slots", shared=0, local=0, segment_len=20),
    Case("local slots beside none global", each=0, local=3, segment_len=20),
    Case("prefix_mask [N]", shared=4, local=3, segment_len=7, prefix_mask=1),
    Case("prefix_mask [B, N]", each=4, local=3, segment_len=7, prefix_mask=2, batch=2, dtype=F16),
    Case("prefix_mask without slots", segment_len=7, prefix_mask=1),
    # recurrence
    Case("recurrence", segment_len=16, recurrence_len=5, shared=2),
    Case("recurrence of a whole segment", segment_len=13, recurrence_len=13, dtype=BF16),
    Case("recurrence, full attention", segment_len=13, recurrence_len=7, causal=False, local=2),
    # masks over tokens
    *[Case(f"mask {kind}", mask=kind, batch=2, shared=2, segment_len=18) for kind in ("left", "right", "holes", "gap")],
    Case("mask, no slots, row without tokens", mask="empty_row", batch=2, segment_len=18),
    Case("mask, slots, row without tokens", mask="empty_row", batch=2, segment_len=18, local=2, dtype=BF16),
    Case(
        "mask, recurrence, prefix_mask", mask="mixed", batch=3, segment_len=9, recurrence_len=4, local=2, prefix_mask=2
    ),
    Case("mask, full attention", mask="holes", batch=2, segment_len=18, causal=False),
    Case("bool mask", mask="holes", batch=2, mask_dtype=torch.bool),
    Case("float mask", mask="left", batch=2, mask_dtype=BF16, dtype=BF16),
    Case("byte mask", mask="gap", batch=2, mask_dtype=torch.uint8, segment_len=12),
    # packed documents
    *each_dtype("documents", cu=CU, segment_len=8, shared=2, local=3),
    Case("documents of one segment each", cu=CU, shared=2, heads=(4, 2)),
    Case("documents, recurrence", cu=CU, segment_len=8, recurrence_len=3, local=1),
    Case("documents, recurrence, full attention", cu=CU, segment_len=8, recurrence_len=8, causal=False),
    Case("documents, masks", cu=CU, segment_len=6, each=2, mask="holes", prefix_mask=1, recurrence_len=2, dtype=BF16),
    Case("documents without slots", cu=(0, 0, 17, 40, 40), segment_len=16),
    Case("one document", cu=(0, 40), segment_len=11),
    Case("documents, packed heads", cu=CU, segment_len=20, heads=(8, 2), blocks=(32, 16), dtype=F16),
    # fewer queries than keys
    *each_dtype("one query", queries=1, heads=(8, 2), local=3),
    Case("one query, last segment", queries=1, segment_len=16, recurrence_len=5, shared=3),
    Case("last queries across segments", queries=19, segment_len=16, each=2, local=2, batch=2),
    Case("last queries, not at a tile", queries=9, tokens=41, heads=(4, 2)),
    Case("last queries, full attention", queries=9, segment_len=16, causal=False),
    Case("last queries, mask", queries=9, mask="right", batch=2, segment_len=25, local=1),
    # scale
    Case("scale", scale=1.7, local=2),
    Case("scale 0", scale=0.0, local=2, mask="left"),
    Case("negative scale", scale=-0.6, local=2, dtype=BF16, head_dim=48),
]


def test_there_are_enough_cases():
    assert len({c.name for c in CASES} | {(c.name, c.head_dim, c.dtype) for c in CASES}) > 60


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_within_the_budget_of_float64(case):
    tensors, options = case.make()
    check(tensors, options, case.blocks)


@pytest.mark.parametrize("seed", range(12))
def test_the_dense_oracle_is_that_of_the_loops(seed):
    tensors, options = random_case(seed)
    for found, expected in zip(dense(tensors, options), loops(**tensors, **options), strict=True):
        close(found, expected, 1e-12)


def fuzz(seed):
    rng = random.Random(seed)
    dtype = rng.choice([F32, BF16, F16])
    tensors, options = random_case(seed, dtype, big=rng.random() < 0.2)
    if tensors["q"].numel():
        check(tensors, options, rng.choice([(16, 16), (32, 16), (16, 32)]))


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 2**31))
def test_fuzz(seed):
    fuzz(seed)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_fuzz_at_length(seed):
    fuzz(seed)


@pytest.mark.parametrize("batch, t, s", [(0, 5, 5), (2, 0, 0), (2, 0, 5)])
def test_empty_inputs(batch, t, s):
    q, k, v = (torch.randn(batch, n, h, 4) for n, h in ((t, 4), (s, 2), (s, 2)))
    out, lse = attention(q, k, v, segment_len=2, return_lse=True, impl="triton")
    assert out.shape == (batch, t, 4, 4) and lse.shape == (batch, 4, t)


# ---- what must not matter


def poisoned(case, seed, value):
    """The case's tensors with ``value`` wherever nothing may be read into a result."""
    tensors, options = case.make(seed)
    mask, shown = options["attention_mask"], options["prefix_mask"]
    dirty = {name: x.clone() for name, x in tensors.items()}
    first = case.tokens - tensors["q"].shape[1]
    if mask is not None:
        masked = mask == 0
        dirty["k"][masked] = value
        dirty["v"][masked] = value
        dirty["q"][masked[:, first:]] = value
    if shown is not None:
        for name in NAMES[3:]:
            if name in dirty and dirty[name].ndim == 5:
                dirty[name][~shown.expand(case.batch, -1)] = value
    if not case.causal or case.segment_len is None or case.cu is not None:
        return tensors, dirty, options
    # keys that no query reads: segments that end before the first query's keys begin
    begin = first // case.segment_len * case.segment_len
    begin -= case.recurrence_len if begin else 0
    for name in "kv":
        dirty[name][:, :begin] = value
    return tensors, dirty, options


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "case",
    [
        Case("masks", mask="mixed", batch=2, segment_len=18, local=3, each=2, prefix_mask=2, heads=(2, 2)),
        Case("all masked", mask="empty_row", batch=2, segment_len=18, prefix_mask=2, each=2),
        Case("documents", cu=CU, segment_len=7, recurrence_len=4, mask="holes", local=2, prefix_mask=1, dtype=BF16),
        Case("full", mask="gap", batch=2, segment_len=18, causal=False, head_dim=24),
        Case("decoding", queries=5, segment_len=12, recurrence_len=3, local=2, prefix_mask=1),
    ],
    ids=lambda c: c.name,
)
def test_memory_that_is_not_seen_may_hold_anything(case, value):
    tensors, dirty, options = poisoned(case, 3, value)
    assert any(not torch.equal(tensors[n], dirty[n]) for n in tensors)
    for found, expected in zip(run(dirty, options), run(tensors, options), strict=True):
        assert torch.equal(found, expected)


def test_rows_between_the_given_ones_are_not_read():
    """Views into a larger tensor of NaN: beyond the last token, between rows, beyond the last column."""
    case = Case("", tokens=37, segment_len=16, local=3, shared=2, heads=(4, 2), head_dim=20)
    tensors, options = case.make()
    views = {}
    for name, x in tensors.items():
        space = torch.full([n + 3 for n in x.shape], float("nan"))
        views[name] = space[tuple(slice(2, 2 + n) for n in x.shape)]
        views[name].copy_(x)
    for found, expected in zip(run(views, options), run(tensors, options), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "case",
    [
        Case("one segment", heads=(4, 2), local=2),
        Case("segments, recurrence", segment_len=13, recurrence_len=4, shared=2, blocks=(16, 32)),
        Case("documents", cu=CU, segment_len=9, recurrence_len=9),
        Case("mask", mask="holes", segment_len=20, blocks=(32, 16), heads=(2, 2)),
        Case("last queries", queries=15, segment_len=25, dtype=BF16),
    ],
    ids=lambda c: c.name,
)
def test_no_result_depends_on_a_later_token(case):
    tensors, options = case.make()
    out, lse = run(tensors, options, case.blocks)
    first = case.tokens - tensors["q"].shape[1]
    changed_once = False
    for t in range(first, case.tokens, 11):
        later = {name: x.clone() for name, x in tensors.items()}
        for name in ("k", "v"):
            later[name][:, t + 1 :] = torch.randn_like(later[name][:, t + 1 :]) * 100
        found, found_lse = run(later, options, case.blocks)
        assert torch.equal(found[:, : t + 1 - first], out[:, : t + 1 - first]), t
        assert torch.equal(found_lse[:, :, : t + 1 - first], lse[:, :, : t + 1 - first]), t
        changed_once |= not torch.equal(found, out)
    assert changed_once


@pytest.mark.parametrize("causal", [True, False])
def test_every_visible_token_and_slot_reaches_the_result_and_no_other(causal):
    """Values are unit vectors, so that a column of the result is the weight of one key."""
    case = Case("", tokens=36, segment_len=12, recurrence_len=5, shared=2, local=3, head_dim=47, heads=(2, 1))
    tensors, options = case.make()
    unit = torch.eye(47)
    tensors["v"][0, :, 0] = unit[:36]
    tensors["global_v"][0, :, 0] = unit[36:38]
    for i in range(3):
        tensors["local_v"][0, i, :, 0] = unit[38 + 3 * i : 41 + 3 * i]
    out, _ = run(tensors, {**options, "causal": causal})
    for t in range(36):
        i = t // 12
        last = t if causal else 12 * i + 11
        seen = set(range(max(12 * i - 5, 0), last + 1)) | {36, 37} | set(range(38 + 3 * i, 41 + 3 * i))
        for h in range(2):
            assert set(out[0, t, h].nonzero().flatten().tolist()) == seen, t
        close(out[0, t].sum(-1), torch.ones(2), 1e-5)


def test_large_scores_stay_finite():
    q, k, v = (1e10 * torch.randn(1, 20, 2, 8) for _ in range(3))
    out, lse = attention(q, k, v, segment_len=8, return_lse=True, impl="triton")
    expected, _ = dense(wide({"q": q, "k": k, "v": v}), Case("", segment_len=8).make()[1])
    assert lse.isfinite().all()
    close(out, expected, 1e-5)


# ---- repeatable


REPEATED = [
    Case("segments, slots, recurrence", segment_len=13, recurrence_len=4, shared=3, local=2, heads=(4, 2), batch=2),
    Case("documents, masks", cu=CU, segment_len=6, each=2, local=1, mask="holes", prefix_mask=1, dtype=BF16),
    Case("runs of keys", tokens=150, queries=1, heads=(4, 2), local=2, dtype=F16),
]


@pytest.mark.parametrize("case", REPEATED, ids=lambda c: c.name)
def test_neither_the_order_of_programs_nor_what_new_memory_holds_matters(case, monkeypatch):
    """Bits are the same whichever program runs first and whatever results and buffers held."""
    tensors, options = case.make()
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 40)
    expected = run(tensors, options)
    empty, made = torch.empty, []

    def dirty(*args, **kwargs):
        made.append(empty(*args, **kwargs))
        return made[-1].fill_(float("nan") if made[-1].is_floating_point() else 0)

    monkeypatch.setattr(torch, "empty", dirty)
    with other_order() as order:
        found = run(tensors, options)
    assert any(a != b for a, b in order) and len(made) >= 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- keys copied by descriptors


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "fused"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_descriptors_copy_the_same_keys(layout, dtype):
    case = Case("", tokens=36, batch=2, heads=(2, 2), segment_len=35, local=3, layout=layout, dtype=dtype)
    tensors, options = case.make()
    with mock.patch.object(launch, "descriptors", side_effect=launch.descriptors) as made:
        found = check(tensors, options, (16, 16, 1))
        assert made.called and made.side_effect(tensors["k"], tensors["v"], 16) is not None
    for a, b in zip(found, run(tensors, options), strict=True):
        assert torch.equal(a, b)


def test_descriptors_are_made_only_where_the_layout_is_a_matrix():
    space = torch.zeros(2, 3000)
    good = space.as_strided((2, 20, 2, 16), (960, 48, 16, 1))
    assert launch.descriptors(good, good, 16)[2:] == (20, 0, 16, 20, 0, 16)
    heads_first = space.as_strided((2, 20, 2, 16), (960, 16, 320, 1))
    assert launch.descriptors(good, heads_first, 16)[5:] == (60, 20, 0)
    for strides in ((962, 48, 16, 1), (960, 42, 16, 1), (1200, 16, 325, 1), (960, 0, 16, 1)):
        assert launch.descriptors(good, space.as_strided((2, 20, 2, 16), strides), 16) is None, strides
    assert launch.descriptors(space.as_strided((2, 20, 2, 16), (960, 48, 16, 1), 1), good, 16) is None


# ---- keys cut into runs


@pytest.mark.parametrize("dtype, processors", [(F32, 40), (BF16, 200)])
@pytest.mark.parametrize(
    "case",
    [
        Case("one query", tokens=150, queries=1, heads=(4, 2), shared=2, local=3),
        Case("a few queries, head_dim in two blocks", tokens=130, queries=3, head_dim=24, batch=2),
        Case("mask", tokens=140, queries=2, mask="holes", batch=2, segment_len=130, recurrence_len=60, local=2),
        Case("full attention, last queries", tokens=150, queries=20, causal=False),
        Case("row that sees nothing", tokens=140, queries=1, mask="empty_row", batch=2),
    ],
    ids=lambda c: c.name,
)
def test_runs_of_keys_are_merged(case, processors, dtype, monkeypatch):
    tensors, options = case.make()
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    seen = []
    original = launch.splits_for
    monkeypatch.setattr(launch, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(launch, "splits_for", lambda *a: seen.append(original(*a)) or seen[-1])
    check(tensors, options)
    assert seen[-1] > 1


@pytest.mark.parametrize("programs, keys, processors", [(1, 1000, 132), (8, 100, 132), (70, 100, 132), (1, 3, 132)])
def test_number_of_runs(programs, keys, processors):
    splits = launch.splits_for(programs, keys, processors)
    assert splits >= 1
    assert splits == 1 or (programs * splits <= 2 * processors and splits * launch.SPLIT_TILES <= keys)


# ---- the choice of tiles


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_column_blocks_hold_the_head(dtype):
    for d in range(1, 257):
        a, b = launch.column_blocks(d, dtype)
        assert a >= 16 and a & (a - 1) == 0 and b & (b - 1) == 0 and (b == 0 or b >= 16), d
        assert a + b >= d and (b == 0 or a < d), d
        assert a + b < 2 * max(d, 9), d


def test_column_blocks_of_common_heads():
    blocks = [launch.column_blocks(d) for d in (64, 80, 96, 128, 160, 192, 256)]
    assert blocks == [(64, 0), (64, 16), (64, 32), (128, 0), (128, 32), (128, 64), (256, 0)]
    assert [launch.column_blocks(d, F32) for d in (64, 96, 128, 256)] == [(64, 0), (64, 32), (64, 64), (128, 128)]


@pytest.mark.parametrize("queries", [1, 5, 4096])
@pytest.mark.parametrize("block", [16, 128])
def test_packed_heads_divide_the_group_and_fit_the_tile(queries, block):
    for group in (1, 2, 3, 4, 6, 7, 8, 71, 128):
        pack = launch.packed_heads(group, queries, block)
        assert group % pack == 0 and pack <= block
        assert pack * queries <= block or block // pack >= 16 or pack == 1
        if queries == 1 and group <= block:
            assert pack == group


# ---- where tiles lie


@triton.jit
def read_tiles(
    out,
    tile_table,
    tiles_per_segment,
    first_segment,
    first_query,
    segment_len,
    recurrence_len,
    tokens,
    SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    x = tl.program_id(0)
    segment, first, start, stop, back, reach = triton_schedule.tile_of(
        x,
        tile_table,
        tiles_per_segment,
        first_segment,
        first_query,
        segment_len,
        recurrence_len,
        tokens,
        SIZE=SIZE,
        PACKED=PACKED,
        REVERSE=REVERSE,
    )
    tl.store(out + x * 6, segment)
    tl.store(out + x * 6 + 1, first)
    tl.store(out + x * 6 + 2, start)
    tl.store(out + x * 6 + 3, stop)
    tl.store(out + x * 6 + 4, back)
    tl.store(out + x * 6 + 5, reach)


def expected_tiles(tokens, first, segment_len, recurrence_len, cu, size, reverse):
    spans = segments.spans(tokens, segment_len, cu)
    found = []
    for i, (start, stop, opens) in enumerate(spans):
        continued = i + 1 < len(spans) and not spans[i + 1].first and recurrence_len > 0
        reach = spans[i + 1].stop if continued else stop
        cuts = list(range(max(start, first), stop, size))
        for at in reversed(cuts) if reverse else cuts:
            found.append([i, at, start, stop, 0 if opens else recurrence_len, reach])
    return found


def tiles_of(tokens, queries, segment_len, recurrence_len, cu, size, reverse, whole=False, slots=(None, None, None)):
    q, k = torch.empty(1, queries, 1, 1), torch.empty(1, tokens, 1, 1)
    cut = triton_schedule.Cut.of(q, k, segment_len or 0, recurrence_len, cu, slots)
    found = cut.tiles(size, queries=not whole, reverse=reverse)
    rows = torch.full((found.count, 6), -7, dtype=torch.int32)
    if found.count:
        read_tiles[(found.count,)](rows, **found.arguments, SIZE=size, PACKED=cut.packed, REVERSE=reverse)
    return rows.tolist()


@pytest.mark.parametrize("seed", range(24))
def test_tiles_are_those_of_the_segments(seed):
    rng = random.Random(seed)
    tokens = rng.randint(1, 60)
    cu = random_offsets(rng, tokens, rng.choice([1, 3, 7])) if seed % 2 else None
    queries = tokens if cu is not None or rng.random() < 0.5 else rng.randint(1, tokens)
    segment_len = rng.choice([None, 1, 5, 8, 16, 100])
    recurrence_len = rng.randint(0, segment_len) if segment_len else 0
    size, reverse, whole = rng.choice([1, 4, 16, 64]), rng.random() < 0.5, rng.random() < 0.3
    rows = tiles_of(tokens, queries, segment_len, recurrence_len, cu, size, reverse, whole)
    real = [r for r in rows if r[1] < r[3]]
    first = 0 if whole else tokens - queries
    assert real == expected_tiles(tokens, first, segment_len, recurrence_len, cu, size, reverse)
    assert all(r == [0] * 6 for r in rows if r not in real) or cu is None


def test_more_documents_and_tiles_than_one_step_takes():
    cu = random_offsets(random.Random(1), 700, 150)
    rows = [r for r in tiles_of(700, 700, 6, 2, cu, 4, True) if r[1] < r[3]]
    assert rows == expected_tiles(700, 0, 6, 2, cu, 4, True)


@pytest.mark.parametrize("entries", [[0, 90, -5, 40], [7, 3, 20], [0, 40, 40, 80], [-9, 200]])
def test_contents_that_are_no_offsets_stay_inside(entries):
    cu = torch.tensor(entries, dtype=torch.int32)
    local = torch.empty(1, 4, 2, 1, 1)
    for segment, first, start, stop, back, reach in tiles_of(40, 40, 8, 3, cu, 4, True, slots=(None, local, None)):
        assert 0 <= segment < 4
        assert first >= stop or (start >= back and start <= first and stop <= reach <= 40)


# ---- addresses


def test_offsets_are_64_bit():
    """The last position of 512K with 64 query and 4 kv heads of 128, in memory that is reserved and never filled."""
    tokens, hq, hkv, d, n = 2**19, 64, 4, 128, 20
    width = (hq + 2 * hkv) * d
    segment, slot_stride = 2**17, 2**15
    sizes = {"fused": tokens * width, "out": tokens * hq * d, "slots": (segment + 1) * slot_stride}
    assert min(sizes.values()) > 2**31
    view = {name: reserved(size) for name, size in sizes.items()}
    fused = view["fused"].view(tokens, hq + 2 * hkv, d)
    torch.manual_seed(0)
    fused[-n:] = torch.randn(n, hq + 2 * hkv, d).to(BF16)
    slots = view["slots"].view(segment + 1, slot_stride)[-1, : 6 * hkv * d].view(2, 3, hkv, d)
    slots.copy_(torch.randn(2, 3, hkv, d))
    q, k, v = fused[-n:].split((hq, hkv, hkv), 1)
    inputs = {"q": q[None, -1:], "k": k[None], "v": v[None]}
    inputs |= {"local_k": slots[None, None, 0], "local_v": slots[None, None, 1]}
    expected, expected_lse = dense(wide(inputs), Case("").make()[1])

    table = torch.tensor([[segment, tokens - 1, tokens - n, tokens, 0, tokens, 0, 0]], dtype=torch.int32)
    lse = torch.full((1, hq, tokens), 7.0)
    strides = {name: 0 for name in triton_forward.attention_forward.arg_names if name.startswith("stride_")}
    for name in "qkv":
        strides |= {f"stride_{name}{'t' if name == 'q' else 'n'}": width, f"stride_{name}h": d}
    for name in ("lk", "lv"):
        strides |= {f"stride_{name}i": slot_stride, f"stride_{name}j": hkv * d, f"stride_{name}h": d}
    triton_forward.attention_forward[(1, hkv, 1)](
        q=pointer(view["fused"]),
        k=pointer(view["fused"], hq * d),
        v=pointer(view["fused"], (hq + hkv) * d),
        global_k=None,
        global_v=None,
        local_k=pointer(view["slots"]),
        local_v=pointer(view["slots"], 3 * hkv * d),
        prefix_mask=None,
        attention_mask=None,
        out=pointer(view["out"]),
        lse=lse,
        scale=d**-0.5,
        factor=d**-0.5 * launch.LOG2E,
        **strides,
        k_descriptor=None,
        v_descriptor=None,
        **{f"{side}_{place}": 0 for side in "kv" for place in ("row_b", "row_h", "column_h")},
        queries=tokens,
        global_slots=0,
        local_slots=3,
        group=hq // hkv,
        splits=1,
        tile_table=table,
        tiles_per_segment=1,
        first_segment=0,
        first_query=0,
        segment_len=n,
        recurrence_len=0,
        tokens=tokens,
        HEAD_DIM=d,
        BLOCK_M=16,
        BLOCK_N=16,
        BLOCK_D=128,
        BLOCK_E=0,
        PACK=16,
        CAUSAL=True,
        PACKED=True,
        SPLIT=False,
        FUSED=True,
        SIGN=1,
    )
    plain, plain_lse = dense(inputs, Case("").make()[1])
    assert_within_budget(expected, view["out"].view(1, tokens, hq, d)[:, -1:], plain, "out")
    assert_within_budget(expected_lse, lse[:, :, -1:], plain_lse, "lse")
    assert (lse[:, :, :-1] == 7.0).all()


# ---- what is refused


def test_float64_is_refused():
    q = torch.randn(1, 4, 1, 8, dtype=torch.float64)
    with pytest.raises(ImplError, match=r"q is torch\.float64"):
        attention(q, q, q, impl="triton")


def test_wide_heads_are_refused():
    q = torch.randn(1, 2, 1, 257)
    with pytest.raises(ImplError, match="head_dim up to 256, q has 257"):
        attention(q, q, q, impl="triton")


def test_cpu_tensors_are_refused_where_kernels_are_compiled():
    q = torch.randn(1, 2, 1, 8)
    with mock.patch.object(triton_forward, "INTERPRET", tl.constexpr(False)):
        reason = launch.rejects(q=q, k=q)
    assert reason is not None and "q is on cpu" in reason


def test_bfloat16_weights_are_rounded_to_nearest_before_they_multiply_values():
    """Two weights of opposite values, one above and one below the middle of two bfloat16: their difference is one ulp.

    Without rounding it would be half of that, with rounding down nothing.
    """
    ulp = 2.0**-10
    wanted = torch.tensor([207.6, 207.1], dtype=torch.float64) * ulp
    coarse = wanted.log().to(BF16)
    fine = (wanted.log() - coarse.double()).to(BF16)
    q, k, v = (torch.zeros(1, 3, 1, 16, dtype=BF16) for _ in range(3))
    q[..., :2] = 1.0
    k[0, :2, 0, 0], k[0, :2, 0, 1] = coarse, fine
    v[0, 0], v[0, 1] = 1.0, -1.0
    out, _ = run({"q": q, "k": k, "v": v}, {"causal": False, "scale": 1.0})
    close(out[0, 0, 0].double(), torch.full((16,), ulp / (1 + float(wanted.sum())), dtype=torch.float64), 0.02 * ulp)
