"""hga_attention's backward kernels under Triton's interpreter: gradients against float64, and what must not matter.

out, lse and routes, which backward is given, come from the reference: these tests need no other kernel.
"""

import random
from contextlib import contextmanager

import pytest
import torch
from attention_cases import other_order, rounding
from test_hga_attention import DTYPES, NAN, config, tensors

from hici_kernels import HGAConfig, ImplError, Rope
from hici_kernels.ops.hga_attention import reference
from hici_kernels.ops.hga_attention import triton as forward_launch
from hici_kernels.ops.hga_attention import triton_backward_launch as launch
from hici_kernels.ops.hga_attention.api import hga_attention
from hici_kernels.ops.hga_attention.op import attention_backward, attention_forward
from hici_kernels.ops.hga_route.api import budgets
from hici_kernels.testing import assert_usually_within, excess
from hici_kernels.tuning.lookup import trial

__all__ = ["rounding"]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("dq", "dk", "dv")


@pytest.fixture(autouse=True)
def small_tiles():
    with tiles():
        yield


@contextmanager
def tiles(block_m=32, block_n=32):
    """Of all kernels."""
    found = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
    with trial("hga_attention_backward", found), trial("hga_attention_backward_dq", found):
        yield


@pytest.fixture
def cut(monkeypatch):
    """Small lists, few pairs at a time, parts of groups and of sinks: all that long texts are cut into."""
    for name, value in {"PAIRS": 600, "RUN": 16, "SINK_QUERIES": 4, "SINK_NUMBERS": 1 << 13}.items():
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(forward_launch, "SCRATCH", 1)


