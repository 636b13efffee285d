"""The HGA kernels in C++ on every path this processor runs: differential fuzz against the references, and what must
hold to the bit."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from cpu_cases import LOW, NAN, Call, attend, call, undecided, with_routes
from hga_cases import full, rope, small, tensors
from torch import Tensor

from hici_kernels import HGAConfig, ImplError, _native
from hici_kernels.ops.hga_attention import cpu
from hici_kernels.ops.hga_attention.op import attention_backward, attention_forward
from hici_kernels.ops.hga_route import cpu as router
from hici_kernels.ops.hga_route.api import budgets, hga_route
from hici_kernels.ops.hga_summaries import cpu as summariser
from hici_kernels.ops.hga_summaries.api import hga_summaries
from hici_kernels.testing import assert_usually_within, budget, error, excess

PATHS = list(_native.paths())
pytestmark = pytest.mark.skipif(not PATHS, reason=str(_native.status()))
each_path = pytest.mark.parametrize("path", PATHS)
ALL = ("strict", "prefix", "block")

# the fast part, and the whole of it: 2,400 configurations
FAST, WHOLE, PART = 240, 2400, 60


def wide(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def results(c: Call, routes: Tensor, impl: str, seed: int, *, double: bool = False) -> dict[str, Tensor]:
    """out, lse and gradients with the routes given; what arrives has been rounded to the dtype of the call."""
    q = c.tensors["q"]
    g = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(q.shape, generator=g).to(q.dtype)
    grad_lse = torch.randn(q.shape[0], q.shape[2], q.shape[1], generator=g)
    given = [*c.tensors.values(), *with_routes(c, routes), impl]
    given = [wide(x) for x in given] if double else given
    grad_lse = grad_lse.double() if double else grad_lse
    out, lse, _ = attention_forward(*given)
    found = attention_backward(grad_out.to(out.dtype), grad_lse, out, lse, *given)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), found, strict=True))}


def ratios(c: Call, routes: Tensor, path: str, seed: int) -> dict[str, float]:
    """Error / budget of every result against float64, all with the same routes."""
    truth = results(c, routes, "reference", seed, double=True)
    plain = results(c, routes, "reference", seed)
    with _native.path(path):
        found = results(c, routes, "cpu", seed)
    for name, x in found.items():
        assert x.dtype == plain[name].dtype and x.shape == plain[name].shape, name
    return {name: excess(truth[name], plain[name], x) for name, x in found.items()}


def check(seed: int, path: str) -> None:
    c = call(seed)
    reference = attend(c, "reference")
    assert reference.routes is not None and reference.lse is not None
    with _native.path(path):
        found = attend(c, "cpu")
    assert found.routes is not None and found.lse is not None
    what = f"seed {seed} on {path}, {c.config}, { ({n: tuple(x.shape) for n, x in c.tensors.items()}) }, {c.options}"
    for b, t, h in (found.routes != reference.routes).any(-1).nonzero().tolist():
        assert undecided(c, b, t, h), f"{what}: route of row {b}, query {t}, head {h}"
    blind = (reference.lse == -torch.inf).transpose(1, 2)
    assert not found.out[blind].any() and (found.routes[blind] == -1).all(), what

    def draw(i: int) -> dict[str, float]:
        again = call(seed, i) if i else c
        routes = attend(again, "reference").routes if i else reference.routes
        assert routes is not None
        return ratios(again, routes, path, seed + i)

    assert_usually_within(draw, what)


@pytest.mark.parametrize("part", range(FAST // PART))
def test_fuzz(part: int) -> None:
    for seed in range(PART * part, PART * (part + 1)):
        for path in PATHS:
            check(seed, path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(FAST // PART, WHOLE // PART))
def test_fuzz_whole(part: int) -> None:
    for seed in range(PART * part, PART * (part + 1)):
        check(seed, PATHS[seed % len(PATHS)])


def test_the_random_calls_cover_every_feature() -> None:
    counts: dict[str, int] = {}
    for seed in range(FAST):
        for f in call(seed).features:
            counts[f] = counts.get(f, 0) + 1
    wanted = [
        *ALL,
        "query",
        "kv",
        *map(str, LOW),
        "decode",
        "prefill",
        "mask",
        "positions",
        "no window",
        "super-chunks",
    ]
    wanted += ["several chunks", "heads first", "wide", "tokens apart", *(f"heads {r}" for r in (1, 2, 4, 8))]
    assert not [f"{f}: {counts.get(f, 0)}" for f in wanted if counts.get(f, 0) < 20]


# routes that rounding cannot turn


@each_path
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("seed", range(12))
def test_whole_numbers_give_the_same_routes(path: str, dtype: torch.dtype, seed: int) -> None:
    """Sums of small integers are exact in any order, and many are equal: ties must go to the lowest id."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n, r, hkv, d = rng.choice([3, 40, 130, 300]), rng.choice([1, 4]), 2, rng.choice([8, 40, 128])
    base = small(
        topk_chunks=rng.choice([1, 4, 17, 70]), topk_groups=rng.choice([1, 5, 33]), keep_last=rng.choice([0, 1, 3])
    )
    t = rng.choice([1, 2, 37])
    q, ck, gk = (
        torch.randint(-3, 4, shape, generator=g).to(dtype)
        for shape in ((2, t, hkv * r, d), (2, n, hkv, d), (2, n, 4, hkv, d))
    )
    at = (n * 16 - t - rng.choice([0, 5]) + torch.arange(t)).expand(2, t)
    for routing in ALL:
        for share in ("query", "kv"):
            config = dataclasses.replace(base, routing=routing, share=share)
            want = hga_route(q, ck, gk, config, positions=at, impl="reference")
            with _native.path(path):
                assert torch.equal(hga_route(q, ck, gk, config, positions=at, impl="cpu"), want)


