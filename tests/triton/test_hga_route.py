"""hga_route's kernels under Triton's interpreter.

Scores here are sums of few halves, exact in every dtype and order, with many ties: ids must be the reference's.
"""

import random

import pytest
import torch

from hici_kernels import HGAConfig, ImplError
from hici_kernels.ops.hga_route import triton as launch
from hici_kernels.ops.hga_route.api import budgets, hga_route
from hici_kernels.ops.hga_route.op import route_forward
from hici_kernels.tuning.chips import SHARED_MEMORY, pretend

pytest.importorskip("triton.language")

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def config(**changes):
    fields = {"chunk_size": 16, "group_size": 4, "keep_first": 1, "keep_last": 1, "topk_chunks": 3, "topk_groups": 5}
    return HGAConfig(**{**fields, "route_block": 8, **changes})


def tables(t, n, *, c=None, b=1, hq=4, hkv=2, d=16, dtype=torch.float32, seed=0):
    m = (c or config()).groups_per_chunk
    g = torch.Generator().manual_seed(seed)
    sizes = ((b, t, hq, d), (b, n, hkv, d), (b, n, m, hkv, d))
    return tuple(torch.randint(-2, 3, s, generator=g).to(dtype) / 2 for s in sizes)


def same(x, c, **options):
    found = hga_route(*x, c, impl="triton", **options)
    assert torch.equal(found, hga_route(*x, c, impl="reference", **options))
    return found


@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
@pytest.mark.parametrize("share", ["query", "kv"])
def test_rules(routing, share):
    c = config(routing=routing, share=share)
    found = same(tables(20, 9, b=2 if routing == "strict" else 1), c)
    assert (found >= 0).any()


@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
def test_without_a_window_the_previous_chunk_is_forced(routing):
    c = config(routing=routing, keep_last=0, topk_chunks=2, share="kv")
    at = torch.arange(78, 90).view(1, -1)
    found = same(tables(12, 9), c, positions=at)
    if routing == "strict":
        assert (found >= 0).any(-1).all()


@pytest.mark.parametrize(("group", "d"), [*((g, d) for g in (1, 4, 8) for d in (64, 80, 128)), (2, 256), (3, 5)])
def test_heads_and_widths(group, d):
    dtype = DTYPES[(group + d) % 3]
    same(tables(3, 20, hq=group, hkv=1, d=d, dtype=dtype), config(topk_groups=2 + group))


@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_heads_some_columns_at_a_time(routing, dtype):
    same(tables(6, 9, hq=6, hkv=2, d=160, dtype=dtype), config(routing=routing, share="kv"))


@pytest.mark.parametrize("arch", sorted(SHARED_MEMORY))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_tiles_fit_shared_memory(arch, dtype):
    q = torch.empty(1, 1, 64, 256, dtype=dtype, device="meta")
    with pretend(arch):
        for rows, keys in ((64, 128), (128, 256)):
            wide = launch.columns(q, rows, keys)
            assert 16 <= wide <= 256 and (rows + keys) * wide * q.element_size() <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_history_is_cut_into_runs(dtype, monkeypatch):
    x, c = tables(2, 300, dtype=dtype, hq=6), config(topk_chunks=5)
    whole = same(x, c)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 4)
    assert torch.equal(same(x, c), whole)


def test_queries_in_slices(monkeypatch):
    x, c = tables(20, 9), config()
    whole = same(x, c)
    monkeypatch.setattr(launch, "SCRATCH", 64)
    assert torch.equal(same(x, c), whole)
    parts = [
        hga_route(x[0][:, i : i + 1], *x[1:], c, positions=torch.tensor([[124 + i]]), impl="triton") for i in (0, 7)
    ]
    assert torch.equal(torch.cat(parts, 1), whole[:, [0, 7]])


@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
def test_positions_with_holes(routing):
    c = config(routing=routing)
    at = torch.arange(150, 162).view(1, -1).clone()
    at[0, [0, 5, 11]] = -1
    x = tables(12, 9)
    x[0][0, [0, 5, 11]] = NAN
    found = same(x, c, positions=at)
    assert (found[0, [0, 5, 11]] == -1).all()


def test_context_feeds_maxima_and_gets_no_route():
    c = config(routing="prefix")
    q, *rest = tables(14, 9)
    at = torch.arange(144, 158).view(1, -1)
    found = [route_forward(q, *rest, at, 5, *budgets(c), impl) for impl in ("triton", "reference")]
    assert torch.equal(*found) and found[0].shape[1] == 9
    c = config()
    found = [route_forward(q, *rest, None, 5, *budgets(c), impl) for impl in ("triton", "reference")]
    assert torch.equal(*found)


