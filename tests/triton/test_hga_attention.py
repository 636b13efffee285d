"""hga_attention's kernels under Triton's interpreter: against float64 by the budget, and what must not matter."""

import pytest
import torch

from hici_kernels import HGAConfig, ImplError, Rope
from hici_kernels.ops.hga_attention import triton as launch
from hici_kernels.ops.hga_attention.api import hga_attention
from hici_kernels.ops.hga_attention.op import attention_backward, attention_forward
from hici_kernels.ops.hga_route.api import budgets
from hici_kernels.testing import assert_within_budget
from hici_kernels.tuning.chips import pretend
from hici_kernels.tuning.lookup import trial

pytest.importorskip("triton.language")

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def config(**changes):
    fields = {"chunk_size": 16, "group_size": 4, "keep_first": 1, "keep_last": 1, "topk_chunks": 2, "topk_groups": 3}
    return HGAConfig(**{**fields, "route_block": 8, **changes})


def tensors(s, t, *, b=1, hq=4, hkv=2, d=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = ((b, t, hq, d), (b, s, hkv, d), (b, s, hkv, d))
    return tuple(torch.randn(x, generator=g, dtype=torch.float64).to(dtype) for x in sizes)


def attend(x, c, impl, routes=None, positions=None, mask=None, scale=None):
    d = x[0].shape[-1]
    rest = (Rope.from_theta(1e4, d // 2 * 2).inv_freq, positions, mask, routes, c.group_size, *budgets(c))
    return attention_forward(*x, *rest, d**-0.5 if scale is None else scale, impl)


def check(x, c, **options):
    """With the routes that the kernels find, out and lse are within the budget."""
    out, lse, routes = attend(x, c, "triton", **options)
    options["routes"] = routes
    exact = attend([y.double() for y in x], c, "reference", **options)
    plain = attend(x, c, "reference", **options)
    for name, f, e, p in zip(("out", "lse"), (out, lse), exact, plain, strict=False):
        assert f.dtype == p.dtype
        assert_within_budget(e, f, p, name)
    return out, lse, routes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 30])
def test_against_float64(t, dtype):
    _, _, routes = check(tensors(150, t, dtype=dtype), config())
    assert (routes >= 0).any()


@pytest.mark.parametrize(
    ("group", "d"), [*((g, d) for g in (1, 4, 8) for d in (64, 80, 128)), (2, 256), (3, 200), (6, 5)]
)
def test_heads_and_widths(group, d):
    check(tensors(150, 3, hq=group, hkv=1, d=d, dtype=DTYPES[(group + d) % 3]), config())


@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
@pytest.mark.parametrize("share", ["query", "kv"])
def test_routes_are_the_references(routing, share):
    x, c = tensors(100, 10), config(routing=routing, share=share)
    found, expected = (attend(y, c, i) for y, i in ((x, "triton"), ([z.double() for z in x], "reference")))
    assert torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("s", [0, 1, 15, 16, 17, 48])
def test_short_texts(s):
    check(tensors(s, s), config())


def test_full_budgets_are_dense_attention():
    q, k, v = tensors(60, 60)
    c = config(topk_chunks=10, topk_groups=40)
    found = hga_attention(q, k, v, c, rope=Rope.from_theta(1e4, 16), impl="triton")
    args = (x.transpose(1, 2).double() for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found.double(), dense.transpose(1, 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("routing", ["strict", pytest.param("block", marks=pytest.mark.slow)])
def test_a_padded_row_is_the_row_alone(routing):
    c = config(routing=routing)
    x = tensors(110, 8, b=3)
    mask = torch.rand(3, 110, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[1], mask[2, :105] = True, False
    for y in x[1:]:
        y[~mask] = NAN
    x[0][~mask[:, 102:]] = NAN
    out, lse, routes = check(x, c, mask=mask)
    kept = mask[0].nonzero().flatten()
    asked = mask[0, 102:].nonzero().flatten()
    alone = attend((x[0][:1, asked], x[1][:1, kept], x[2][:1, kept]), c, "triton")
    assert torch.equal(alone[2], routes[:1, asked, :, : alone[2].shape[-1]])
    torch.testing.assert_close(alone[0], out[:1, asked], rtol=0, atol=1e-6)
    blind = ~mask[:, 102:]
    assert not out[blind].any() and (lse.transpose(1, 2)[blind] == -torch.inf).all() and (routes[blind] == -1).all()


def test_positions():
    x = tensors(150, 8)
    at = torch.tensor([[149, 3, -1, 70, 150, 0, 15, 16]])
    out, *_ = check(x, config(), positions=at)
    assert not out[0, [2, 4]].any()
    check(x, config(), positions=at.int())


@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
def test_scales(scale):
    check(tensors(100, 4), config(), scale=scale)


def test_few_rows_are_cut_into_runs(monkeypatch):
    x, c = tensors(200, 2), config()
    whole, lse, _ = attend(x, c, "triton")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 64)
    with trial("hga_attention", {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}):
        out, cut_lse, _ = check(x, c)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(cut_lse, lse, rtol=0, atol=2e-6)
    assert not torch.equal(out, whole)


def test_queries_in_slices(monkeypatch):
    x, c = tensors(120, 20), config()
    whole = attend(x, c, "triton")
    monkeypatch.setattr(launch, "SCRATCH", 1)
    with trial("hga_attention", {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}):
        for a, b in zip(attend(x, c, "triton"), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("where", "poison"), [("key", NAN), ("value", NAN), ("value", torch.inf)])
def test_what_is_no_number_reaches_those_who_see_it(where, poison):
    x, c = tensors(150, 6), config()
    clean = attend(x, c, "triton")
    routes = clean[2]
    # of the sinks, of a group that some query opened, of the window
    for token in (10, 4 * int(routes[0, 3, 2, 0]) + 1, 140):
        y = [z.clone() for z in x]
        y[1 if where == "key" else 2][0, token, 1, 3] = poison
        found, expected = (attend(y, c, i, routes=routes) for i in ("triton", "reference"))
        hit = expected[0].isnan().any(-1)
        assert hit.any() and not hit.all()
        assert torch.equal(found[0].isnan().any(-1), hit)
        assert torch.equal(found[1].transpose(1, 2).isnan(), hit)
        torch.testing.assert_close(found[0][~hit], clean[0][~hit], rtol=0, atol=1e-6)


def test_a_key_with_an_infinity_changes_nothing_for_those_who_do_not_see_it():
    """Who sees it gets NaN, or where its score is -inf, the sums without it."""
    x, c = tensors(150, 6), config()
    out, lse, routes = attend(x, c, "triton")
    q, k, v = (y.double() for y in x)
    without = 0
    for token in (10, 4 * int(routes[0, 3, 2, 0]) + 1, 140):
        y = [z.clone() for z in x]
        y[1][0, token, 1, 3] = torch.inf
        found, found_lse, _ = attend(y, c, "triton", routes=routes)
        hit = attend(y, c, "reference", routes=routes)[0].isnan().any(-1)[0]
        assert hit.any() and not hit.all()
        assert torch.equal(found[0][~hit], out[0][~hit])
        # scores of the token for the heads that read it: +inf or -inf with the sign of q's dim 3
        lost = hit & (x[0][0, ..., 3] < 0)
        without += int(lost.sum())
        assert found[0][hit & ~lost].isnan().all() and found_lse[0].T[hit & ~lost].isnan().all()
        all_mass = lse[0].T.double()[lost].exp()
        own = (q[0][lost] @ k[0, token, 1] * 0.25).exp()
        rest = out[0].double()[lost] * all_mass[:, None] - own[:, None] * v[0, token, 1]
        torch.testing.assert_close(found[0][lost].double(), rest / (all_mass - own)[:, None], rtol=0, atol=1e-5)
    assert without


def test_routes_that_name_what_they_may_not_are_passed_over():
    """Of the sinks, the window, beyond the text, twice: every token is still attended once."""
    x = tensors(100, 1)
    wild = torch.tensor([0, 1, 8, 8, 9, 23, 24, 25, 10_000, 2**31 - 1, 3, -5], dtype=torch.int32).expand(1, 1, 4, 12)
    plain = torch.tensor([8, 9], dtype=torch.int32).expand(1, 1, 4, 2)
    found, expected = (attend(x, config(), "triton", routes=r) for r in (wild, plain))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)


def test_any_strides_and_nothing_between_them():
    x, c = tensors(100, 6, b=2), config()
    wide = [y.new_full((2, y.shape[2] + 1, 2 * y.shape[1] + 1, y.shape[3] + 3), NAN) for y in x]
    views = [w[:, 1:, 1::2, 2:-1].transpose(1, 2) for w in wide]
    for view, y in zip(views, x, strict=True):
        view.copy_(y)
    for a, b in zip(attend(views, c, "triton"), attend(x, c, "triton"), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_the_references():
    x, c = tensors(100, 10), config()
    leaves = [y.clone().requires_grad_() for y in x]
    rope = Rope.from_theta(1e4, 16)
    found = torch.autograd.grad(hga_attention(*leaves, c, rope=rope, impl="triton").square().sum(), leaves)
    expected = torch.autograd.grad(hga_attention(*leaves, c, rope=rope, impl="reference").square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    """The last token of a text of more than 2^31 numbers, by a group far from both ends; no other memory is read."""
    c, s, d = config(keep_first=0, keep_last=0), 2**24 + 16 * 100 + 5, 128
    near = tensors(40, 1, hq=2, hkv=1, d=d, dtype=torch.bfloat16)
    k, v = (torch.empty(1, s, 1, d, dtype=torch.bfloat16) for _ in "kv")
    assert k.numel() > 2**31
    group = 2**22 + 50
    for far, y in ((k, near[1]), (v, near[2])):
        far[:, 4 * group : 4 * group + 4] = y[:, 8:12]
        far[:, -5:] = y[:, -5:]
    # in the near text the same tokens are group 2 and an active chunk of 5
    short = [near[0], *(y[:, :37] for y in near[1:])]
    for y, far in zip(short[1:], (k, v), strict=True):
        y[:, 32:] = far[:, -5:]
    one, two = (torch.tensor([i], dtype=torch.int32).expand(1, 1, 2, 1) for i in (group, 2))
    found, expected = attend((near[0], k, v), c, "triton", routes=one), attend(short, c, "triton", routes=two)
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_opcheck():
    x, c = tensors(60, 5), config()
    rest = (Rope.from_theta(1e4, 16).inv_freq, None, None, None, c.group_size, *budgets(c), 0.25, "triton")
    leaves = [y.clone().requires_grad_() for y in x]
    torch.library.opcheck(attention_forward, (*leaves, *rest))
    out, lse, routes = attention_forward(*x, *rest)
    given = (*x, *rest[:3], routes, *rest[4:])
    torch.library.opcheck(attention_backward, (torch.ones_like(out), torch.ones_like(lse), out, lse, *given))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_configuration(dtype):
    """Chunks of 64 and groups of 16 over 2,000 tokens, few queries and a whole tile."""
    c = HGAConfig(keep_last=2, topk_chunks=4, topk_groups=8)
    for t in (1, 40):
        check(tensors(2000, t, hq=8, hkv=2, d=128, dtype=dtype), c)


def test_what_it_does_not_serve_it_says():
    x = tensors(100, 2)
    with pytest.raises(ImplError, match="no super-chunks"):
        attend(x, config(super_chunk=2, topk_supers=1), "triton")
    with pytest.raises(ImplError, match=r"q is torch\.float64"):
        attend([y.double() for y in x], config(), "triton")
    with pytest.raises(ImplError, match="head_dim up to 256, q has 264"):
        attend(tensors(40, 2, d=264), config(), "triton")
    with pytest.raises(ImplError, match="topk_groups is 300"):
        attend(x, config(), "triton", routes=torch.full((1, 2, 4, 300), -1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("arch", "rows", "d", "dtype", "served"),
    [
        ("sm_86", 64, 256, torch.float32, False),
        ("sm_80", 64, 256, torch.float32, False),
        ("sm_90", 64, 256, torch.float32, True),
        ("gfx942", 64, 256, torch.float32, True),
        ("sm_86", 64, 128, torch.float32, False),
        ("sm_86", 32, 256, torch.float32, True),
        ("sm_86", 64, 256, torch.bfloat16, False),
        ("sm_86", 64, 128, torch.bfloat16, True),
    ],
)
def test_heads_of_a_group_that_fit_no_shared_memory(arch, rows, d, dtype, served):
    """As the compiler found of each: near_keys takes 167,936 bytes for the second, of 166,912."""
    said = launch.too_crowded(arch, rows, d, dtype)
    assert said is None if served else f"{rows} heads per kv head of head_dim {d}" in said
    with pretend(arch):
        x = tuple(torch.empty(1, 4, h, d, dtype=dtype) for h in (rows, 1, 1))
        rest = (torch.empty(d // 2), None, None, None, 4, *budgets(config()), 1.0)
        assert (launch.rejects(*x, *rest) is None) == served


def test_block_without_routes_is_left_to_the_reference_where_its_routing_is():
    x, c = tensors(64, 8), config(routing="block")
    rest = (Rope.from_theta(1e4, 16).inv_freq, None, None)
    for arch, served in (("sm_90", True), ("sm_100", False)):
        with pretend(arch):
            reason = launch.rejects(*x, *rest, None, c.group_size, *budgets(c), 0.25)
            assert (reason is None) is served, reason
            routes = torch.full((1, 8, 4, 3), -1, dtype=torch.int32)
            assert launch.rejects(*x, *rest, routes, c.group_size, *budgets(c), 0.25) is None
