"""attention in C++, on every path this processor runs: random calls against float64, and what must hold to the bit."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from hici_cases import random_mask, random_offsets
from hici_oracle import column_segments
from torch import Tensor

from hici_kernels import _dispatch, _native, attention
from hici_kernels.errors import ImplError
from hici_kernels.ops.attention import cpu
from hici_kernels.testing import assert_usual, assert_usually_within, excess

PATHS = list(_native.paths())
pytestmark = pytest.mark.skipif(not PATHS, reason=str(_native.status()))
each_path = pytest.mark.parametrize("path", PATHS)

LOW = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [1, 2, 3, 5, 8, 16, 17, 24, 31, 40, 64, 80, 96, 100, 128, 192, 200, 256]
SLOTS = ("global_k", "global_v", "local_k", "local_v")
NAN = float("nan")
CHUNKS, CHUNK = 32, 18  # 576 calls


class Case(NamedTuple):
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    hidden: dict[str, Tensor]  # bool [:-1] per tensor: rows that no query sees, or that see nothing; all NaN
    features: set[str]


def lengths(rng: random.Random, longest: int) -> tuple[int, int, int, int]:
    """(batch, keys, query heads of a kv head, head_dim) that the float64 reference does in a fraction of a second."""
    while True:
        s = rng.choice([rng.randint(0, 40), rng.randint(0, 40), rng.randint(41, 300), rng.randint(301, 1100)])
        s = min(s, longest)
        batch, group = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3, 4, 8])
        d = rng.choice([rng.choice(HEAD_DIMS), rng.choice(HEAD_DIMS), rng.randint(1, 256)])
        if batch * group * s * max(s, 16) * d <= 2.5e7 and batch * s * d <= 1.5e5:
            return batch, s, group, d


def laid_out(rng: random.Random, x: Tensor, features: set[str]) -> Tensor:
    """The same values with other strides; memory between them is NaN."""
    kind = rng.choice(["plain", "plain", "permuted", "wide", "tokens apart", "among heads", "lanes apart"])
    if kind == "lanes apart" and x.shape[-1] != 1:
        kind = "wide"
    features.add(kind)
    if kind == "plain":
        return x.clone()
    if kind == "permuted":
        order = list(range(x.ndim - 1))
        rng.shuffle(order)
        back = [order.index(i) for i in range(x.ndim - 1)]
        return x.permute(*order, x.ndim - 1).contiguous().permute(*back, x.ndim - 1)
    shape, at = list(x.shape), [slice(None)] * x.ndim
    axis, begin, step = {
        "wide": (-1, rng.randint(0, 3), 1),
        "tokens apart": (1, 1, rng.randint(2, 3)),
        "among heads": (-2, 2, 1),
        "lanes apart": (-1, 1, 3),
    }[kind]
    at[axis] = slice(begin, begin + step * shape[axis], step)
    shape[axis] = begin + step * shape[axis] + rng.randint(1, 5)
    memory = x.new_full(shape, NAN)
    view = memory[tuple(at)]
    return view.copy_(x)


def case(seed: int, draw: int = 0, longest: int = 1100) -> Case:
    """One call of everything the operation documents, in one of the low dtypes; each draw gives it other values."""
    rng, features = random.Random(seed), set[str]()
    torch.manual_seed(seed + 1_000_003 * draw)
    dtype = rng.choice(LOW)
    batch, s, group, d = lengths(rng, longest)
    hkv = rng.choice([1, 1, 2, 3]) if s < 300 else 1
    packed = rng.random() < 0.3
    batch = 1 if packed else batch
    t = s if packed or rng.random() < 0.65 else rng.randint(0, s)
    segment_len = rng.choice([None, None, 1, 2, 3, 7, 16, 20, 33, 64, 100, 129, 257, 500])
    if segment_len and s > 100 * segment_len:
        segment_len = 33
    cu = random_offsets(rng, s, rng.randint(1, 6)) if packed else None
    n = len(column_segments(s, segment_len, cu))

    size = rng.choice([1.0, 1.0, 0.2, 3.0])
    x = {
        name: size * torch.randn(batch, length, heads, d)
        for name, length, heads in (("q", t, hkv * group), ("k", s, hkv), ("v", s, hkv))
    }
    slots = rng.choice(["none", "shared", "each"])
    if slots != "none":
        count = rng.randint(0, 6)
        shape = (batch, count, hkv, d) if slots == "shared" else (batch, n, count, hkv, d)
        x |= {name: torch.randn(shape) for name in SLOTS[:2]}
    if rng.random() < 0.6:
        shape = (batch, n, rng.randint(0, 20), hkv, d)
        x |= {name: torch.randn(shape) for name in SLOTS[2:]}
    if rng.random() < 0.15:
        # every score, and so the log-sum-exp, moves by the same large number
        features.add("offset")
        x["q"][..., 0] = rng.choice([-1.0, 1.0]) * 64.0
        for name in ("k", *SLOTS[::2]):
            if name in x:
                x[name][..., 0] = 16.0
    shown = rng.choice([None, (n,), (batch, n)])
    options: dict[str, Any] = {
        "segment_len": segment_len,
        "recurrence_len": rng.randint(0, segment_len) if segment_len else 0,
        "prefix_mask": None if shown is None else torch.rand(shown) < 0.6,
        "attention_mask": random_mask(rng, batch, s),
        "cu_seqlens": cu,
        "causal": rng.random() < 0.7,
        "scale": rng.choice([None, None, None, 0.3, -0.2, 0.0]),
    }
    mask = options["attention_mask"]
    if mask is not None:
        options["attention_mask"] = mask.to(rng.choice([torch.bool, torch.int64, torch.float32]))

    hidden = {}
    if rng.random() < 0.5:
        features.add("poison")
        hidden = unseen(x, options, n)
        for name, at in hidden.items():
            x[name][at] = NAN
    tensors = {}
    for name, value in x.items():
        y = laid_out(rng, value.to(dtype), features)
        if name in ("k", "v", *SLOTS) and rng.random() < 0.12:
            axes = [y.ndim - 2] if hidden else [a for a in range(y.ndim - 1) if rng.random() < 0.5]
            for a in axes:
                if y.shape[a]:
                    features.add("expanded")
                    y = y.narrow(a, 0, 1).expand(*[-1 if i != a else value.shape[a] for i in range(y.ndim)])
        tensors[name] = y
    if rng.random() < 0.2:  # one tensor for keys and values, as in a shared cache
        tensors["v"] = tensors["k"]
    features |= {str(dtype), slots, f"group {group}", f"causal {options['causal']}", f"scale {options['scale']}"}
    features |= {"packed"} if packed else set()
    features |= {"empty document"} if packed and bool((cu.diff() == 0).any()) else set()
    features |= {"decode"} if t < s else set()
    features |= {"mask"} if mask is not None else set()
    features |= {"all masked"} if mask is not None and s and bool((mask == 0).all(1).any()) else set()
    features |= {f"prefix {len(shown)}"} if shown else set()
    features |= {"recurrence"} if options["recurrence_len"] and n > 1 else set()
    features |= {"local"} if "local_k" in x else set()
    return Case(tensors, options, hidden, features)


def unseen(x: dict[str, Tensor], options: dict[str, Any], n: int) -> dict[str, Tensor]:
    """Masked tokens; slots of segments that no token of is left, or that may not see them."""
    batch, s = x["k"].shape[:2]
    t, mask, shown = x["q"].shape[1], options["attention_mask"], options["prefix_mask"]
    token = torch.ones(batch, s, dtype=torch.bool) if mask is None else mask != 0
    found = {"q": ~token[:, s - t :], "k": ~token, "v": ~token}
    slots = torch.zeros(batch, n, dtype=torch.bool)
    for i, (columns, _) in enumerate(column_segments(s, options["segment_len"], options["cu_seqlens"])):
        queries = [c for c in columns if c >= s - t]
        for b in range(batch):
            allowed = shown is None or bool(shown[i] if shown.ndim == 1 else shown[b, i])
            slots[b, i] = not (allowed and queries and token[b, queries].any())
    for name in SLOTS:
        if name in x:
            found[name] = slots if x[name].ndim == 5 else slots.all(1)
    return found


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    gradients: dict[str, Tensor]

    def pairs(self, other: Results) -> list[tuple[str, Tensor, Tensor]]:
        both = [("out", self.out, other.out), ("lse", self.lse, other.lse)]
        return both + [(f"gradient of {name}", g, other.gradients[name]) for name, g in self.gradients.items()]


def run(tensors: dict[str, Tensor], options: dict[str, Any], impl: str, seed: int = 0) -> Results:
    """out, lse, and gradients of every input through both; what arrives at rows that see nothing must not matter."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out, lse = attention(**leaves, **options, return_lse=True, impl=impl)
    g = torch.Generator().manual_seed(seed)
    arriving = torch.randn(out.shape, generator=g).to(tensors["q"].dtype), torch.randn(lse.shape, generator=g)
    found = torch.autograd.grad((out, lse), list(leaves.values()), [arriving[0].to(out), arriving[1].to(lse)])
    return Results(out.detach(), lse.detach(), dict(zip(leaves, found, strict=True)))