class Problem:
    """One call, its gradients of the outputs, and everything of the forward pass that backward is given."""

    def __init__(self, x, c, *, positions=None, mask=None, scale=None, routes=None, grads=None, through_lse=True):
        d = x[0].shape[-1]
        self.x, self.c, self.positions, self.mask = tuple(x), c, positions, mask
        self.scale = d**-0.5 if scale is None else scale
        self.inv_freq = Rope.from_theta(1e4, d // 2 * 2).inv_freq
        self.out, self.lse, self.routes = self.forward(self.x, routes)
        if grads is None:
            g = torch.Generator().manual_seed(9)
            grads = [torch.randn(y.shape, generator=g) for y in (self.out, self.lse)]
        grads[1] = grads[1] if through_lse else torch.zeros_like(grads[1])
        self.grads = tuple(g.to(y.dtype) for g, y in zip(grads, (self.out, self.lse), strict=True))

    def rest(self, routes):
        return (self.inv_freq, self.positions, self.mask, routes, self.c.group_size, *budgets(self.c), self.scale)

    def forward(self, x, routes):
        return attention_forward(*x, *self.rest(routes), "reference")

    def found(self, impl="triton"):
        return attention_backward(*self.grads, self.out, self.lse, *self.x, *self.rest(self.routes), impl)

    def exact(self):
        x = tuple(y.double() for y in self.x)
        out, lse, _ = self.forward(x, self.routes)
        return reference.backward(*(g.double() for g in self.grads), out, lse, *x, *self.rest(self.routes))

    def seen(self):
        """J_t as bool [B, T, Hq, S], over columns."""
        q, k, v = (y.double() for y in self.x)
        order, p = reference.Tokens.of(q, k, self.positions, self.mask)
        regions = (self.c.group_size, self.c.chunk_size, self.c.keep_first, self.c.keep_last)
        seen = reference.Scores(q, k, v, p, self.routes, *regions, 1.0).seen(slice(0, q.shape[1]), k.shape[1])
        seen = seen & (p >= 0)[:, :, None, None]
        if order is None:
            return seen
        return seen.gather(3, torch.argsort(order, 1)[:, None, None].expand_as(seen))

    def by_kv_head(self, rows):
        """bool [B, S, Hkv]: what the ``rows`` (bool [B, T, Hq]) see."""
        seen = (self.seen() & rows[..., None]).any(1)
        return seen.unflatten(1, (self.x[1].shape[2], -1)).any(2).transpose(1, 2)


def ratios(problem):
    found, exact, plain = problem.found(), problem.exact(), problem.found("reference")
    parts = {}
    for name, x, f, e, p in zip(NAMES, problem.x, found, exact, plain, strict=True):
        assert f.dtype == x.dtype and f.shape == x.shape and f.is_contiguous()
        parts[name] = excess(e, p, f) if f.numel() else 0.0
    return parts


def check(x, c, **options):
    """Within the budget in the usual draw."""

    def draw(i):
        if i == 0:
            return ratios(Problem(x, c, **options))
        g = torch.Generator().manual_seed(i)
        again = tuple(torch.randn(y.shape, generator=g).to(y.dtype) for y in x)
        return ratios(Problem(again, c, **options))

    assert_usually_within(draw, f"gradients {c} {options}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype):
    check(tensors(100, 40, hq=2, hkv=1, dtype=dtype), config())
    check(tensors(90, 5, dtype=dtype), config(keep_first=0, keep_last=0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cut_into_parts_it_is_within_the_budget_too(cut, dtype):
    """Every query opens the same groups: those of one are cut into many parts, and queries into many ranges."""
    routes = torch.tensor([4, 6, -1], dtype=torch.int32).expand(2, 20, 2, 3)
    check(tensors(84, 20, b=2, hq=2, hkv=1, dtype=dtype), config(keep_first=1), routes=routes)


@pytest.mark.parametrize(("group", "d"), [(1, 64), (2, 80), (3, 128), (4, 256), (6, 5), (5, 2), (16, 200)])
def test_heads_and_widths(group, d):
    check(tensors(100, 3, hq=group, hkv=1, d=d, dtype=DTYPES[(group + d) % 3]), config())


@pytest.mark.parametrize(("chunk_size", "group_size"), [(40, 40), (48, 24), (6, 3), (5, 1)])
def test_sizes_of_groups(cut, chunk_size, group_size):
    """Larger and smaller than a block of keys, and no powers of two."""
    c = config(chunk_size=chunk_size, group_size=group_size, keep_first=0, keep_last=0)
    x = tensors(100, 6, hq=2, hkv=1, seed=chunk_size)
    assert (Problem(x, c).routes >= 0).any()
    with tiles(16, 16):
        check(x, c)


@pytest.mark.parametrize("seed", range(8))
def test_random_calls(seed, monkeypatch):
    """Sizes, cuts, masks, positions, budgets and blocks at random."""
    draw = random.Random(seed)
    pick = lambda *values: draw.choice(values)  # noqa: E731
    monkeypatch.setattr(launch, "RUN", pick(16, 64, 1024))
    monkeypatch.setattr(launch, "PAIRS", pick(300, 1 << 22))
    monkeypatch.setattr(launch, "SINK_QUERIES", pick(8, 1024))
    size = pick(1, 2, 3, 4, 16, 40)
    c = config(
        chunk_size=size * pick(1, 2, 3) if size < 40 else 40,
        group_size=size,
        keep_first=pick(0, 1, 2, 30),
        keep_last=pick(0, 1, 3, 30),
        topk_chunks=pick(1, 3),
        topk_groups=pick(1, 4, 9),
        routing="strict",
    )
    s = draw.randint(1, 90)
    t, b, hkv = draw.randint(1, min(s, 16)), pick(1, 2), pick(1, 2)
    x = tensors(s, t, b=b, hq=hkv * pick(1, 2, 3), hkv=hkv, d=pick(3, 8, 24), dtype=pick(*DTYPES), seed=seed)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, s, generator=g) < 0.8 if pick(0, 1) else None
    positions = torch.randint(-2, s + 2, (b, t), generator=g) if pick(0, 1) else None
    with tiles(pick(16, 32), pick(16, 64)):
        check(x, c, mask=mask, positions=positions, scale=pick(None, 0.3, -0.2), through_lse=pick(True, False))


@pytest.mark.parametrize("s", [0, 1, 15, 16, 17, 48])
def test_short_texts(s):
    check(tensors(s, s, hq=2, hkv=1), config())


def test_no_rows():
    x = tensors(20, 20, b=2)
    for q, k in ((x[0][:, :0], x[1]), (x[0][:0], x[1][:0])):
        gradients = Problem((q, k, k), config()).found()
        assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize(("scale", "through_lse"), [(0.3, False), (-0.2, True), (0.0, True)])
def test_scales(scale, through_lse):
    check(tensors(70, 5), config(), scale=scale, through_lse=through_lse)


def test_full_budgets_are_dense_attention():
    q, k, v = (y.requires_grad_() for y in tensors(40, 40, hq=2, hkv=1))
    c = config(topk_chunks=10, topk_groups=40)
    found = hga_attention(q, k, v, c, rope=Rope.from_theta(1e4, 16), impl="triton")
    args = (x.transpose(1, 2).double() for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((found * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((dense.transpose(1, 2) * weight).sum(), (q, k, v))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


def test_a_sum_broadcasts_its_gradient():
    x = [y.requires_grad_() for y in tensors(60, 9)]
    rope = Rope.from_theta(1e4, 16)
    found, expected = (
        torch.autograd.grad(hga_attention(*x, config(), rope=rope, impl=impl).sum(), x)
        for impl in ("triton", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_positions_in_any_order():
    at = torch.tensor([[149, 3, -1, 70, 150, 0, 15, 16]])
    check(tensors(150, 8, hq=2, hkv=1), config(), positions=at)
    check(tensors(150, 8, hq=2, hkv=1), config(), positions=at.int())
    q, *_ = Problem(tensors(150, 8, hq=2, hkv=1), config(), positions=at).found()
    assert not q[0, [2, 4]].any()


def test_what_is_masked_holds_anything_and_gets_nothing(cut):
    x = tensors(80, 12, b=3, hq=2, hkv=1)
    mask = torch.rand(3, 80, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[1], mask[2, :75] = True, False
    clean = Problem(x, config(), mask=mask)
    check(x, config(), mask=mask)
    poisoned = [y.clone() for y in x]
    for y in poisoned[1:]:
        y[~mask] = NAN
    poisoned[0][~mask[:, 68:]] = NAN
    dirty = Problem(poisoned, config(), mask=mask, routes=clean.routes, grads=list(clean.grads))
    found = dirty.found()
    for a, b in zip(found, clean.found(), strict=True):
        assert torch.equal(a, b)
    assert not found[0][~mask[:, 68:]].any() and not found[1][~mask].any() and not found[2][~mask].any()


def test_a_row_of_which_nothing_is_asked_passes_nothing_on(cut):
    """Whatever its numbers are, and those of what it alone sees."""
    x, c = tensors(100, 9), config()
    grads = [torch.randn(1, 9, 4, 16), torch.randn(1, 4, 9)]
    idle = torch.zeros(1, 9, 4, dtype=torch.bool)
    idle[0, ::3], idle[0, 1, 2] = True, True
    grads[0][idle], grads[1].transpose(1, 2)[idle] = 0, 0
    clean = Problem(x, c, grads=grads)
    expected = clean.found()
    x[0][idle] = NAN
    dirty = Problem(x, c, routes=clean.routes, grads=grads)
    dirty.out[idle], dirty.lse.transpose(1, 2)[idle] = NAN, NAN
    for a, b in zip(dirty.found(), expected, strict=True):
        assert torch.equal(a, b)
    assert not expected[0][idle].any()


def test_the_same_call_gives_the_same_bits(cut):
    problem = Problem(tensors(100, 20, b=2, hq=2, hkv=1), config(keep_first=2))
    first = problem.found()
    with other_order() as order:
        again = problem.found()
    assert any(x != y for x, y in order)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_any_strides_and_nothing_between_them():
    x, c = tensors(80, 4, b=2, hq=2, hkv=1), config()
    plain = Problem(x, c)
    expected = plain.found()

    def spread(y):
        b, t, h, d = y.shape
        view = y.new_full((b, h + 1, 2 * t + 1, d + 3), NAN)[:, 1:, 1::2, 2:-1].transpose(1, 2)
        return view.copy_(y)

    def transposed(y):
        return y.transpose(1, 2).contiguous().transpose(1, 2)

    plain.x = tuple(spread(y) for y in plain.x)
    plain.out = spread(plain.out)
    plain.lse = transposed(plain.lse)
    plain.grads = (spread(plain.grads[0]), transposed(plain.grads[1]))
    for a, b in zip(plain.found(), expected, strict=True):
        assert torch.equal(a, b)
    columns = plain.grads[0].transpose(-1, -2).contiguous().transpose(-1, -2)
    plain.grads = (columns, plain.grads[1])
    for a, b in zip(plain.found(), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("place", "where", "poison"),
    [
        ("sink", "key", NAN),
        ("group", "key", torch.inf),
        ("window", "key", -torch.inf),
        ("group", "value", NAN),
        ("window", "value", torch.inf),
    ],
)
def test_what_is_no_number_reaches_those_who_see_it(place, where, poison):
    """dQ of the rows that see the token, dK and dV of what those rows see; nothing else."""
    x, c = tensors(110, 4), config()
    clean = Problem(x, c)
    token = {"sink": 10, "group": 4 * int(clean.routes[0, 3, 2, 0]) + 1, "window": 103}[place]
    y = [z.clone() for z in x]
    y[1 if where == "key" else 2][0, token, 1, 3] = poison
    dirty = Problem(y, c, routes=clean.routes, grads=list(clean.grads))
    hit = clean.seen()[..., token].clone()
    hit[..., :2] = False
    assert hit.any() and not hit.all()
    reached = dirty.by_kv_head(hit)
    for found, plain, marked in zip(dirty.found(), clean.found(), (hit, reached, reached), strict=True):
        assert found[marked].isnan().all()
        assert torch.equal(found[~marked], plain[~marked])


@pytest.mark.parametrize(("where", "poison"), [("key", -torch.inf), ("value", NAN)])
def test_a_token_whose_score_did_not_show_it(where, poison):
    """An infinite key of which out and lse know nothing: NaN in dQ of those who see it and in its own dK and dV."""
    problem = Problem(tensors(110, 4), config())
    expected = problem.found()
    problem.x[1 if where == "key" else 2][0, 10, 1, 3] = poison
    hit = problem.seen()[..., 10].clone()
    hit[..., :2] = False
    own = torch.zeros(1, 110, 2, dtype=torch.bool)
    own[0, 10, 1] = True
    for found, plain, marked in zip(problem.found(), expected, (hit, own, own), strict=True):
        assert found[marked].isnan().all()
        assert torch.equal(found[~marked], plain[~marked])


@pytest.mark.parametrize("where", ["q", "grad_out", "grad_lse", "out", "lse"])
def test_a_row_that_is_no_number_reaches_what_it_sees(where):
    x, c = tensors(90, 6), config()
    problem = Problem(x, c)
    expected = problem.found()
    row = torch.zeros(1, 6, 4, dtype=torch.bool)
    row[0, 4, 2] = True
    sides = {"q": x[0], "grad_out": problem.grads[0], "out": problem.out}
    lines = {"grad_lse": problem.grads[1], "lse": problem.lse}
    if where in sides:
        sides[where][0, 4, 2, 5] = NAN
    else:
        lines[where][0, 2, 4] = NAN
    reached = problem.by_kv_head(row)
    assert reached.any() and not reached[:, :, 1].all()
    for found, plain, marked in zip(problem.found(), expected, (row, reached, reached), strict=True):
        assert found[marked].isnan().all()
        assert torch.equal(found[~marked], plain[~marked])


def test_routes_that_name_what_they_may_not_are_passed_over(cut):
    """Of the sinks, the window, beyond the text, twice: every token is still seen once."""
    wild = torch.tensor([0, 1, 8, 8, 9, 23, 24, 25, 10_000, 2**31 - 1, 3, -5], dtype=torch.int32).expand(1, 1, 4, 12)
    plain = torch.tensor([8, 9], dtype=torch.int32).expand(1, 1, 4, 2)
    problem = Problem(tensors(100, 1), config(), routes=plain)
    expected = problem.found()
    problem.routes = wild
    for a, b in zip(problem.found(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_what_it_does_not_serve_it_says():
    x = tensors(20, 1, hq=65, hkv=1)
    problem = Problem(x, config(), routes=torch.full((1, 1, 65, 1), -1, dtype=torch.int32))
    with pytest.raises(ImplError, match="64 per kv head: got 1, 65, 1"):
        problem.found()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_configuration(dtype):
    """Chunks of 64 and groups of 16 over 1,500 tokens, with the blocks of the tables."""
    c = HGAConfig(keep_last=2, topk_chunks=4, topk_groups=8)
    for op in ("hga_attention_backward", "hga_attention_backward_dq"):
        assert op in launch.tuning.tables()
    with tiles(64, 64):
        check(tensors(1500, 40, hq=8, hkv=2, d=128, dtype=dtype), c)