def test_scores_that_are_no_numbers():
    q, chunks, groups = tables(2, 12)
    chunks[0, 4, 0, 3] = NAN
    chunks[0, 5] = -torch.inf * torch.ones_like(chunks[0, 5])
    groups[0, 7, 2] = NAN
    same((q.abs() + 1, chunks, groups), config())
    same((torch.zeros_like(q), -chunks.nan_to_num(0, 0, 0), groups.nan_to_num(0)), config())


def test_memory_of_others_is_not_read():
    c = config()
    q, chunks, groups = tables(3, 9, b=2)
    wide = [x.new_full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3), NAN) for x in (q, chunks, groups)]
    views = [w[..., 1:, 2:-1] for w in wide]
    for view, x in zip(views, (q, chunks, groups), strict=True):
        view.copy_(x)
    assert torch.equal(same(views, c), same((q, chunks, groups), c))


@pytest.mark.parametrize(
    "changes", [{"topk_groups": 0}, {"topk_chunks": 0}, {"topk_groups": 100}, {"keep_first": 30}, {"topk_chunks": 50}]
)
def test_budgets_beyond_what_there_is(changes):
    same(tables(2, 5), config(**changes))


def test_nothing_closed_and_no_queries():
    same(tables(3, 0), config())
    same(tables(0, 5), config())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_fuzz(seed):
    rng = random.Random(seed)
    size = rng.choice([4, 6, 16, 64, 80])
    group = rng.choice([g for g in (1, 2, 3, 4, 16, 20) if size % g == 0 and size // g <= 16])
    c = config(
        chunk_size=size,
        group_size=group,
        keep_first=rng.randint(0, 2),
        keep_last=rng.randint(0, 2),
        topk_chunks=rng.randint(1, 5),
        topk_groups=rng.choice([1, 2, 3, 8, 12]),
        routing=rng.choice(["strict", "prefix", "block"]),
        route_block=rng.choice([8, 64]),
        share=rng.choice(["query", "kv"]),
    )
    b, hkv, t, n = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 3, 20]), rng.choice([1, 5, 20, 70])
    heads, d, dtype = rng.choice([1, 2, 3, 4, 8]) * hkv, rng.choice([5, 16, 64, 80]), rng.choice(DTYPES)
    positions = None
    if rng.random() < 0.5:
        begin = rng.randint(0, n * size)
        positions = torch.arange(begin, begin + t).expand(b, t).clone()
        positions[:, :: rng.choice([2, 3, 50])] = -1
    same(tables(t, n, c=c, b=b, hq=heads, hkv=hkv, d=d, dtype=dtype, seed=seed), c, positions=positions)


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    """The last chunks of more than 2^31 numbers of groups; no other memory is read."""
    n, d = 2**22 + 20, 128
    c = config(keep_first=n - 8, topk_chunks=2, topk_groups=3)
    near = tables(1, 8, hq=2, hkv=1, d=d, dtype=torch.bfloat16)
    far = [x.new_empty((1, n, *x.shape[2:])) for x in near[1:]]
    assert far[1].numel() > 2**31
    for whole, x in zip(far, near[1:], strict=True):
        whole[:, -8:] = x
    at = torch.tensor([[16 * (n + 1)]])
    found = hga_route(near[0], *far, c, positions=at, impl="triton")
    here = torch.tensor([[16 * 9]])
    expected = hga_route(*near, config(keep_first=0, topk_chunks=2, topk_groups=3), positions=here, impl="triton")
    assert (expected >= 0).all() and torch.equal(found, expected + 4 * (n - 8))


def test_what_it_does_not_serve_it_says():
    x = tables(2, 9)
    with pytest.raises(ImplError, match="head_dim up to 256, q has 300"):
        hga_route(*tables(2, 9, d=300), config(), impl="triton")
    with pytest.raises(ImplError, match="no super-chunks"):
        hga_route(*x, config(super_chunk=2, topk_supers=1), impl="triton")
    with pytest.raises(ImplError, match=r"q is torch\.float64"):
        hga_route(*(y.double() for y in x), config(), impl="triton")
    c = config(chunk_size=160, group_size=40, routing="prefix")
    with pytest.raises(ImplError, match="runs of up to 128 queries"):
        hga_route(*tables(2, 9, c=c), c, impl="triton")


def test_block_is_left_to_the_reference_where_the_compiler_spills():
    keys = tables(8, 4)
    for arch, served in (("sm_90", True), ("sm_100", False), ("sm_120", False), ("gfx942", True), ("interpret", True)):
        assert launch.serves_block(arch) is served
        with pretend(arch):
            reason = launch.rejects(*keys, None, 0, *budgets(config(routing="block")))
            assert (reason is None) is served and (served or "block" in reason)
            assert launch.rejects(*keys, None, 0, *budgets(config())) is None