def references(tensors: dict[str, Tensor], options: dict[str, Any], seed: int = 0) -> tuple[Results, Results]:
    """The truth in float64, and the PyTorch reference in the dtype of the call."""
    dtype = tensors["q"].dtype
    wide = {name: x.double() for name, x in tensors.items()}
    # what arrives has been rounded to the dtype of the call
    leaves = {name: x.detach().requires_grad_() for name, x in wide.items()}
    out, lse = attention(**leaves, **options, return_lse=True, impl="reference")
    g = torch.Generator().manual_seed(seed)
    arriving = torch.randn(out.shape, generator=g).to(dtype).double(), torch.randn(lse.shape, generator=g).double()
    found = torch.autograd.grad((out, lse), list(leaves.values()), arriving)
    truth = Results(out.detach(), lse.detach(), dict(zip(leaves, found, strict=True)))
    return truth, run(tensors, options, "reference", seed)


def assert_same_bits(a: Results, b: Results, what: str) -> None:
    for name, x, y in a.pairs(b):
        assert torch.equal(x, y), f"{what}: {name} differs"


def all_excess(truth: Results, found: Results, plain: Results) -> dict[str, float]:
    """Error / budget of every result."""
    ratios = {}
    for (name, expected, y), (_, _, z) in zip(truth.pairs(found), truth.pairs(plain), strict=True):
        assert y.dtype == z.dtype and y.shape == expected.shape, name
        ratios[name] = excess(expected, z, y)
    return ratios