@each_path
@pytest.mark.parametrize("routing", ALL)
def test_extreme_scores(path: str, routing: str) -> None:
    """Scores of any size and sign, infinite and NaN ones: no crash, ids within the pool, each once."""
    q, ck = torch.ones(1, 40, 4, 16), torch.ones(1, 60, 2, 16)
    gk = torch.ones(1, 60, 4, 2, 16)
    for c, value in enumerate((3e38, -3e38, math.inf, -math.inf, NAN, 1e-45, -0.0, 0.0)):
        ck[:, c + 2 :: 9], gk[:, c + 2 :: 9, c % 4] = value, value
    at = torch.arange(920, 960)[None]
    with _native.path(path):
        routes = hga_route(q, ck, gk, small(routing=routing), positions=at, impl="cpu")
    used = routes[routes >= 0]
    assert (used >= 4).all() and (used < 59 * 4).all() and len(used)
    assert (routes[..., 1:].diff()[routes[..., 2:] >= 0] > 0).all()


# bits


def long_call(dtype: torch.dtype, seed: int, t: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return tensors(1500, t=t, b=2, hq=8, hkv=2, d=64, seed=seed, dtype=dtype)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_path
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("t", [1, 3, 1500])
def test_bits_do_not_depend_on_threads(path: str, dtype: torch.dtype, t: int, threads) -> None:
    q, k, v = long_call(dtype, 1, t)
    config = HGAConfig(keep_first=1, keep_last=2, topk_chunks=6, topk_groups=9)
    found = []
    for count in (1, 2, 5):
        threads(count)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with _native.path(path):
            got = full(*leaves, config, rope=rope(64), impl="cpu")
            grads = torch.autograd.grad(got.out.float().square().sum() + got.lse.sum(), leaves)
        found.append([got.out.detach(), got.lse.detach(), got.routes, *grads])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@each_path
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("share", ["query", "kv"])
def test_routes_do_not_depend_on_the_split(path: str, dtype: torch.dtype, share: str) -> None:
    """One query, a few, a tile or all at once; one scan or several parts of it."""
    q, k, _ = tensors(16 * 700, b=1, hq=8, hkv=2, d=32, seed=5, dtype=dtype)
    ck, gk = hga_summaries(k, rope=rope(32), chunk_size=16, group_size=4)
    config = small(topk_chunks=5, topk_groups=7, share=share)
    with _native.path(path):
        whole = hga_route(q, ck, gk, config, impl="cpu")
        for start, stop in ((11_199, 11_200), (10_000, 10_002), (8000, 8033), (5, 6), (100, 700)):
            at = torch.arange(start, stop)[None]
            assert torch.equal(hga_route(q[:, start:stop], ck, gk, config, positions=at), whole[:, start:stop])


@each_path
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("routing", ALL)
def test_a_padded_row_equals_the_row_alone(path: str, dtype: torch.dtype, routing: str) -> None:
    q, k, v = tensors(400, b=3, hq=4, d=32, seed=8, dtype=dtype)
    mask = torch.rand(3, 400, generator=torch.Generator().manual_seed(8)) < 0.6
    for x in (q, k, v):
        x[~mask] = NAN
    config = small(routing=routing)
    with _native.path(path):
        got = full(q, k, v, config, attention_mask=mask, rope=rope(32), impl="cpu")
        for b in range(3):
            kept = mask[b]
            alone = full(*(x[b : b + 1, kept] for x in (q, k, v)), config, rope=rope(32), impl="cpu")
            assert torch.equal(got.routes[b, kept], alone.routes[0])
            assert torch.equal(got.out[b, kept], alone.out[0]) and torch.equal(got.lse[b][:, kept], alone.lse[0])
            assert not got.out[b, ~kept].any() and (got.routes[b, ~kept] == -1).all()


@each_path
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("routing", ALL)
@pytest.mark.parametrize("hq", [2, 8])
def test_nan_beyond_the_index_is_not_seen(path: str, dtype: torch.dtype, routing: str, hq: int) -> None:
    q, k, v = tensors(150, seed=5, hq=hq, dtype=dtype)
    with _native.path(path):
        expected = full(q, k, v, small(routing=routing), impl="cpu")
        for t in (3, 47, 48, 100):
            k2, v2 = k.clone(), v.clone()
            k2[:, t + 1 :] = v2[:, t + 1 :] = NAN
            leaves = [x.clone().requires_grad_() for x in (q, k2, v2)]
            got = full(*leaves, small(routing=routing), impl="cpu")
            upto = slice(0, t + 1)
            assert torch.equal(got.routes[:, upto], expected.routes[:, upto])
            torch.testing.assert_close(got.out[:, upto], expected.out[:, upto])
            torch.testing.assert_close(got.lse[:, :, upto], expected.lse[:, :, upto])
            grads = torch.autograd.grad(got.out[:, upto].sum() + got.lse[:, :, upto].sum(), leaves)
            assert all(g[:, upto].isfinite().all() and not g[:, t + 1 :].any() for g in grads)
            assert got.out[:, t + 1 :].isnan().all()


def test_decode_equals_prefill() -> None:
    for routing in ("strict", "prefix"):
        q, k, v = tensors(16 * 40, seed=4, hq=8, hkv=2, d=64, dtype=torch.float32)
        config = small(routing=routing, topk_chunks=6, topk_groups=9)
        whole = full(q, k, v, config, rope=rope(64), impl="cpu")
        for start in (0, 1, 16, 300, 639):
            first = start // 16 * 16  # "prefix" maxima begin at a chunk
            part = full(
                q[:, first : start + 1], *(x[:, : start + 1] for x in (k, v)), config, rope=rope(64), impl="cpu"
            )
            assert torch.equal(part.routes, whole.routes[:, first : start + 1])
            torch.testing.assert_close(part.out, whole.out[:, first : start + 1], rtol=0, atol=2e-6)


# summaries


@each_path
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("d", "rotary"), [(128, 128), (64, 16), (20, 6), (33, 32), (2, 2)])
@pytest.mark.parametrize(("chunk", "group"), [(64, 16), (16, 16), (80, 20), (1, 1), (5, 1)])
def test_summaries(path: str, dtype: torch.dtype, d: int, rotary: int, chunk: int, group: int) -> None:
    _, k, _ = tensors(3 * chunk + chunk // 2, b=2, d=d, seed=d, dtype=dtype)
    r, s = rope(rotary), k.shape[1]
    jumps = torch.arange(s).expand(2, s) * torch.tensor([[1], [3]]) + torch.randint(0, 2, (2, s)).cumsum(1)
    for positions in (None, torch.arange(s) + 7, jumps):
        given = {"rope": r, "positions": positions, "chunk_size": chunk, "group_size": group}
        truth = hga_summaries(k.double(), **given)
        plain = hga_summaries(k, **given, impl="reference")
        with _native.path(path):
            found = hga_summaries(k, **given, impl="cpu")
        for x, y, z in zip(truth, plain, found, strict=True):
            assert error(x, z) <= budget(x, y, dtype)


@each_path
def test_summaries_of_one_chunk_written_into_a_table(path: str) -> None:
    _, k, _ = tensors(64 * 5, b=2, d=128, dtype=torch.bfloat16)
    r = rope(128)
    with _native.path(path):
        chunk_keys, group_keys = hga_summaries(k, rope=r, impl="cpu")
        ck = torch.full((2, 2, 7, 128), NAN, dtype=k.dtype).transpose(1, 2)
        gk = torch.full((2, 2, 7, 4, 128), NAN, dtype=k.dtype).permute(0, 2, 3, 1, 4)
        for c in (3, 0, 4, 1, 2):
            summariser.into(k[:, 64 * c : 64 * c + 64], r.inv_freq, None, 64, 16, ck[:, c : c + 1], gk[:, c : c + 1])
    assert torch.equal(ck[:, :5], chunk_keys) and torch.equal(gk[:, :5], group_keys)
    assert ck[:, 5:].isnan().all() and gk[:, 5:].isnan().all()


def test_a_key_that_is_not_finite_stays_in_its_own_pairs() -> None:
    _, k, _ = tensors(16, d=16, dtype=torch.float32)
    k[0, 3, 0, 0], k[0, 5, 1, 15] = math.inf, NAN
    got = hga_summaries(k, rope=rope(), chunk_size=16, group_size=4, impl="cpu")
    want = hga_summaries(k, rope=rope(), chunk_size=16, group_size=4, impl="reference")
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.isfinite(), y.isfinite())


# as an operation


@pytest.mark.parametrize("dtype", LOW)
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, v = tensors(90, b=2, dtype=dtype)
    config = small()
    torch.library.opcheck(torch.ops.hici.hga_summaries.default, (k, rope().inv_freq, None, 16, 4, "cpu"))
    ck, gk = hga_summaries(k, rope=rope(), chunk_size=16, group_size=4)
    torch.library.opcheck(torch.ops.hici.hga_route.default, (q, ck, gk, None, 3, *budgets(config), "cpu"))
    rest = (rope().inv_freq, None, None, None, 4, *budgets(config), 0.25, "cpu")
    torch.library.opcheck(
        torch.ops.hici.hga_attention.default, (*(x.clone().requires_grad_() for x in (q, k, v)), *rest)
    )


def test_compiled_fullgraph() -> None:
    q, k, v = tensors(90, dtype=torch.float32)
    fast = torch.compile(lambda *x: full(*x, small(), impl="cpu"), fullgraph=True, backend="aot_eager")
    for x, y in zip(fast(q, k, v), full(q, k, v, small(), impl="cpu"), strict=True):
        assert torch.equal(x, y)


def test_the_default_is_cpu_and_refusals_are_named() -> None:
    q, k, v = tensors(60, dtype=torch.float32)
    assert torch.equal(full(q, k, v, small()).out, full(q, k, v, small(), impl="cpu").out)
    with pytest.raises(ImplError, match="float64"):
        full(*(x.double() for x in (q, k, v)), small(), impl="cpu")
    for op in (cpu, router, summariser):
        assert "CPU tensors" in str(op.rejects(q.to("meta"))) and op.rejects(q) is None


def test_the_library_guards_memory() -> None:
    """What the Python side would never pass."""
    q, k, v = tensors(60, dtype=torch.float32)
    out, lse = torch.empty_like(q), torch.empty(1, 4, 60)
    routes = torch.zeros(1, 60, 4, 3, dtype=torch.int32)
    good = [q, k, v, None, None, routes, 4, 16, 1, 1, 0.3, out, lse, -1, 1]
    call_ = _native.library().hga_attention_forward
    call_(*good)
    columns = torch.arange(60)[None]
    for at, bad in (
        (1, k[:, :59]),
        (2, v.bfloat16()),
        (3, torch.zeros(1, 59, dtype=torch.int64)),
        (4, columns + 1),
        (4, columns - 1),
        (5, routes[:, :59]),
        (6, 5),
        (7, 0),
        (11, out[..., :8]),
        (12, lse[:, :3]),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            call_(*good[:at], bad, *good[at + 1 :])


def test_routes_that_name_what_they_may_not_are_passed_over() -> None:
    """Of the sinks, the window, beyond the text, twice: every token is still attended once."""
    q, k, v = tensors(100, t=1, dtype=torch.float32)
    routes = torch.tensor([0, 1, 8, 8, 9, 23, 24, 25, 10_000, 2**31 - 1, 3, -5], dtype=torch.int32).expand(1, 1, 4, 12)
    arguments = (rope().inv_freq, None, None)
    rest = (4, *budgets(small()), 0.25)
    got = cpu.forward(q, k, v, *arguments, routes, *rest)
    want = cpu.forward(q, k, v, *arguments, torch.tensor([8, 9], dtype=torch.int32).expand(1, 1, 4, 2), *rest)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
