"""Attention over page addresses: what a cache calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hga_cases import full, rope, small, tensors
from torch import Tensor

from hici_kernels import HGAConfig, _native, merge_attention
from hici_kernels.ops.hga_attention.op import attention_forward
from hici_kernels.ops.hga_attention.pages import pages_attention
from hici_kernels.ops.hga_route.api import budgets
from hici_kernels.ops.hga_route.reference import regions
from hici_kernels.testing import budget, error

PATHS = list(_native.paths())
pytestmark = pytest.mark.skipif(not PATHS, reason=str(_native.status()))
NAN = float("nan")


def pages_of(
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    positions: Tensor,
    config: HGAConfig,
    *,
    token_major: bool,
    only: Callable[[int], bool] = lambda chunk: True,
) -> tuple[dict[str, Tensor | int], list[Tensor]]:
    """Arguments of pages_attention for a call of hga_attention, every page in memory of its own; and that memory.

    Only what some query sees is there: everything else is NaN. Chunks that ``only`` is false of are left out.
    """
    b, s, hkv, d = k.shape
    t, hq = routes.shape[1:3]
    c, m, r = config.chunk_size, config.groups_per_chunk, hq // hkv
    lists: dict[str, list] = {n: [] for n in ("k_pages", "v_pages", "chunks")}
    memory, offsets = [], [0]
    for row in range(b):
        p = positions[row]
        region = regions(p, c, config.keep_first, config.keep_last)
        for head in range(hkv):
            groups: set[int] = set()  # that some query sees
            for i in range(t):
                if p[i] < 0:
                    continue
                near = [*range(int(region.f[i])), *range(int(region.l[i]), int(region.n[i]) + 1)]
                groups |= {x * m + y for x in near for y in range(m)}
                groups |= {x for x in routes[row, i, head * r : (head + 1) * r].flatten().tolist() if x >= 0}
            for chunk in sorted({x // m for x in groups}):
                if not only(chunk):
                    continue
                shape = (c, 3, d) if token_major else (c, d)
                page = [torch.full(shape, NAN, dtype=k.dtype) for _ in "kv"]
                seen = torch.tensor([chunk * m + j // config.group_size in groups for j in range(c)])
                seen &= chunk * c + torch.arange(c) <= p.max()
                for to, source in zip(page, (k, v), strict=True):
                    into = to[:, 1] if token_major else to
                    held = min(s, chunk * c + c) - chunk * c
                    into[seen] = source[row, chunk * c : chunk * c + held, head][seen[:held]]
                    memory.append(to)
                skip = d if token_major else 0
                for name, to in zip(("k_pages", "v_pages"), page, strict=True):
                    lists[name].append(to.data_ptr() + skip * to.element_size())
                lists["chunks"].append(chunk)
            offsets.append(len(lists["chunks"]))
    found: dict[str, Tensor | int] = {n: torch.tensor(x, dtype=torch.int64) for n, x in lists.items()}
    stride = 3 * d if token_major else d
    found |= {"offsets": torch.tensor(offsets), "positions": positions, "routes": routes, "kv_heads": hkv}
    found |= {n: getattr(config, n) for n in ("group_size", "chunk_size", "keep_first", "keep_last")}
    found |= {"k_stride": stride, "v_stride": stride}
    return found, memory


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [1, 2, 5, 60])
@pytest.mark.parametrize("token_major", [False, True])
def test_pages_equal_the_operation(path: str, dtype: torch.dtype, t: int, token_major: bool) -> None:
    config = small(topk_chunks=4, topk_groups=6)
    q, k, v = tensors(220, t=t, b=2, hq=8, hkv=2, d=40, seed=t, dtype=dtype)
    positions = torch.arange(220 - t, 220).expand(2, t).clone()
    positions[1, 0] = -1  # sees nothing
    with _native.path(path):
        want = full(q, k, v, config, positions=positions, rope=rope(40), impl="cpu")
        given, memory = pages_of(k, v, want.routes, positions, config, token_major=token_major)
        out, lse = pages_attention(q, **given)
    rest = (rope(40).inv_freq, positions, None, want.routes, config.group_size, *budgets(config), 40**-0.5, "reference")
    truth = attention_forward(*(x.double() for x in (q, k, v)), *rest)
    plain = attention_forward(q, k, v, *rest)
    for x, y, z in zip(truth, plain, (out, lse), strict=False):
        assert error(x, z) <= budget(x, y, z.dtype)
    assert not out[1, 0].any() and (lse[1, :, 0] == -torch.inf).all()
    assert memory


@pytest.mark.parametrize("t", [1, 60])
def test_parts_of_a_history_merge_to_the_whole(t: int) -> None:
    config = small(topk_chunks=4, topk_groups=6)
    q, k, v = tensors(220, t=t, b=2, hq=8, hkv=2, d=40, seed=t, dtype=torch.float32)
    positions = torch.arange(220 - t, 220).expand(2, t)
    want = full(q, k, v, config, positions=positions, rope=rope(40), impl="cpu")
    memory, parts = [], []
    for odd in (0, 1):
        given, held = pages_of(
            k, v, want.routes, positions, config, token_major=False, only=lambda chunk, odd=odd: chunk % 2 == odd
        )
        memory.append(held)
        parts.append(pages_attention(q, **given))
    out, _ = merge_attention(*zip(*parts, strict=True))
    assert (out - want.out).abs().max() < 1e-5


def test_results_of_a_row_do_not_depend_on_the_batch() -> None:
    config = HGAConfig(keep_first=1, keep_last=2, topk_chunks=8, topk_groups=64)
    for t in (1, 40):
        q, k, v = tensors(4000, t=t, b=3, hq=8, hkv=2, d=64, dtype=torch.bfloat16)
        positions = torch.arange(4000 - t, 4000).expand(3, t)
        routes = full(q, k, v, config, rope=rope(64)).routes
        whole, memory = pages_of(k, v, routes, positions, config, token_major=False)
        out, lse = pages_attention(q, **whole)
        for b in range(3):
            x = slice(b, b + 1)
            given, held = pages_of(k[x], v[x], routes[x], positions[x], config, token_major=False)
            assert memory and held and all(map(torch.equal, pages_attention(q[x], **given), (out[x], lse[x])))


def test_bits_do_not_depend_on_threads() -> None:
    config = HGAConfig(keep_first=1, keep_last=2, topk_chunks=8, topk_groups=16)
    before = torch.get_num_threads()
    for t in (1, 40):
        q, k, v = tensors(4000, t=t, b=2, hq=8, hkv=2, d=64, dtype=torch.bfloat16)
        positions = torch.arange(4000 - t, 4000).expand(2, t)
        routes = full(q, k, v, config, rope=rope(64)).routes
        given, memory = pages_of(k, v, routes, positions, config, token_major=False)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(pages_attention(q, **given))
        torch.set_num_threads(before)
        assert memory and all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_no_pages_and_empty_calls() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    sizes = {"kv_heads": 2, "chunk_size": 16, "group_size": 4, "k_stride": 16, "v_stride": 16}
    sizes |= {"keep_first": 1, "keep_last": 1}
    for b, t in ((1, 2), (0, 2), (2, 0), (1, 40)):
        given = {"chunks": none, "offsets": torch.zeros(2 * b + 1, dtype=torch.int64)}
        given |= {"routes": torch.zeros(b, t, 4, 3, dtype=torch.int32)}
        given |= {"positions": torch.zeros(b, t, dtype=torch.int64)}
        out, lse = pages_attention(torch.ones(b, t, 4, 16), none, none, **given, **sizes)
        assert not out.any() and (lse == -torch.inf).all() and lse.shape == (b, 4, t)


def test_bad_arguments_are_named() -> None:
    config = small()
    q, k, v = tensors(60, t=1, dtype=torch.float32)
    positions = torch.tensor([[59]])
    routes = full(q, k, v, config).routes
    good, memory = pages_of(k, v, routes, positions, config, token_major=False)
    pages_attention(q, **good)
    assert memory
    for name, bad, kind in (
        ("q", q.double(), TypeError),
        ("k_pages", good["k_pages"].int(), TypeError),
        ("v_pages", good["v_pages"][1:], ValueError),
        ("chunks", None, TypeError),
        ("chunks", good["chunks"].flip(0), ValueError),
        ("chunks", good["chunks"] + (1 << 30), ValueError),
        ("offsets", good["offsets"][1:], ValueError),
        ("offsets", good["offsets"].flip(0), ValueError),
        ("routes", routes[:, :0], ValueError),
        ("routes", routes[0], ValueError),
        ("routes", routes.long(), TypeError),
        ("positions", torch.tensor([59]), ValueError),
        ("kv_heads", 3, ValueError),
        ("group_size", 5, ValueError),
        ("keep_last", -1, ValueError),
    ):
        with pytest.raises(kind, match=name):
            pages_attention(**{"q": q, **good, name: bad})