def assert_budgets(truth: Results, found: Results, plain: Results, what: str) -> None:
    over = {name: ratio for name, ratio in all_excess(truth, found, plain).items() if ratio > 1}
    assert not over, f"{what}: error / budget is {over}"


def check(seed: int, path: str, direct: bool, c: Case, truth: Results, plain: Results) -> None:
    with _native.path(path, direct=direct):
        found = run(c.tensors, c.options, "cpu", seed)
    sizes = {name: tuple(x.shape) for name, x in c.tensors.items()}
    what = f"seed {seed} on {path}, direct {direct}, {sorted(c.features)} {sizes} {c.options}"
    blind = (truth.lse == -torch.inf).transpose(1, 2)
    assert not found.out[blind].any() and not found.gradients["q"][blind].any(), what
    for name, at in c.hidden.items():
        assert not found.gradients[name][at].any(), f"{what}: gradient of hidden {name}"

    def draw(i: int) -> dict[str, float]:
        if i == 0:
            return all_excess(truth, found, plain)
        again = case(seed, i)
        references_ = references(again.tensors, again.options, seed + i)
        with _native.path(path, direct=direct):
            return all_excess(references_[0], run(again.tensors, again.options, "cpu", seed + i), references_[1])

    # small calls are not served by packed kernels: there, roundings that nothing averages out may cost a little more
    assert_usually_within(draw, what, 1 if direct else 1.5)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_error_is_within_the_budget(chunk: int) -> None:
    for seed in range(CHUNK * chunk, CHUNK * (chunk + 1)):
        c = case(seed)
        truth, plain = references(c.tensors, c.options, seed)
        for path in PATHS:
            for direct in (False, True):
                check(seed, path, direct, c, truth, plain)


@each_path
@pytest.mark.parametrize("keys", [200, 600])
def test_a_large_log_sum_exp_costs_no_gradient(path: str, keys: int) -> None:
    """All scores moved by 256: the rounding of a float32 lse of that size must not show where gradients cancel."""
    g = torch.Generator().manual_seed(keys)
    tensors = {name: torch.randn(1, keys, 1, 16, generator=g) for name in ("q", "k", "v")}
    tensors["q"][..., 0], tensors["k"][..., 0] = 64.0, 16.0
    for options in ({"segment_len": keys}, {"causal": False}):
        truth, plain = references(tensors, options)
        with _native.path(path):
            assert_budgets(truth, run(tensors, options, "cpu"), plain, str(options))


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [4, 16, 40, 700])  # short calls are computed in float64, which overflows later
@pytest.mark.parametrize("first", [0, 1])
def test_scores_that_all_overflow_weigh_nothing(path: str, dtype: torch.dtype, keys: int, first: int) -> None:
    """-inf for every key of the queries from the first (or from the middle): output 0, lse -inf, gradients 0."""
    g = torch.Generator().manual_seed(keys)
    tensors = {name: torch.rand(1, keys, heads, 64, generator=g) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    begin = first * (keys // 2)
    tensors["q"][:, begin:] *= 1e20
    tensors["k"] *= -1e20
    found = []
    for impl in ("reference", "cpu"):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        with _native.path(path):
            out, lse = attention(**leaves, segment_len=keys, return_lse=True, impl=impl)
            out.float().square().sum().backward()
        found.append((out, lse, *(leaves[name].grad for name in ("q", "k", "v"))))
    for want, got in zip(*found, strict=True):
        assert torch.equal(want.isfinite(), got.isfinite()) and not got.isnan().any()
    out, lse, dq, _, _ = found[1]
    assert not out[:, begin:].any() and not dq[:, begin:].any() and (lse[:, :, begin:] == -torch.inf).all()


def test_the_random_calls_cover_every_feature() -> None:
    counts: dict[str, int] = {}
    for seed in range(CHUNKS * CHUNK):
        c = case(seed)
        d, s = c.tensors["q"].shape[-1], c.tensors["k"].shape[1]
        for f in c.features | {"narrow" if d < 16 else "ragged" if d % 16 else "whole", "long" if s > 256 else "short"}:
            counts[f] = counts.get(f, 0) + 1
    wanted = [*map(str, LOW), "none", "shared", "each", "local", "packed", "empty document", "decode", "mask"]
    wanted += ["all masked", "prefix 1", "prefix 2", "recurrence", "poison", "expanded", "offset", "scale None"]
    wanted += ["scale 0.3", "scale -0.2", "scale 0.0", "causal True", "causal False", "permuted", "wide"]
    wanted += ["tokens apart", "among heads", "lanes apart", "narrow", "ragged", "whole", "long", "short"]
    wanted += [f"group {g}" for g in (1, 2, 4, 8)]
    assert not [f"{f}: {counts.get(f, 0)}" for f in wanted if counts.get(f, 0) < (5 if f == "lanes apart" else 10)]


def big(dtype: torch.dtype, seed: int, *, s: int = 700, t: int | None = None, d: int = 64, hkv: int = 2, r: int = 4):
    """A call that keeps several threads busy: two rows, uneven segments, slots, recurrence, holes."""
    g = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    n = -(-s // 256)
    tensors = {"q": make(2, s if t is None else t, hkv * r, d), "k": make(2, s, hkv, d), "v": make(2, s, hkv, d)}
    tensors |= {name: make(2, 4, hkv, d) for name in SLOTS[:2]} | {name: make(2, n, 8, hkv, d) for name in SLOTS[2:]}
    mask = torch.rand(2, s, generator=g) < 0.8
    mask[0] = True
    return tensors, {"segment_len": 256, "recurrence_len": 100, "attention_mask": mask}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


LONG = {
    "segments": lambda dtype: big(dtype, 1),
    "one segment": lambda dtype: (big(dtype, 2, s=1500, hkv=1)[0], {"causal": False}),
    "split keys": lambda dtype: (big(dtype, 3, s=9000, t=5, hkv=1)[0], {}),
}


@each_path
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", LONG)
def test_bits_do_not_depend_on_threads_or_repetition(path: str, dtype: torch.dtype, shape: str, threads: Any) -> None:
    tensors, options = LONG[shape](dtype)
    if "segment_len" not in options:
        tensors = {name: x for name, x in tensors.items() if not name.startswith("local")}
    with _native.path(path):
        threads(1)
        want = run(tensors, options, "cpu")
        assert_same_bits(want, run(tensors, options, "cpu"), "a second call")
        for count in (2, 3, 7):
            threads(count)
            assert_same_bits(want, run(tensors, options, "cpu"), f"{count} threads")
            assert_same_bits(want, run(tensors, options, "cpu"), f"{count} threads again")


@each_path
@pytest.mark.parametrize("dtype", LOW)
def test_bits_do_not_depend_on_the_size_of_tiles(path: str, dtype: torch.dtype) -> None:
    """Calls of many rows are cut into tiles of twice the size; every row of the batch is as if it were alone."""
    tensors, options = big(dtype, 4, s=3000, d=8, hkv=2, r=16)
    heads, tokens = tensors["q"].shape[2], tensors["q"].shape[1]
    assert 2 * tokens * heads >= 512 * 288 > tokens * heads  # kManyTiles, kTileRows of attention_forward.cpp
    options["attention_mask"] = None
    with _native.path(path):
        out, lse = attention(**tensors, **options, return_lse=True, impl="cpu")
        for b in range(2):
            alone = {name: x[b : b + 1] for name, x in tensors.items()}
            wanted, wanted_lse = attention(**alone, **options, return_lse=True, impl="cpu")
            assert torch.equal(out[b : b + 1], wanted) and torch.equal(lse[b : b + 1], wanted_lse)


@each_path
@pytest.mark.parametrize("seed", range(12))
def test_later_tokens_do_not_reach_earlier_queries(path: str, seed: int) -> None:
    """Changing every value after a column changes no bit up to it."""
    rng = random.Random(seed)
    dtype = rng.choice(LOW)
    tensors, options = big(dtype, seed, s=rng.randint(200, 600), d=rng.choice([16, 40, 64]), r=rng.choice([1, 2]))
    s = tensors["k"].shape[1]
    at = rng.randint(0, s - 1)
    changed = {name: x.clone() for name, x in tensors.items()}
    for name in ("q", "k", "v"):
        changed[name][:, at + 1 :] = (1e4 * torch.randn(changed[name][:, at + 1 :].shape)).to(dtype)
    for name in SLOTS[2:]:
        changed[name][:, at // 256 + 1 :] = 1e4
    with _native.path(path):
        out, lse = attention(**tensors, **options, return_lse=True, impl="cpu")
        other, other_lse = attention(**changed, **options, return_lse=True, impl="cpu")
    assert torch.equal(out[:, : at + 1], other[:, : at + 1]) and torch.equal(
        lse[:, :, : at + 1], other_lse[:, :, : at + 1]
    )
    if at + 1 < s:
        assert not torch.equal(out[:, at + 1 :], other[:, at + 1 :])


@each_path
def test_a_later_query_sends_no_gradient_to_hidden_tokens(path: str) -> None:
    """Only the rows up to a column get a gradient; tokens after it receive exactly 0."""
    tensors, options = big(torch.float32, 5, s=500)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    with _native.path(path):
        out, lse = attention(**leaves, **options, return_lse=True, impl="cpu")
        (out[:, :300].sum() + lse[:, :, :300].nan_to_num(neginf=0.0).sum()).backward()
    for name in ("q", "k", "v"):
        assert not leaves[name].grad[:, 300:].any() and leaves[name].grad[:, :300].any()


@pytest.mark.parametrize("dtype", LOW)
def test_decode_of_every_length(dtype: torch.dtype) -> None:
    tensors, options = big(dtype, 7, s=330, d=40, hkv=1)
    found: dict[str, list[dict[str, float]]] = {path: [] for path in PATHS}
    for t in range(1, 65):
        few = tensors | {"q": tensors["q"][:, -t:]}
        truth, plain = references(few, options, t)
        for path in PATHS:
            with _native.path(path):
                found[path].append(all_excess(truth, run(few, options, "cpu", t), plain))
    for path in PATHS:
        assert_usual(found[path], f"decode on {path}")
        over = sum(ratio > 1 for one in found[path] for ratio in one.values())
        assert over <= 0.03 * sum(map(len, found[path])), f"{over} results over budget on {path}"


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("t", [1, 3, 70])
@pytest.mark.parametrize("kind", ["plain", "holes", "full"])
def test_one_long_segment(dtype: torch.dtype, t: int, kind: str) -> None:
    """Keys are split over items and their partial sums merged."""
    s, found = 8500, {path: [] for path in PATHS}
    mask = torch.ones(1, s)
    mask[:, 2000:6500] = 0
    options = {"plain": {}, "holes": {"attention_mask": mask}, "full": {"causal": False}}[kind]
    for seed in range(5):
        g = torch.Generator().manual_seed(100 * t + seed)
        q, k, v = (torch.randn(x, generator=g).to(dtype) for x in ((1, t, 2, 32), (1, s, 1, 32), (1, s, 1, 32)))
        k[:, 5000:5003] *= 4  # some partial sums are negligible beside others
        tensors = {"q": q, "k": k, "v": v}
        truth, plain = references(tensors, options)
        for path in PATHS:
            with _native.path(path):
                found[path].append(all_excess(truth, run(tensors, options, "cpu"), plain))
    for path in PATHS:
        assert_usual(found[path], path)


def assert_usual_everywhere(tensors: dict[str, Tensor], options: dict[str, Any], draws: int) -> None:
    """Several draws of such tensors keep the budget on every path, to the same bits on one thread and two."""
    found: dict[str, list[dict[str, float]]] = {path: [] for path in PATHS}
    for seed in range(draws):
        g = torch.Generator().manual_seed(seed)
        drawn = {name: torch.randn(x.shape, generator=g).to(x) for name, x in tensors.items()}
        truth, plain = references(drawn, options)
        for path in PATHS:
            with _native.path(path):
                ours = run(drawn, options, "cpu")
                torch.set_num_threads(1)
                try:
                    assert_same_bits(ours, run(drawn, options, "cpu"), path)
                finally:
                    torch.set_num_threads(2)
            found[path].append(all_excess(truth, ours, plain))
    for path in PATHS:
        assert_usual(found[path], path)


@pytest.mark.parametrize("t", [64, pytest.param(600, marks=pytest.mark.slow)])
def test_more_keys_than_scores_are_kept_of(t: int) -> None:
    """Gradients of long segments: of few queries in one item (64), of more in items for queries, then for keys."""
    tensors = {"q": torch.empty(1, t, 2, 8)} | {name: torch.empty(1, 17000, 1, 8) for name in "kv"}
    assert_usual_everywhere(tensors, {}, 2 if t < 600 else 5)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_of_all_sizes(causal: bool) -> None:
    """Gradients whose scores are kept, beside those of documents that fit one block of keys."""
    ends = [0, 1, 258, 514, 1215, 1216, 1729, 1793]
    tensors = {name: torch.empty(1, ends[-1], heads, 8) for name, heads in {"q": 6, "k": 6, "v": 6}.items()}
    options = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "causal": causal}
    assert_usual_everywhere(tensors, options, 2)


@each_path
def test_scores_of_any_size_stay_finite(path: str) -> None:
    for dtype, size in ((torch.float32, 1e10), (torch.float16, 200.0), (torch.bfloat16, 1e8)):
        g = torch.Generator().manual_seed(3)
        q, k, v = ((size * torch.randn(1, 300, 2, 40, generator=g)).to(dtype).requires_grad_() for _ in range(3))
        for segment_len in (100, None):
            with _native.path(path):
                out, lse = attention(q, k, v, segment_len=segment_len, return_lse=True, impl="cpu")
                found = torch.autograd.grad(out.sum(), (q, k, v))
            assert out.isfinite().all() and lse.isfinite().all()
            assert all(x.isfinite().all() for x in found)


@each_path
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_visible_nan_is_not_hidden(path: str, where: str) -> None:
    q, k, v = (torch.randn(1, 20, 2, 24) for _ in range(3))
    {"q": q, "k": k, "v": v}[where][0, 7, 1, 3] = NAN
    with _native.path(path):
        out, lse = attention(q, k, v, return_lse=True, impl="cpu")
    assert out[0, 7, 1].isnan().any() and not out[0, :, 0].isnan().any()
    if where != "v":
        assert not out[0, :7].isnan().any() and lse[0, 1, 7].isnan() and not lse[0, :, :7].isnan().any()


def arguments(seed: int) -> tuple[Any, ...]:
    c = case(seed, longest=40)
    o, x = c.options, c.tensors
    scale = x["q"].shape[-1] ** -0.5 if o["scale"] is None else o["scale"]
    # opcheck compares with ==, and an input that is another input's memory is not what it expects
    x = {name: y.contiguous().clone().nan_to_num(0.0) for name, y in x.items()}
    return (
        *(x["q"], x["k"], x["v"], o["segment_len"] or 0, o["recurrence_len"], *(x.get(name) for name in SLOTS)),
        *(o["prefix_mask"], o["attention_mask"], o["cu_seqlens"], o["causal"], scale, "cpu"),
    )


@pytest.mark.parametrize("seed", range(10))
def test_opcheck(seed: int) -> None:
    given = arguments(seed)
    if not all(x.numel() for x in given if isinstance(x, Tensor)):
        given = arguments(seed + 100)  # opcheck cannot copy empty tensors
    tracked = tuple(
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and i < 9 else x
        for i, x in enumerate(given)
    )
    torch.library.opcheck(torch.ops.hici.attention.default, tracked)
    out, lse = torch.ops.hici.attention.default(*given)
    torch.library.opcheck(
        torch.ops.hici.attention_backward.default, (torch.randn_like(out), torch.randn_like(lse), out, lse, *given)
    )


@pytest.mark.parametrize("dynamic, frames", [(True, 1), (False, 2)])
def test_compiles_to_one_graph(dynamic: bool, frames: int) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(q: Tensor, k: Tensor, v: Tensor, local: Tensor, mask: Tensor) -> Any:
        given = {"segment_len": 4, "recurrence_len": 2, "local_k": local, "local_v": local, "attention_mask": mask}
        return attention(q, k, v, **given, return_lse=True, impl="cpu")

    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=dynamic)
    for s in (9, 14):
        q, k, v = (torch.randn(2, s, h, 8, requires_grad=True) for h in (4, 2, 2))
        local, mask = torch.randn(2, -(-s // 4), 5, 2, 8, requires_grad=True), torch.ones(2, s)
        found, wanted = compiled(q, k, v, local, mask), f(q, k, v, local, mask)
        gradients = [torch.autograd.grad(o.square().sum() + lse.sum(), (q, k, v, local)) for o, lse in (found, wanted)]
        for a, b in zip((*found, *gradients[0]), (*wanted, *gradients[1]), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == frames


def test_what_it_does_not_serve_is_refused_with_the_reason() -> None:
    q, k = torch.randn(1, 4, 2, 8, dtype=torch.float64), torch.randn(1, 4, 1, 8, dtype=torch.float64)
    with pytest.raises(ImplError, match="q is float64"):
        attention(q, k, k, impl="cpu")
    with pytest.raises(ImplError, match="q is on meta"):
        _dispatch.select("attention", "cpu", q.to("meta"))
    assert cpu.rejects(q.float()) is None
    # chosen where it serves, left aside where it does not
    assert attention(q, k, k).dtype == torch.float64
    assert _dispatch.select("attention", "", q.float()) is cpu


@each_path
def test_second_derivative_is_refused(path: str) -> None:
    q, k, v = (torch.randn(1, 5, 2, 4, requires_grad=True) for _ in range(3))
    with _native.path(path), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(attention(q, k, v, impl="cpu").square().sum(), q, create_graph=True)
