"""The operations as torch.library operations: opcheck, gradients, compilation, dtypes, strides."""

from __future__ import annotations

import pytest
import torch
from hga_cases import close, full, rope, small, tensors
from torch import Tensor

import hici_kernels
from hici_kernels import HGAConfig
from hici_kernels.ops.hga_attention.api import HGAResult, hga_attention
from hici_kernels.ops.hga_route.api import budgets, hga_route
from hici_kernels.ops.hga_summaries.api import hga_summaries

OPS = torch.ops.hici


def arguments(config: HGAConfig, positions: Tensor | None, mask: Tensor | None, routes: Tensor | None) -> tuple:
    return (rope().inv_freq, positions, mask, routes, config.group_size, *budgets(config), 0.3, "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("at", [False, True])
def test_opcheck_summaries(dtype: torch.dtype, at: bool) -> None:
    _, k, _ = tensors(40, b=2, dtype=dtype)
    positions = torch.arange(40) if at else None
    torch.library.opcheck(OPS.hga_summaries.default, (k, rope().inv_freq, positions, 16, 4, ""))
    torch.library.opcheck(OPS.hga_summaries.default, (k[:, :0], rope().inv_freq, None, 16, 4, ""))


@pytest.mark.parametrize("config", [small(), small(routing="block"), small(routing="prefix", share="kv")], ids=str)
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("at", [False, True])
def test_opcheck_route(config: HGAConfig, context: int, at: bool) -> None:
    q, k, _ = tensors(90, b=2)
    chunk_keys, group_keys = hga_summaries(k, rope=rope(), chunk_size=16, group_size=4)
    positions = torch.arange(90).expand(2, 90) if at else None
    torch.library.opcheck(OPS.hga_route.default, (q, chunk_keys, group_keys, positions, context, *budgets(config), ""))


PATTERNS = {
    "plain": {},
    "last": {"t": 5},
    "mask": {"mask": True},
    "positions": {"t": 7, "at": True},
    "routes": {"given": True},
    "empty": {"t": 0},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_opcheck_attention(name: str) -> None:
    pattern = dict(PATTERNS[name])
    t = pattern.get("t", 70)
    q, k, v = tensors(70, t=t, b=2, dtype=pattern.get("dtype", torch.float64))
    mask = (torch.arange(140).view(2, 70) % 5 > 0) if pattern.get("mask") else None
    positions = (torch.arange(t) * 9).expand(2, t).contiguous() if pattern.get("at") else None
    routes = full(q, k, v, small()).routes if pattern.get("given") else None
    rest = arguments(small(), positions, mask, routes)
    out, lse, routes = OPS.hga_attention.default(q, k, v, *rest)
    backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, q, k, v)
    torch.library.opcheck(OPS.hga_attention_backward.default, (*backward, *rest[:3], routes, *rest[4:]))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(OPS.hga_attention.default, (*leaves, *rest))


@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
@pytest.mark.parametrize("masked", [False, True])
def test_p23_gradcheck(routing: str, masked: bool) -> None:
    config = HGAConfig(4, 2, 1, 1, 1, 1, routing=routing)
    leaves = [x.requires_grad_() for x in tensors(22, t=6, b=2, hq=2, hkv=1, d=4, seed=3)]
    mask = None
    if masked:
        mask = torch.ones(2, 22, dtype=torch.bool)
        mask[0, :3] = mask[1, 10] = mask[1, 20] = False

    def formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        got = full(q, k, v, config, attention_mask=mask)
        return got.out, torch.where(got.lse == -torch.inf, 0.0, got.lse)

    assert torch.autograd.gradcheck(formula, leaves)


def test_summaries_and_routes_carry_no_gradient() -> None:
    q, k, _ = (x.requires_grad_() for x in tensors(70))
    chunk_keys, group_keys = hga_summaries(k, rope=rope(), chunk_size=16, group_size=4)
    assert not chunk_keys.requires_grad and not group_keys.requires_grad
    assert not hga_route(q, chunk_keys, group_keys, small()).requires_grad


def test_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(20))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(hga_attention(q, k, v, small(), rope=rope()).sum(), q, create_graph=True)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("routing", ["strict", "block"])
def test_compiles_whole(dynamic: bool, routing: str) -> None:
    torch._dynamo.reset()
    config, r = small(routing=routing), rope()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, HGAResult]:
        chunk_keys, group_keys = hga_summaries(k, rope=r, chunk_size=16, group_size=4)
        return hga_route(q, chunk_keys, group_keys, config), full(q, k, v, config, rope=r)

    for s in (50, 70):
        leaves = [x.requires_grad_() for x in tensors(s, dtype=torch.float32)]
        routes, got = compiled(*leaves)
        want = full(*leaves, config)
        assert torch.equal(routes, want.routes) and torch.equal(got.routes, want.routes)
        assert torch.equal(got.out, want.out)
        grads = [torch.autograd.grad(x.out.sum() + x.lse.sum(), leaves) for x in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiles_with_mask_and_positions() -> None:
    torch._dynamo.reset()
    config, r = small(), rope()
    compiled = torch.compile(
        lambda q, k, v, m, p: hga_attention(q, k, v, config, rope=r, attention_mask=m, positions=p),
        fullgraph=True,
        backend="aot_eager",
    )
    q, k, v = tensors(60, t=3)
    mask, at = torch.arange(60)[None] > 4, torch.tensor([[3, 40, 50]])
    want = hga_attention(q, k, v, config, rope=r, attention_mask=mask, positions=at)
    assert torch.equal(compiled(q, k, v, mask, at), want)


def test_plain_or_named_result() -> None:
    q, k, v = tensors(20)
    assert isinstance(hga_attention(q, k, v, small(), rope=rope()), Tensor)
    only = hga_attention(q, k, v, small(), rope=rope(), return_routes=True)
    assert isinstance(only, HGAResult) and only.lse is None and only.routes is not None
    assert hga_attention(q, k, v, small(), rope=rope(), return_lse=True).routes is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = tensors(70, dtype=dtype)
    got = full(q, k, v, small())
    assert got.out.dtype == dtype and got.routes.dtype == torch.int32
    assert got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert hga_summaries(k, rope=rope())[0].dtype == dtype


@pytest.mark.parametrize("routing", ["strict", "prefix", "block"])
def test_strided_inputs(routing: str) -> None:
    q, k, v = tensors(90, b=2)
    want = full(q, k, v, small(routing=routing))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    packed = torch.cat([x.flatten(2) for x in (q, k, v)], -1).split([64, 32, 32], -1)
    packed = [x.unflatten(-1, (-1, 16)) for x in packed]
    for other in (strided, packed):
        got = full(*other, small(routing=routing))
        assert torch.equal(got.routes, want.routes)
        close(got.out, want.out)


def test_scale_enters_the_softmax_only() -> None:
    q, k, v = tensors(90)
    a, b = full(q, k, v, small(), scale=0.25), full(q, k, v, small(), scale=0.01)
    assert torch.equal(a.routes, b.routes) and not torch.equal(a.out, b.out)
    close(a.out, full(q, k, v, small()).out, 0)


def test_autocast() -> None:
    q, k, v = tensors(70, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = hga_attention(q, k, v, small(), rope=rope())
    close(got, hga_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), small(), rope=rope()), 0)
    assert got.dtype == torch.bfloat16


def test_missing_implementation_says_so() -> None:
    q, k, v = tensors(20)
    with pytest.raises(hici_kernels.ImplError, match="impl='flash_attn' cannot serve hga_attention"):
        hga_attention(q, k, v, small(), rope=rope(), impl="flash_attn")


@pytest.mark.slow
def test_16k_tokens_fit_in_little_memory() -> None:
    import resource

    q, k, v = tensors(16384, hq=4, hkv=2, d=64, dtype=torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = full(q, k, v, HGAConfig())
    assert got.out.isfinite().all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB
